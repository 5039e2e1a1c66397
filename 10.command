docker compose unpause db
