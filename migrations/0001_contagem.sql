-- The exact count of public.visitas at a cost that does not depend on its size.
--
--   visitas_contagem  the count after each batch of visits, written only under the count's lock
--   visitas_ajustes   what others than the recorder did to visitas since, written by triggers
--
-- count = last entry of visitas_contagem + what visitas_ajustes holds, in any one snapshot.
--
-- Every name is qualified and every function fixes its search_path: a session's own cannot
-- mislead them. The role that runs these migrations is the one that records visits; others
-- need privileges on visitas alone. 0002 makes or adopts visitas itself and installs the
-- triggers; until then nothing here is called.

-- Whatever the session's default, a statement here must see what its predecessors waited for.
set transaction isolation level read committed;

-- One entry a batch. Ids have no gaps: the next is the last committed one plus one, under the
-- count's lock, so a batch that rolls back leaves its id, and the pruning due at that id, to
-- the next. Only the last entry counts: it is found from the high end of the primary key, so
-- entries that are dead but still visible to an old snapshot cost nothing.
create table public.visitas_contagem (
    id bigint primary key,
    total bigint not null,
    -- Which adjustments this entry may lack: those of transactions from limite on, and of the
    -- ones before it that were open. All others are folded or rolled back, and need not be
    -- looked at again. The numbers are those of the server that was started at that moment:
    -- after a restart, or in a restored dump, the next fold looks at everything.
    limite xid8 not null default '0',
    abertas xid8[] not null default '{}',
    servidor timestamptz not null default '-infinity'
)
-- A truncation's exclusive lock would stop visits for the sake of a few pages.
with (vacuum_truncate = false);

comment on table public.visitas_contagem is
    'count(*) of visitas after each batch; the highest id is current. Kept true by the count''s lock.';

-- One row for each manual statement: the rows it added or removed, or null for a TRUNCATE,
-- which drops everything counted before it. Rows are only ever added by triggers and removed
-- by the transaction that adds them to visitas_contagem.
-- The ids of a reset and of other changes stand in the order of their effects, since TRUNCATE
-- excludes every other writer until it ends (so the sequence must not cache values).
-- transacao leads the key so that a fold visits neither the dead rows of earlier ones nor the
-- rows of open transactions.
create table public.visitas_ajustes (
    transacao xid8 not null default pg_catalog.pg_current_xact_id(),
    id bigint generated always as identity (cache 1),
    diferenca bigint,
    primary key (transacao, id)
)
with (vacuum_truncate = false);

comment on table public.visitas_ajustes is
    'manual changes to visitas that no batch has folded yet; a null diferenca is a TRUNCATE. Kept true by the triggers of visitas.';

-- The count's lock, until the transaction ends. Whoever holds it is the only one to fold and
-- to write visitas_contagem. It is always taken before any lock on visitas: no deadlock.
-- Under repeatable read the statements that follow would not see what the lock waited for.
create function public.travar_contagem()
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        raise exception 'the count of visitas needs read committed, not %',
            current_setting('transaction_isolation')
            using errcode = 'VS002';
    end if;
    perform pg_advisory_xact_lock(33329991663247731);  -- 'visitas' in ASCII
end
$$;

-- Records one visit for each moment, in that order, and returns the exact count after them.
-- The order of the statements is what keeps it exact:
--   1. the lock, in a statement of its own: later snapshots see all earlier batches;
--   2. the visits: from here on no TRUNCATE can come between, so every reset that the fold
--      sees is older than these visits;
--   3. the last entry, and the snapshot of this batch: the total will be its count(*);
--   4. the fold: deletes the adjustments that this snapshot sees, and writes the total.
-- Plans outlive the empty tables they are made for. So enable_seqscan is off, and what bounds
-- a scan is a variable: only then is it sure to be the index's condition, not a filter.
create function public.registrar_visitas(chegadas timestamptz[])
returns bigint
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
    marca text;
    novas bigint;
    ultima record;
    entrada bigint;
    contagem bigint;
begin
    perform public.travar_contagem();

    -- The trigger on INSERT leaves statements alone that run under this setting.
    marca := set_config('visitas.registrador', 'sim', true);
    insert into public.visitas (data)
    select unnest(chegadas);
    get diagnostics novas = row_count;
    marca := set_config('visitas.registrador', 'nao', true);

    select c.id,
           c.total,
           c.servidor <> pg_postmaster_start_time() as de_outro_servidor,
           case when c.servidor = pg_postmaster_start_time() then c.limite else '0' end as limite,
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
     order by c.id desc
     limit 1;

    -- Someone emptied the ledger: counting is slow, but never wrong.
    if not found then
        return public.refazer_contagem();
    end if;

    -- Usually nobody has changed anything by hand, and two looks at the index show it.
    insert into public.visitas_contagem as c (id, total, limite, abertas, servidor)
    select ultima.id + 1,
           ultima.total + novas,
           pg_snapshot_xmax(ultima.vista),
           array(select pg_snapshot_xip(ultima.vista)) || ultima.propria,
           pg_postmaster_start_time()
     where not exists (
               select
                 from public.visitas_ajustes as a
                where a.transacao >= ultima.limite
           )
       and not exists (
               select
                 from public.visitas_ajustes as a
                where a.transacao = any (ultima.encerradas)
           )
    returning c.id, c.total into entrada, contagem;

    -- What committed after the snapshot stays for the next fold: a reset must never be folded
    -- without the adjustments it drops.
    if not found then
        with dobrados as (
            delete from public.visitas_ajustes as a
             where (a.transacao >= ultima.limite or a.transacao = any (ultima.encerradas))
               and (
                       a.transacao = ultima.propria
                    or pg_visible_in_snapshot(a.transacao, ultima.vista)
                    or ultima.de_outro_servidor
                   )
            returning a.id, a.diferenca
        ), zerada as (
            select max(d.id) as id
              from dobrados as d
             where d.diferenca is null
        )
        insert into public.visitas_contagem as c (id, total, limite, abertas, servidor)
        select ultima.id + 1,
               case when z.id is null then ultima.total else 0 end
                   + novas
                   + (select coalesce(sum(d.diferenca), 0)
                        from dobrados as d
                       where d.id > coalesce(z.id, 0)),
               pg_snapshot_xmax(ultima.vista),
               array(select pg_snapshot_xip(ultima.vista)) || ultima.propria,
               pg_postmaster_start_time()
          from zerada as z
        returning c.id, c.total into entrada, contagem;
    end if;

    -- Bounded work, seldom: exactly the entries since the last time.
    if entrada % 128 = 0 then
        delete from public.visitas_contagem as c
         where c.id >= entrada - 128
           and c.id < entrada;
    end if;

    return contagem;
