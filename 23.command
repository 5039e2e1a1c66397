docker compose --profile obs down -v
