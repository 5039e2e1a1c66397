docker compose pause db
