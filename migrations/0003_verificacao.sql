-- A visit counts only if its row is in the table, and a count holds only in the database where
-- it was kept.
--
--   1. registrar_visitas fails with VS003 if the database did not keep a row for each visit.
--   2. Every entry of visitas_contagem and every row of visitas_ajustes names where it was
--      written (origem). Transaction ids mean nothing in another database, so rows that a dump
--      or a replication brought here are told apart from this database's own.
--   3. estado_da_contagem reads the total and says whether the count can be trusted.
--
-- Each database counts with what it wrote itself since the server was started. Three cases:
--   - the server was restarted: the last entry is adopted, and what was not folded is folded.
--   - no entry is of this database, as in a copy of another one: the rows are counted.
--   - entries from here next to entries or rows from elsewhere: somebody loaded data into a
--     database that already counted. A recount is due; until then the total is that of this
--     database's own entries.

set transaction isolation level read committed;

-- The locks in the order that the recorder takes them. Visits wait for the first one, so none is
-- waited for here: a session that holds another makes this migration fail and be tried again.
select public.travar_contagem();
lock table public.visitas in share row exclusive mode nowait;
lock table public.visitas_contagem, public.visitas_ajustes in access exclusive mode nowait;

-- Where and since when this is: cluster and database before the @, start of the server behind
-- it. The cluster's identifier changes with initdb and survives restarts, standbys and backups,
-- exactly like transaction ids; the start tells a server from one that runs on a copy of its
-- files. As text it sorts by time within one database.
create function public.esta_origem()
returns text
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    sistema text := '';
begin
    if has_function_privilege('pg_control_system()', 'execute') then
        select c.system_identifier
          into sistema
          from pg_control_system() as c;
    end if;
    return format(
        '%s/%s@%s',
        sistema,
        (select d.oid from pg_database as d where d.datname = current_database()),
        to_char(pg_postmaster_start_time() at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US')
    );
end
$$;

-- The counts so far are taken again at the end of this migration.
delete from public.visitas_contagem;
delete from public.visitas_ajustes;

alter table public.visitas_contagem
    drop constraint visitas_contagem_pkey,
    drop column servidor,
    alter column limite drop default,
    alter column abertas drop default,
    add column origem text collate "C" not null,
    add primary key (origem, id);

comment on table public.visitas_contagem is
    'count(*) of visitas after each batch; of one origem the highest id is current. Kept true by the count''s lock.';
comment on column public.visitas_contagem.limite is
    'adjustments of earlier transactions are folded, except those of abertas';
comment on column public.visitas_contagem.abertas is
    'transactions before limite that were open: their adjustments are not folded yet';
comment on column public.visitas_contagem.origem is
    'where this entry was written, as esta_origem() names it';

alter table public.visitas_ajustes
    drop constraint visitas_ajustes_pkey,
    add column origem text collate "C" not null default public.esta_origem(),
    add primary key (origem, transacao, id);

comment on column public.visitas_ajustes.origem is
    'where the change was made, as esta_origem() names it';

-- Records one visit for each moment, in that order, and returns the exact count after them.
-- The order of the statements is what keeps it exact:
--   1. the lock, in a statement of its own: later snapshots see all earlier batches;
--   2. the visits: from here on no TRUNCATE can come between, so every reset that the fold
--      sees is older than these visits;
--   3. the check that the table has them, deferred triggers included;
--   4. the last entry, and the snapshot of this batch: the total will be its count(*);
--   5. the fold: deletes the adjustments that this snapshot sees, and writes the total.
-- Plans outlive the empty tables they are made for. So enable_seqscan is off, and what bounds
-- a scan is a variable: only then is it sure to be the index's condition, not a filter.
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
           array(
               select x
                 from unnest(c.abertas) as x
                where x = pg_current_xact_id()
                   or pg_visible_in_snapshot(x, pg_current_snapshot())
           ) as encerradas,
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
                  and a.transacao = any (ultima.encerradas)
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
               and (a.transacao >= ultima.limite or a.transacao = any (ultima.encerradas))
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

-- Fails the batch: the database did not keep a row of public.visitas for each visit. The detail
-- names everything that could have removed one.
create function public.recusar_perda(esperadas bigint)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception 'public.visitas did not keep a row for each of % visits', esperadas
        using errcode = 'VS003',
              detail = coalesce(
                  'On the table: ' || (
                      select string_agg(o.nome, ', ' order by o.nome)
                        from (
                            select format('trigger %I', t.tgname) as nome
                              from pg_trigger as t
                             where t.tgrelid = 'public.visitas'::regclass
                               and not t.tgisinternal
                               and t.tgfoid <> 'public.anotar_ajuste()'::regprocedure
                            union all
                            select format('rule %I', r.rulename)
                              from pg_rewrite as r
                             where r.ev_class = 'public.visitas'::regclass
                        ) as o
                  ) || '.',
                  'No trigger or rule is on the table any more.'
              ),
              hint = 'Drop or disable the trigger or rule that drops or redirects rows.';
end
$$;

-- Fails the batch unless the table has as many rows of it as there are visits, where triggers
-- may have removed some after they were inserted. The rows are among the ids that the sequence
-- gave last, or among the highest, and have the batch's xmin, as its ledger entry has.
create function public.conferir_perda(esperadas bigint)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
    lote xid;
    ultimo_id bigint := pg_sequence_last_value(pg_get_serial_sequence('public.visitas', 'id')::regclass);
begin
    select c.xmin
      into lote
      from public.visitas_contagem as c
     where c.origem = public.esta_origem()
     order by c.id desc
     limit 1;

    if esperadas > (
           select count(*)
             from public.visitas as v
            where v.id > ultimo_id - esperadas - 10000
              and v.id <= ultimo_id
              and v.xmin = lote
       )
       and esperadas > (
           select count(*)
             from (
                 select v.xmin as criadora
                   from public.visitas as v
                  order by v.id desc
                  limit esperadas + 1000
             ) as v
            where v.criadora = lote
       )
    then
        perform public.recusar_perda(esperadas);
    end if;
end
$$;

-- The entry to go on from where none was written since the server was started: the last one of
-- this cluster and database. Null in a copy of another database.
create function public.base_da_contagem(aqui text)
returns public.visitas_contagem
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select c
      from public.visitas_contagem as c
     where split_part(c.origem, '@', 1) = split_part(aqui, '@', 1)
     order by c.origem desc, c.id desc
     limit 1
$$;

-- What the base lacks: adjustments of this cluster and database that were not folded by then. One
-- that was, and is there all the same, was loaded on top. To be inlined, so without a path of its
-- own.
create function public.faltas_da_base(base public.visitas_contagem, aqui text)
returns setof public.visitas_ajustes
language sql
stable
as $$
    select a.*
      from public.visitas_ajustes as a
     where pg_catalog.split_part(a.origem, '@', 1) operator(pg_catalog.=) pg_catalog.split_part(aqui, '@', 1)
       and (
               a.transacao operator(pg_catalog.>=) (base).limite
            or a.transacao operator(pg_catalog.=) any ((base).abertas)
           )
$$;

-- The first entry since the server was started, or since this database was copied: adopts the
-- last entry and what it lacks, in one statement, so one snapshot. In a copy of another database
-- the rows are counted: how much of it arrived is not known. Needs the count's lock.
create function public.assumir_contagem(novas bigint)
returns bigint
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    aqui constant text collate "C" := public.esta_origem();
    base constant public.visitas_contagem := public.base_da_contagem(aqui);
    contagem bigint;
begin
    if base is null then
        return public.refazer_contagem();
    end if;

    with dobrados as (
        delete from public.visitas_ajustes as a
         using public.faltas_da_base(base, aqui) as f
         where a.origem = f.origem
           and a.transacao = f.transacao
           and a.id = f.id
        returning a.id, a.diferenca
    ), zerada as (
        select max(d.id) as id
          from dobrados as d
         where d.diferenca is null
    ), antigas as (
        delete from public.visitas_contagem as c
         where c.origem = base.origem
    )
    insert into public.visitas_contagem as c (origem, id, total, limite, abertas)
    select aqui,
           1,
           case when z.id is null then base.total else 0 end
               + novas
               + (select coalesce(sum(d.diferenca), 0)
                    from dobrados as d
                   where d.id > coalesce(z.id, 0)),
           pg_snapshot_xmax(pg_current_snapshot()),
           array(select pg_snapshot_xip(pg_current_snapshot())) || pg_current_xact_id()
      from zerada as z
    returning c.total into contagem;
    return contagem;
end
$$;

-- Makes the first entry where there is none, and takes as long as that takes: a visit would have
-- to within its own time. Returns whether there was one.
create function public.adotar_contagem()
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    perform public.travar_contagem();
    if exists (
        select
          from public.visitas_contagem as c
         where c.origem = public.esta_origem()
    ) then
        return true;
    end if;
    perform public.assumir_contagem(0);
    return false;
end
$$;

-- What registrar_visitas does for one visit, what a commit would do, and then undoes all of it
-- by raising VS001: a database that answers with VS001 can record visits. One statement, so that
-- the count's lock is never held between two round trips.
create or replace function public.ensaiar_registro()
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    perform public.registrar_visitas(array[clock_timestamp()]);
    raise exception 'a visit could be recorded'
        using errcode = 'VS001';
end
$$;

-- The exact count of the statement's snapshot, without the lock: a fold moves adjustments into
-- the ledger atomically, so one snapshot sees each of them in exactly one place.
create or replace function public.total_visitas()
returns bigint
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
    aqui constant text collate "C" := public.esta_origem();
    ultima record;
    base public.visitas_contagem;
begin
    select c.total,
           c.limite,
           array(
               select x
                 from unnest(c.abertas) as x
                where x = pg_current_xact_id_if_assigned()
                   or pg_visible_in_snapshot(x, pg_current_snapshot())
           ) as encerradas
      into ultima
      from public.visitas_contagem as c
     where c.origem = aqui
     order by c.id desc
     limit 1;

    if found then
        return (
            with pendentes as materialized (
                select a.id, a.diferenca
                  from public.visitas_ajustes as a
                 where a.origem = aqui
                   and (a.transacao >= ultima.limite or a.transacao = any (ultima.encerradas))
            ), zerada as (
                select max(p.id) as id
                  from pendentes as p
                 where p.diferenca is null
            )
            select case when z.id is null then ultima.total else 0 end
                       + (select coalesce(sum(p.diferenca), 0)
                            from pendentes as p
                           where p.id > coalesce(z.id, 0))
              from zerada as z
        );
    end if;

    -- As assumir_contagem will adopt it.
    base := public.base_da_contagem(aqui);
    if base is null then
        return (select count(*) from public.visitas);
    end if;
    return (
        with pendentes as materialized (
            select f.id, f.diferenca
              from public.faltas_da_base(base, aqui) as f
        ), zerada as (
            select max(p.id) as id
              from pendentes as p
             where p.diferenca is null
        )
        select case when z.id is null then base.total else 0 end
                   + (select coalesce(sum(p.diferenca), 0)
                        from pendentes as p
                       where p.id > coalesce(z.id, 0))
          from zerada as z
    );
end
$$;

-- The total, and whether a recount is due: something is in the ledger or among the adjustments
-- that this database did not write, so rows of visitas may have come without being counted, or
-- may have been counted twice. One statement, so one snapshot. To look for adjustments that were
-- folded long ago takes a look at each that is open or dead, so that is for seldom.
create function public.estado_da_contagem(
    completo boolean,
    out total bigint,
    out recontagem boolean
)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
    aqui constant text collate "C" := public.esta_origem();
    ultima record;
begin
    if 3 > (
        select count(*)
          from pg_trigger as t
         where t.tgrelid = 'public.visitas'::regclass
           and t.tgfoid = 'public.anotar_ajuste()'::regprocedure
    ) then
        raise exception 'a trigger that keeps the count of public.visitas is missing'
            using errcode = 'undefined_object';
    end if;

    total := public.total_visitas();

    select c.limite, c.abertas
      into ultima
      from public.visitas_contagem as c
     where c.origem = aqui
     order by c.id desc
     limit 1;
    recontagem := found and (
        exists (select from public.visitas_contagem as c where c.origem < aqui)
        or exists (select from public.visitas_contagem as c where c.origem > aqui)
        or exists (select from public.visitas_ajustes as a where a.origem < aqui)
        or exists (select from public.visitas_ajustes as a where a.origem > aqui)
    );
    -- Folded, and back: this database's own data was loaded into it again.
    if found and completo and not recontagem then
        recontagem := exists (
            select
              from public.visitas_ajustes as a
             where a.origem = aqui
               and a.transacao < ultima.limite
               and a.transacao <> all (ultima.abertas)
        );
    end if;
end
$$;

-- Replaces the ledger by one entry with the rows that are there, and drops the adjustments
-- that those rows already show: one statement, so one snapshot. Needs the count's lock.
create or replace function public.refazer_contagem()
returns bigint
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set enable_seqscan = on
as $$
declare
    contagem bigint;
begin
    with contados as (
        delete from public.visitas_ajustes
    ), antigas as (
        delete from public.visitas_contagem
        returning id
    )
    insert into public.visitas_contagem as c (origem, id, total, limite, abertas)
    select public.esta_origem(),
           coalesce((select max(id) from antigas), 0) + 1,
           (select count(*) from public.visitas),
           pg_snapshot_xmax(pg_current_snapshot()),
           array(select pg_snapshot_xip(pg_current_snapshot())) || pg_current_xact_id()
    returning c.total into contagem;
    return contagem;
end
$$;

-- Rows that a trigger adds while visits are being recorded are noted like any other: they are
-- not among the visits that the recorder counts itself.
create or replace trigger visitas_anota_insercao
    after insert on public.visitas
    referencing new table as inseridas
    for each statement
    when (
        pg_catalog.current_setting('visitas.registrador', true) is distinct from 'sim'
        or pg_catalog.pg_trigger_depth() > 0
    )
    execute function public.anotar_ajuste();

revoke all
    on function
        public.esta_origem(),
        public.recusar_perda(bigint),
        public.base_da_contagem(text),
        public.faltas_da_base(public.visitas_contagem, text),
        public.assumir_contagem(bigint),
        public.adotar_contagem(),
        public.conferir_perda(bigint),
        public.estado_da_contagem(boolean)
  from public;

select public.refazer_contagem();

-- A table that keeps no visits must stop the migration, not each visit.
do $$
begin
    perform public.ensaiar_registro();
exception
    when sqlstate 'VS001' then
        null;
end;
$$;
