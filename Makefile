# The commands for people. `make` alone lists them.

# Fixed, because the recipes run programs from this folder.
export CARGO_TARGET_DIR = $(CURDIR)/target

.PHONY: help run check map test api faults sweep compat compat-ends browser bench bench-quick bench-far bench-peers bench-soak bench-ready chaos chaos-long chaos-ready e2e setup clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: # Install missing tools, if that is allowed
	@devstack/install.sh $(PACKAGES)

run: setup ## Serve on port 8000 with its own PostgreSQL and Redis
	@cargo build --release --locked --quiet --bin visitas --bin devstack --workspace
	@BIND_ADDR=$${BIND_ADDR:-127.0.0.1:8000} target/release/devstack run -- target/release/visitas

check: ## Check format and lints and run the unit tests, in seconds; needs no server
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo test --package visitas --lib --locked --quiet

map: ## Print who imports whom in src
	@cargo test --package visitas --test imports --locked --quiet -- rooms --nocapture | grep -e ' -> ' -e arrows

# Programs that tests need in addition to the stores, each with its package.
test faults: PACKAGES = promtool=prometheus amtool=prometheus-alertmanager \
	python3:prometheus_client=python3-prometheus-client \
	nginx=nginx haproxy=haproxy caddy=caddy pgbouncer=pgbouncer

# Tests wait for servers most of the time, so more of them run than there are processors.
test compat compat-ends: export RUST_TEST_THREADS = 8
ifdef T
test: setup
	@tests=$$(cargo test --workspace --exclude browser --locked --quiet -- --list '$(T)') && \
	case $$tests in *': test'*) ;; *) echo "no test has $(T) in its name" >&2; exit 1 ;; esac
	cargo test --workspace --exclude browser --locked --quiet -- --include-ignored '$(T)'
else
test: setup check ## Test everything that guards a change, in minutes; T=name runs the tests with this name
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --locked --document-private-items
	cargo test --workspace --exclude browser --locked --no-fail-fast
endif

api: PACKAGES = python3:ensurepip=python3-venv
api: setup ## Test the service against its description with Schemathesis, in two minutes
	@tests/api.sh

faults: setup ## Run the tests that read a clock, take long or flood, one at a time
	cargo test --workspace --exclude browser --locked --no-fail-fast -- --ignored --test-threads=1

sweep: PACKAGES = promtool=prometheus
sweep: setup ## Try 20 rates of failure against the alerts, a few minutes, and print when each fires
	SWEEP=whole cargo test --locked --test it sweep:: -- --ignored --nocapture

# BEFORE=REVISION compares with the service of that revision, where the stores are far away.
AGAINST = before=$(if $(BEFORE),$$(bench/before.sh '$(BEFORE)')) && set -- $${before:+--before "$$before"}

bench: bench-ready ## Measure everything, forty minutes, and write bench/report.md; BEFORE=revision compares with it
	@$(AGAINST) && target/release/bench full "$$@"

bench-quick: bench-ready ## Measure the essentials, three minutes
	@$(AGAINST) && target/release/bench quick "$$@"

bench-far: bench-ready ## Measure with both stores a network away, nine minutes; BEFORE=revision compares with it
	@$(AGAINST) && target/release/bench far "$$@"

bench-peers: bench-ready ## Compare with the same visit in other stacks, ten minutes
	@target/release/bench peers

bench-soak: bench-ready ## Watch memory at the peak, half an hour, and write bench/soak.md
	@target/release/bench soak

# Builds the bench and the service as `make run` does.
bench-ready:
	@devstack/install.sh wrk=wrk
	@cargo build --release --locked --quiet --bin visitas --bin bench --bin axum-peer --workspace

chaos: chaos-ready ## Break everything, eleven minutes, and write docs/faults.md
	@target/release/chaos all

chaos-long: chaos-ready ## Kill each part at a hundred random moments, restart replicas a hundred times, six minutes, and write docs/kills.md
	@target/release/chaos long

chaos-ready: setup
	@cargo build --release --locked --quiet --bin visitas --bin chaos --workspace

compat compat-ends: PACKAGES = npm=npm python3:pip=python3-pip
compat: setup ## Test with PostgreSQL 14 to 18, Redis and Valkey, and restore dumps of each into 18
	@tests/compat.sh

compat-ends: setup ## Test with PostgreSQL 14 and 18 what their versions can change
	@tests/compat.sh ends

browser: ## Test the page in Chromium, a minute, and write target/screenshots; T=name runs the tests with this name
	@tests/browser.sh $(T)

e2e: ## Test the Compose stack, also with outages; needs Docker
	@tests/e2e.sh

clean: ## Delete the build and the data of `make run`
	rm -rf target .devstack
