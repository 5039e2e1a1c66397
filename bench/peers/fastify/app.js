// A visit as a good engineer writes it with Fastify: postgres.js, which pipelines, and ioredis, in a
// cluster of one worker for each processor. One statement, which is its own transaction, inserts the
// row and updates a counter row: an exact count.
import cluster from "node:cluster";
import { availableParallelism } from "node:os";
import fastify from "fastify";
import Redis from "ioredis";
import postgres from "postgres";

const { DB_HOST, DB_PORT, DB_USER, DB_PASSWORD, DB_NAME, DB_SESSIONS } = process.env;
const { REDIS_HOST, REDIS_PORT } = process.env;
const workers = availableParallelism();
const [host, port] = process.argv[2].split(":");

// With it, Fastify compiles a serializer.
const visitSchema = {
  type: "object",
  properties: {
    db_status: { type: "string" },
    redis_status: { type: "string" },
    total_registros_db: { type: "integer" },
    visitas_redis: { type: "integer" },
  },
};

if (cluster.isPrimary) {
  for (let worker = 0; worker < workers; worker++) cluster.fork();
  cluster.on("exit", () => process.exit(1));
} else {
  await serve();
}

async function serve() {
  const sql = postgres({
    host: DB_HOST,
    port: Number(DB_PORT),
    username: DB_USER,
    password: DB_PASSWORD,
    database: DB_NAME,
    max: Math.max(1, Math.floor(DB_SESSIONS / workers)),
  });
  const redis = new Redis({
    host: REDIS_HOST,
    port: Number(REDIS_PORT),
    enableAutoPipelining: true,
  });
  const app = fastify();
  app.get("/", { schema: { response: { 200: visitSchema } } }, async () => {
    // One statement, so that the counter's lock is not held during a round trip.
    const [row] = await sql`
      WITH visit AS (INSERT INTO visitas DEFAULT VALUES)
      UPDATE contador SET total = total + 1 RETURNING total::float8`;
    return {
      db_status: "ok",
      redis_status: "ok",
      total_registros_db: row.total,
      visitas_redis: await redis.incr("visitas_home"),
    };
  });
  await app.listen({ host, port: Number(port), backlog: 4096 });
}
