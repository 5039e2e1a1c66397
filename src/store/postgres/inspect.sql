-- What an attempt to migrate would meet. It takes no lock on a table, so that it can be repeated often.
with nome (tabela, coluna, tipo) as (
    -- Columns that a table of this program has in every version.
    values ('visitas_contagem', 'total', 'bigint'),
           ('visitas_contagem', 'limite', 'xid8'),
           ('visitas_contagem', 'abertas', 'xid8[]'),
           ('visitas_ajustes', 'transacao', 'xid8'),
           ('visitas_ajustes', 'diferenca', 'bigint'),
           ('visitas_migracoes', 'version', 'bigint'),
           ('visitas_migracoes', 'description', 'text'),
           ('visitas_migracoes', 'installed_on', 'timestamptz'),
           ('visitas_migracoes', 'success', 'boolean'),
           ('visitas_migracoes', 'checksum', 'bytea'),
           ('visitas_migracoes', 'execution_time', 'bigint')
), relacao as (
    select c.oid, c.xmin, c.relname, c.relkind, c.relowner
      from pg_class as c
     where c.relnamespace = to_regnamespace('public')
       and c.relname in ('visitas', 'visitas_contagem', 'visitas_ajustes', 'visitas_migracoes')
), alheia as (
    select r.oid
      from relacao as r
     where r.relname <> 'visitas'
       and (
               r.relkind <> 'r'
            or exists (
                select
                  from nome as n
                 where n.tabela = r.relname
                   and not exists (
                       select
                         from pg_attribute as a
                        where a.attrelid = r.oid
                          and a.attname = n.coluna
                          and a.atttypid = n.tipo::regtype
                          and not a.attisdropped
                   )
               )
           )
), alheio as (
    select 'pg_class'::regclass as classe,
           a.oid
      from alheia as a
    union all
    -- The primary keys that 0003 replaces by their names.
    select 'pg_class'::regclass,
           c.oid
      from pg_class as c
      left join pg_index as i
        on i.indexrelid = c.oid
     where c.relnamespace = to_regnamespace('public')
       and c.relname in ('visitas_contagem_pkey', 'visitas_ajustes_pkey')
       and not exists (
           select
             from relacao as r
            where r.oid = i.indrelid
              and r.relname || '_pkey' = c.relname
              and r.oid not in (select a.oid from alheia as a)
       )
    union all
    -- A table has a type of its name, so a type of that name is in the way, too.
    select 'pg_type'::regclass,
           t.oid
      from pg_type as t
     where t.typnamespace = to_regnamespace('public')
       and t.typname in ('visitas', 'visitas_contagem', 'visitas_ajustes', 'visitas_migracoes')
       and t.typrelid = 0
       and t.typcategory <> 'A'
    union all
    select 'pg_proc'::regclass,
           p.oid
      from unnest(array[
               'travar_contagem()', 'registrar_visitas(timestamptz[])', 'recusar_perda(bigint)',
               'conferir_perda(bigint)', 'base_da_contagem(text)', 'assumir_contagem(bigint)',
               'adotar_contagem()', 'ensaiar_registro()', 'total_visitas()',
               'estado_da_contagem(boolean)', 'refazer_contagem()', 'recontar_visitas()',
               'avancar_sequencia()', 'esta_origem()', 'anotar_ajuste()'
           ]) as f (assinatura)
      join pg_proc as p
        on p.oid = to_regprocedure('public.' || f.assinatura)
     -- Each function of this program fixes this path.
     where not coalesce('search_path=pg_catalog, pg_temp' = any (p.proconfig), false)
    union all
    select 'pg_trigger'::regclass,
           t.oid
      from relacao as r
      join pg_trigger as t
        on t.tgrelid = r.oid
       and t.tgname in (
               'visitas_anota_insercao', 'visitas_anota_remocao', 'visitas_anota_truncamento'
           )
       and t.tgfoid is distinct from to_regprocedure('public.anotar_ajuste()')
     where r.relname = 'visitas'
)
select (
           select string_agg(d.nome, ', ' order by d.nome)
             from alheio as a
            cross join pg_describe_object(a.classe, a.oid, 0) as d (nome)
       ) as foreign,
       case
           when not has_schema_privilege(to_regnamespace('public'), 'create') then
               format('role %I has no CREATE on schema public', current_user)
           else (
               select format(
                          'role %I does not own table %s, which role %I owns',
                          current_user, r.oid::regclass, pg_get_userbyid(r.relowner)
                      )
                 from relacao as r
                where not pg_has_role(r.relowner, 'usage')
                order by r.relname
                limit 1
           )
       end as missing_right,
       concat_ws(
           ' ',
           pg_postmaster_start_time(),
           pg_is_in_recovery(),
           to_regnamespace('public')::oid,
           (select d.oid from pg_database as d where d.datname = current_database()),
           (select string_agg(concat_ws(' ', r.oid, r.xmin), ' ' order by r.oid) from relacao as r)
       ) as state
