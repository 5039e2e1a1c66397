-- What the session's role lacks of the rights that docs/connecting.md lists, in one line; no row if it
-- lacks nothing. $1: whether it needs those of `visitas recount`, too.
with tabela (nome, direito) as (
    values ('visitas_migracoes', 'SELECT'),
           ('visitas', 'SELECT'),
           ('visitas', 'INSERT'),
           ('visitas_contagem', 'SELECT'),
           ('visitas_contagem', 'INSERT'),
           ('visitas_contagem', 'DELETE'),
           ('visitas_ajustes', 'SELECT'),
           ('visitas_ajustes', 'DELETE')
), falta as (
    select 1 as ordem,
           'USAGE on schema public' as direito,
           '' as objeto
      from pg_namespace as n
     where n.nspname = 'public'
       and not has_schema_privilege(n.oid, 'usage')
    union all
    select 2,
           string_agg(t.direito, ', ' order by t.direito desc) || ' on ' || t.nome,
           t.nome
      from tabela as t
      join pg_class as c
        on c.relname = t.nome
      join pg_namespace as n
        on n.oid = c.relnamespace
       and n.nspname = 'public'
     where not has_table_privilege(c.oid, t.direito)
     group by t.nome
    union all
    select 3,
           'UPDATE or DELETE on visitas',
           ''
      from pg_class as c
      join pg_namespace as n
        on n.oid = c.relnamespace
       and n.nspname = 'public'
     where $1
       and c.relname = 'visitas'
       and not has_table_privilege(c.oid, 'update, delete, truncate')
    union all
    select 4,
           'USAGE, UPDATE on sequence ' || s.relname,
           s.relname
      from pg_class as c
      join pg_namespace as n
        on n.oid = c.relnamespace
       and n.nspname = 'public'
      join pg_depend as d
        on d.classid = 'pg_class'::regclass
       and d.refclassid = 'pg_class'::regclass
       and d.refobjid = c.oid
       and d.deptype = 'i'
      join pg_class as s
        on s.oid = d.objid
       and s.relkind = 'S'
     where c.relname = 'visitas'
       and not (has_sequence_privilege(s.oid, 'usage') and has_sequence_privilege(s.oid, 'update'))
    union all
    select 5,
           'EXECUTE on function ' || p.proname,
           p.proname
      from pg_proc as p
      join pg_namespace as n
        on n.oid = p.pronamespace
       and n.nspname = 'public'
     where p.proname in (
               'travar_contagem', 'registrar_visitas', 'recusar_perda', 'conferir_perda',
               'base_da_contagem', 'faltas_da_base', 'assumir_contagem', 'adotar_contagem',
               'ensaiar_registro', 'total_visitas', 'estado_da_contagem', 'refazer_contagem',
               'recontar_visitas', 'avancar_sequencia', 'esta_origem'
           )
       and not has_function_privilege(p.oid, 'execute')
)
select format(
           'role %I has no %s',
           current_user,
           string_agg(f.direito, ', no ' order by f.ordem, f.objeto)
       )
  from falta as f
having count(*) > 0
