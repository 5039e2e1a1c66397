docker compose stop cache
