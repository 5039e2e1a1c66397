docker compose exec -T db psql -U usuario -d desafio3db -c "delete from visitas where id in (select id from visitas order by id limit 3)"
