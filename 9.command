docker compose logs --no-log-prefix --since 2m web
