# What a person types. `make` alone lists it.

.PHONY: help run test check bench e2e setup clean

help: ## List what can be made
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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

e2e: ## Run Compose for real, and break it; needs Docker
	@tests/e2e.sh

clean: ## Forget what was built and what the servers of `make run` have stored
	rm -rf target .devstack
