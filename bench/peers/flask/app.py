"""The challenge's exercise, as a peer for the bench: Flask, psycopg2 and redis, and for each visit
a connection to Postgres, the table if it is missing, a row, a count and an increment."""

import os

import psycopg2
import redis
from flask import Flask, jsonify

app = Flask(__name__)
cache = redis.Redis(host=os.environ["REDIS_HOST"], port=int(os.environ["REDIS_PORT"]))


def connect():
    return psycopg2.connect(
        host=os.environ["DB_HOST"],
        port=os.environ["DB_PORT"],
        user=os.environ["DB_USER"],
        password=os.environ["DB_PASSWORD"],
        dbname=os.environ["DB_NAME"],
    )


@app.route("/")
def visit():
    answer = {"db_status": "ok", "redis_status": "ok"}
    connection = connect()
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(
                "CREATE TABLE IF NOT EXISTS visitas ("
                "id SERIAL PRIMARY KEY, data TIMESTAMPTZ NOT NULL DEFAULT now())"
            )
            cursor.execute("INSERT INTO visitas DEFAULT VALUES")
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM visitas")
            answer["total_registros_db"] = cursor.fetchone()[0]
    finally:
        connection.close()
    answer["visitas_redis"] = cache.incr("visitas_home")
    return jsonify(answer)
