docker compose exec -T web visitas reconcile
