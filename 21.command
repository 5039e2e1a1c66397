docker compose exec -T db psql -U usuario -d desafio3db -c "select count(*) from visitas"
