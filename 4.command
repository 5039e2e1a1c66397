curl "http://localhost:8000/?[1-5]"
