curl http://localhost:8000
