docker compose exec -d db psql -U usuario -d desafio3db -c 'do $$ begin for i in 1..100 loop lock table visitas in exclusive mode; perform pg_sleep(0.55); commit; end loop; end $$'
