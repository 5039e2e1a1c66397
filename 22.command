docker compose exec -T db psql -U usuario -d desafio3db -c "\sf registrar_visitas"
