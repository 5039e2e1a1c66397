# What a person types. `make` alone lists it.

# Programs are run from where they are built, whatever the environment says of that.
export CARGO_TARGET_DIR = $(CURDIR)/target

.PHONY: help run test sweep check bench bench-quick bench-soak bench-ready chaos chaos-long chaos-ready e2e setup clean

help: ## List what can be made
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: # Everything that is needed and missing, installed where that is allowed
	@devstack/install.sh $(PACKAGES)

run: setup ## Serve on port 8000 with a PostgreSQL and a Redis of its own
	@cargo build --release --locked --quiet --bin visitas --bin devstack --workspace
	@BIND_ADDR=$${BIND_ADDR:-127.0.0.1:8000} target/release/devstack run -- target/release/visitas

# What tests need beside the servers: each program with the package it is in.
test: PACKAGES = promtool=prometheus python3:prometheus_client=python3-prometheus-client
test: setup ## Check and test everything
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --locked --document-private-items
	cargo test --workspace --locked

sweep: PACKAGES = promtool=prometheus
sweep: setup ## Try 20 rates of failure against the alerts, a few minutes, and print when each fires
	SWEEP=whole cargo test --locked --test it sweep:: -- --nocapture

bench: bench-ready ## Measure everything, half an hour, and write bench/report.md
	@target/release/bench full

bench-quick: bench-ready ## Measure the essentials, two minutes
	@target/release/bench quick

bench-soak: bench-ready ## Watch memory at the peak, half an hour, and write bench/soak.md
	@target/release/bench soak

# The bench and what it measures, built as they are for `make run`.
bench-ready:
	@devstack/install.sh wrk=wrk
	@cargo build --release --locked --quiet --bin visitas --bin bench --workspace

chaos: chaos-ready ## Break everything, eleven minutes, and write docs/faults.md
	@target/release/chaos all

chaos-long: chaos-ready ## Kill each part at a hundred random moments, restart replicas as often, six minutes, and write docs/kills.md
	@target/release/chaos long

chaos-ready: setup
	@cargo build --release --locked --quiet --bin visitas --bin chaos --workspace

e2e: ## Run Compose for real, and break it; needs Docker
	@tests/e2e.sh

clean: ## Forget what was built and what the servers of `make run` have stored
	rm -rf target .devstack
