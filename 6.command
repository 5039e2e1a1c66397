curl -i http://localhost:8000