end
$$;

-- What registrar_visitas does for one visit, and then undoes all of it by raising VS001: a
-- database that answers with VS001 can record visits. One statement, so that the count's lock
-- is never held between two round trips.
create function public.ensaiar_registro()
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
create function public.total_visitas()
returns bigint
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
    ultima record;
begin
    select c.total,
           case when c.servidor = pg_postmaster_start_time() then c.limite else '0' end as limite,
           array(
               select x
                 from unnest(c.abertas) as x
                where x = pg_current_xact_id_if_assigned()
                   or pg_visible_in_snapshot(x, pg_current_snapshot())
           ) as encerradas
      into ultima
      from public.visitas_contagem as c
     order by c.id desc
     limit 1;

    if not found then
        return (select count(*) from public.visitas);
    end if;

    return (
        with pendentes as materialized (
            select a.id, a.diferenca
              from public.visitas_ajustes as a
             where a.transacao >= ultima.limite
                or a.transacao = any (ultima.encerradas)
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
end
$$;

-- Replaces the ledger by one entry with the rows that are there, and drops the adjustments
-- that those rows already show: one statement, so one snapshot. Needs the count's lock.
create function public.refazer_contagem()
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
    insert into public.visitas_contagem as c (id, total, limite, abertas, servidor)
    select coalesce((select max(id) from antigas), 0) + 1,
           (select count(*) from public.visitas),
           pg_snapshot_xmax(pg_current_snapshot()),
           array(select pg_snapshot_xip(pg_current_snapshot())) || pg_current_xact_id(),
           pg_postmaster_start_time()
    returning c.total into contagem;
    return contagem;
end
$$;

-- Mends a count that was led astray (triggers disabled, session_replication_role = replica).
-- Waits for every writer, those whom no trigger watches included, and keeps new ones out; the
-- session's lock_timeout bounds the wait.
create function public.recontar_visitas(out antes bigint, out depois bigint)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    perform public.travar_contagem();
    lock table public.visitas in share mode;
    antes := public.total_visitas();
    depois := public.refazer_contagem();
end
$$;

-- To be called when recording failed with 23505, an id written by hand: moves the sequence
-- past the highest id, and never back. Near ids are passed by nextval, which cannot go back
-- however many others call it meanwhile; far ones by setval, which could only if ten thousand
-- ids were drawn between two expressions here. Ids of which the sequence will never come near
-- (2^62) are left where they are: past the highest bigint there is nothing.
create function public.avancar_sequencia()
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
    sequencia constant regclass := pg_get_serial_sequence('public.visitas', 'id');
    maior bigint;
    atual bigint;
begin
    perform public.travar_contagem();

    select v.id
      into maior
      from public.visitas as v
     where v.id < 4611686018427387904
     order by v.id desc
     limit 1;

    atual := nextval(sequencia);
    while atual < maior loop
        if maior - atual > 10000 then
            atual := setval(sequencia, maior);
        else
            atual := nextval(sequencia);
        end if;
    end loop;
end
$$;

-- Writes one adjustment for a manual statement. Security definer: whoever may change visitas
-- need not be able to write here. It runs inside the statement's transaction, so it commits or
-- rolls back with the rows; it only inserts, so it waits for nobody and nobody waits for it.
-- An UPDATE has no trigger: it leaves as many rows as it found, and those that an ON CONFLICT
-- or a MERGE inserts or deletes arrive by the other two.
create function public.anotar_ajuste()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    case tg_op
        when 'INSERT' then
            insert into public.visitas_ajustes (diferenca)
            select count(*)
              from inseridas
            having count(*) > 0;
        when 'DELETE' then
            insert into public.visitas_ajustes (diferenca)
            select -count(*)
              from removidas
            having count(*) > 0;
        when 'TRUNCATE' then
            insert into public.visitas_ajustes (diferenca)
            values (null);
    end case;
    return null;
end
$$;

-- A role with privileges on visitas alone must be able neither to forge the count nor to hang
-- anotar_ajuste on a table of its own. Triggers fire without this privilege.
revoke all
    on function
        public.travar_contagem(),
        public.registrar_visitas(timestamptz[]),
        public.ensaiar_registro(),
        public.total_visitas(),
        public.refazer_contagem(),
        public.recontar_visitas(),
        public.avancar_sequencia(),
        public.anotar_ajuste()
  from public;
