docker compose --profile obs up -d --build --wait
