-- Removes what the migrations made, except public.visitas and its rows, so that they can run
-- again. Everything here is derived from those rows.
drop function if exists public.anotar_ajuste() cascade;  -- with the triggers of visitas
drop function if exists public.base_da_contagem(text);
do $$
begin
    -- Its arguments are of the tables' row types, so it is there only with both.
    if to_regclass('public.visitas_ajustes') is not null
        and to_regclass('public.visitas_contagem') is not null
    then
        drop function if exists public.falta_a_base(public.visitas_ajustes, public.visitas_contagem, text);
    end if;
end
$$;
drop table if exists public.visitas_ajustes;
drop table if exists public.visitas_contagem;
drop function if exists public.travar_contagem();
drop function if exists public.registrar_visitas(timestamptz[]);
drop function if exists public.recusar_perda(bigint);
drop function if exists public.assumir_contagem(bigint);
drop function if exists public.ensaiar_registro();
drop function if exists public.total_visitas();
drop function if exists public.estado_da_contagem();
drop function if exists public.refazer_contagem();
drop function if exists public.recontar_visitas();
drop function if exists public.avancar_sequencia();
drop function if exists public.esta_origem();
