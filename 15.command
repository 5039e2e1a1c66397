docker compose start cache
