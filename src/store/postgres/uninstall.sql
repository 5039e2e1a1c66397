-- Removes what the migrations created, except public.visitas and its rows, so that the migrations
-- can run again. All of it is derived from those rows. The count's lock comes first, then the tables, in the
-- order in which readings lock them.
select pg_advisory_xact_lock(33329991663247731);
drop function if exists public.anotar_ajuste() cascade;  -- with the triggers of visitas
drop function if exists public.base_da_contagem(text);
do $$
begin
    -- The function's argument has the table's row type, so the function exists only with the table.
    if to_regclass('public.visitas_contagem') is not null then
        drop function if exists public.faltas_da_base(public.visitas_contagem, text);
    end if;
end
$$;
drop table if exists public.visitas_contagem;
drop table if exists public.visitas_ajustes;
drop function if exists public.travar_contagem();
drop function if exists public.registrar_visitas(timestamptz[]);
drop function if exists public.recusar_perda(bigint);
drop function if exists public.conferir_perda(bigint);
drop function if exists public.assumir_contagem(bigint);
drop function if exists public.adotar_contagem();
drop function if exists public.ensaiar_registro();
drop function if exists public.total_visitas();
drop function if exists public.estado_da_contagem(boolean);
drop function if exists public.refazer_contagem();
drop function if exists public.recontar_visitas();
drop function if exists public.avancar_sequencia();
drop function if exists public.esta_origem();
