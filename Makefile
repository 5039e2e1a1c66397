# The commands for people. `make` alone lists them.

# Fixed, because the recipes run programs from this folder.
export CARGO_TARGET_DIR = $(CURDIR)/target

.PHONY: help run test sweep check bench bench-quick bench-soak bench-ready chaos chaos-long chaos-ready e2e setup clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: # Install missing tools, if that is allowed
	@devstack/install.sh $(PACKAGES)

run: setup ## Serve on port 8000 with its own PostgreSQL and Redis
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

# Builds the bench and the service as `make run` does.
bench-ready:
	@devstack/install.sh wrk=wrk
	@cargo build --release --locked --quiet --bin visitas --bin bench --workspace

chaos: chaos-ready ## Break everything, eleven minutes, and write docs/faults.md
	@target/release/chaos all

chaos-long: chaos-ready ## Kill each part at a hundred random moments, restart replicas a hundred times, six minutes, and write docs/kills.md
	@target/release/chaos long

chaos-ready: setup
	@cargo build --release --locked --quiet --bin visitas --bin chaos --workspace

e2e: ## Test the Compose stack, also with outages; needs Docker
	@tests/e2e.sh

clean: ## Delete the build and the data of `make run`
	rm -rf target .devstack
