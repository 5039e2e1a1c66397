-- Recording one visit as before, at seven eighths of the cost (by pgbench, without the flush).

-- The count's lock, as 0001 has it. To set a search_path takes longer than all the rest, so each
-- name is qualified instead.
create or replace function public.travar_contagem()
returns void
language plpgsql
volatile
as $$
begin
    if pg_catalog.current_setting('transaction_isolation')
           operator(pg_catalog.<>) all (array['read committed', 'read uncommitted'])
    then
        raise exception 'the count of visitas needs read committed, not %',
            pg_catalog.current_setting('transaction_isolation')
            using errcode = 'VS002';
    end if;
    perform pg_catalog.pg_advisory_xact_lock(33329991663247731);  -- 'visitas' in ASCII
end
$$;

-- As 0003 has it. Which transactions have ended is computed only if another than the last entry's
-- own can be open.
create or replace function public.registrar_visitas(chegadas timestamptz[])
returns bigint
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
    aqui text collate "C" := nullif(current_setting('visitas.origem', true), '');
    marca text;
    novas bigint;
    removidas boolean;
    ultima record;
    encerradas xid8[];
    entrada bigint;
    contagem bigint;
begin
    perform public.travar_contagem();

    -- Once a session: where this is cannot change within one.
    if aqui is null then
        aqui := set_config('visitas.origem', public.esta_origem(), false);
    end if;

    -- The trigger on INSERT leaves statements alone that run under this setting. Triggers of
    -- others find their tables as they do after any other insert.
    marca := set_config('visitas.registrador', 'sim', true);
    marca := set_config('search_path', 'public, pg_temp', true);
    insert into public.visitas (data)
    select pg_catalog.unnest(chegadas);
    get diagnostics novas = row_count;
    set constraints all immediate;
    marca := pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    marca := set_config('visitas.registrador', 'nao', true);

    -- A trigger that returns null and a rule that does nothing leave fewer rows. A rule that
    -- writes elsewhere leaves as many, in another table.
    if novas <> cardinality(chegadas)
       or exists (
           select
             from pg_rewrite as r
            where r.ev_class = 'public.visitas'::regclass
              and r.ev_type = '3'
              and r.is_instead
              and r.ev_qual = '<>'
              and r.ev_enabled <> 'D'
       )
    then
        perform public.recusar_perda(cardinality(chegadas));
    end if;

    select c.id,
           c.total,
           c.limite,
           c.abertas,
           pg_current_snapshot() as vista,
           pg_current_xact_id() as propria
      into ultima
      from public.visitas_contagem as c
     where c.origem = aqui
     order by c.id desc
     limit 1;

    if not found then
        contagem := public.assumir_contagem(novas);
        perform public.conferir_perda(novas);
        return contagem;
    end if;

    -- The one that wrote the entry has ended, since the lock was free.
    encerradas := ultima.abertas;
    if cardinality(encerradas) > 1 then
        encerradas := array(
            select x
              from unnest(encerradas) as x
             where x = ultima.propria
                or pg_visible_in_snapshot(x, ultima.vista)
        );
    end if;

    -- Usually nothing was changed by hand, and two looks at the index show it.
    insert into public.visitas_contagem as c (origem, id, total, limite, abertas)
    select aqui,
           ultima.id + 1,
           ultima.total + novas,
           pg_snapshot_xmax(ultima.vista),
           array(select pg_snapshot_xip(ultima.vista)) || ultima.propria
     where not exists (
               select
                 from public.visitas_ajustes as a
                where a.origem = aqui
                  and a.transacao >= ultima.limite
           )
       and not exists (
               select
                 from public.visitas_ajustes as a
                where a.origem = aqui
                  and a.transacao = any (encerradas)
           )
    returning c.id, c.total into entrada, contagem;

    if not found then
        -- A trigger that removes rows as they come. It may remove others (a table that keeps the
        -- newest thousand), but not these.
        removidas := exists (
            select
              from public.visitas_ajustes as a
             where a.origem = aqui
               and a.transacao = ultima.propria
               and (a.diferenca < 0 or a.diferenca is null)
        );

        -- What committed after the snapshot stays for the next fold: a reset must never be folded
        -- without the adjustments it drops.
        with dobrados as (
            delete from public.visitas_ajustes as a
             where a.origem = aqui
               and (a.transacao >= ultima.limite or a.transacao = any (encerradas))
               and (
                       a.transacao = ultima.propria
                    or pg_visible_in_snapshot(a.transacao, ultima.vista)
                   )
            returning a.id, a.diferenca
        ), zerada as (
            select max(d.id) as id
              from dobrados as d
             where d.diferenca is null
        )
        insert into public.visitas_contagem as c (origem, id, total, limite, abertas)
        select aqui,
               ultima.id + 1,
               case when z.id is null then ultima.total else 0 end
                   + novas
                   + (select coalesce(sum(d.diferenca), 0)
                        from dobrados as d
                       where d.id > coalesce(z.id, 0)),
               pg_snapshot_xmax(ultima.vista),
               array(select pg_snapshot_xip(ultima.vista)) || ultima.propria
          from zerada as z
        returning c.id, c.total into entrada, contagem;

        if removidas then
            perform public.conferir_perda(novas);
        end if;
    end if;

    -- Bounded work, seldom: exactly the entries since the last time.
    if entrada % 128 = 0 then
        delete from public.visitas_contagem as c
         where c.origem = aqui
           and c.id >= entrada - 128
           and c.id < entrada;
    end if;

    return contagem;
end
$$;
