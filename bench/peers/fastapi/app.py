"""A visit as a good engineer writes it with FastAPI: asyncpg and redis-py, served by uvicorn with
uvloop, httptools and hiredis. One statement, which is its own transaction, inserts the row and
updates a counter row: an exact count."""

import os
from contextlib import asynccontextmanager

import asyncpg
import redis.asyncio as redis
from fastapi import FastAPI
from fastapi.responses import JSONResponse

# One statement, so that the counter's lock is not held during a round trip.
RECORD = """WITH visit AS (INSERT INTO visitas DEFAULT VALUES)
    UPDATE contador SET total = total + 1 RETURNING total"""
WORKERS = int(os.environ["WEB_CONCURRENCY"])
# Of each worker.
SESSIONS = max(1, int(os.environ["DB_SESSIONS"]) // WORKERS)


class Session(asyncpg.Connection):
    """Nothing here changes a session's state, so it need not be reset after each visit."""

    def get_reset_query(self):
        return ""


@asynccontextmanager
async def lifespan(app):
    app.state.cache = redis.Redis.from_pool(
        redis.BlockingConnectionPool(
            host=os.environ["REDIS_HOST"],
            port=int(os.environ["REDIS_PORT"]),
            max_connections=8,
            timeout=None,
        )
    )
    async with asyncpg.create_pool(
        host=os.environ["DB_HOST"],
        port=os.environ["DB_PORT"],
        user=os.environ["DB_USER"],
        password=os.environ["DB_PASSWORD"],
        database=os.environ["DB_NAME"],
        min_size=SESSIONS,
        max_size=SESSIONS,
        connection_class=Session,
    ) as app.state.postgres:
        yield
    await app.state.cache.aclose()


app = FastAPI(lifespan=lifespan, openapi_url=None)


@app.get("/")
async def visit():
    total = await app.state.postgres.fetchval(RECORD)
    return JSONResponse(
        {
            "db_status": "ok",
            "redis_status": "ok",
            "total_registros_db": total,
            "visitas_redis": await app.state.cache.incr("visitas_home"),
        }
    )
