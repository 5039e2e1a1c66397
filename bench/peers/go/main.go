// A visit as a good engineer writes it in Go: net/http, pgx and go-redis. One statement, which is
// its own transaction, inserts the row and updates a counter row: an exact count.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"os"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
)

// One statement, so that the counter's lock is not held during a round trip.
const record = `WITH visit AS (INSERT INTO visitas DEFAULT VALUES)
	UPDATE contador SET total = total + 1 RETURNING total`

type stores struct {
	postgres *pgxpool.Pool
	redis    *redis.Client
}

type response struct {
	DBStatus    string `json:"db_status"`
	RedisStatus string `json:"redis_status"`
	Total       int64  `json:"total_registros_db"`
	Visits      int64  `json:"visitas_redis"`
}

func main() {
	postgres, err := pgxpool.New(context.Background(), fmt.Sprintf(
		"host=%s port=%s user=%s password=%s dbname=%s sslmode=disable pool_max_conns=%s",
		os.Getenv("DB_HOST"), os.Getenv("DB_PORT"), os.Getenv("DB_USER"),
		os.Getenv("DB_PASSWORD"), os.Getenv("DB_NAME"), os.Getenv("DB_SESSIONS")))
	if err != nil {
		log.Fatal(err)
	}
	visits := stores{postgres, redis.NewClient(&redis.Options{
		Addr: os.Getenv("REDIS_HOST") + ":" + os.Getenv("REDIS_PORT"),
	})}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", visits.visit)
	log.Fatal(http.ListenAndServe(os.Args[1], mux))
}

func (s stores) visit(w http.ResponseWriter, r *http.Request) {
	answer := response{DBStatus: "ok", RedisStatus: "ok"}
	err := s.postgres.QueryRow(r.Context(), record).Scan(&answer.Total)
	if err == nil {
		answer.Visits, err = s.redis.Incr(r.Context(), "visitas_home").Result()
	}
	if err != nil {
		http.Error(w, "unavailable", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(answer)
}
