# The commands for people. `make` alone lists them. A description ends with how long it takes on two
# processors, after a first build; CONTRIBUTING.md has the minutes of a cold machine.

# Fixed, because the recipes run programs from this folder.
export CARGO_TARGET_DIR = $(CURDIR)/target

.PHONY: help run lint check map test api faults simulate simulate-mutants mutants sweep late compat compat-ends browser picture bench bench-quick bench-far bench-peers bench-scale bench-soak bench-ready chaos chaos-long chaos-ready powercut powercut-quick powercut-long powercut-compose failover order proof proof-ready e2e e2e-kubernetes image coverage licences setup setup-all hooks clean

help: ## List the targets (at once)
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: # Install missing tools, if that is allowed
	@devstack/install.sh $(PACKAGES)

setup-all: ## Install what any target needs, except Rust and Docker (2 minutes)
	@devstack/install.sh $(SERVERS) $(PYTHON) $(POWER) $(MACHINES) npm=npm python3:pip=python3-pip chromium=chromium chromedriver=chromium-driver wrk=wrk

hooks: ## Run `make check` before each commit of this clone (at once)
	git config core.hooksPath .githooks

# Programs that tests need in addition to the stores, each with its package.
SERVERS = promtool=prometheus amtool=prometheus-alertmanager \
	python3:prometheus_client=python3-prometheus-client \
	nginx=nginx haproxy=haproxy caddy=caddy pgbouncer=pgbouncer
PYTHON = python3:ensurepip=python3-venv

run: setup ## Serve on port 8000 with its own PostgreSQL and Redis; a first build takes some minutes (2 seconds)
	@[ -e target/release/visitas ] || echo 'building: the first time takes some five minutes' >&2
	@cargo build --release --locked $(if $(wildcard target/release/visitas),--quiet) --bin visitas --bin devstack --workspace
	@BIND_ADDR=$${BIND_ADDR:-127.0.0.1:8000} target/release/devstack run -- target/release/visitas

lint: # Check format and lints
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

check: lint ## Check format and lints and run the unit tests; needs no server (20 seconds)
	cargo test --package visitas --lib --locked --quiet

map: ## Print who imports whom in src (seconds)
	@cargo test --package visitas --test imports --locked --quiet -- rooms --nocapture | grep -e ' -> ' -e arrows

test faults coverage: PACKAGES = $(SERVERS)

# Tests wait for servers most of the time, so more of them run than there are processors.
test coverage compat compat-ends: export RUST_TEST_THREADS = 8
ifdef T
test: setup
	@tests=$$(cargo test --workspace --exclude browser --locked -- --list '$(T)') && \
	case $$tests in *': test'*) ;; *) echo "no test has $(T) in its name" >&2; exit 1 ;; esac
	@# Without the programs in which no test has this name.
	@bash -o pipefail -c 'cargo test --workspace --exclude browser --locked -- --include-ignored "$$1" 2>&1 | \
		sed -E "/^ +(Running|Doc-tests|Finished) |^running 0 tests|^test result: ok\. 0 passed|^ *$$/d"' bash '$(T)'
else
test: setup lint ## Test everything that guards a change; T=name runs the tests with this name (4 minutes)
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --locked --document-private-items
	cargo test --workspace --exclude browser --locked --no-fail-fast
endif

api: PACKAGES = $(PYTHON)
api: setup ## Test the service against its description with Schemathesis (1 minute)
	@tests/api.sh

faults: setup ## Run the tests that read a clock, take long or flood, one at a time (11 minutes)
	cargo test --workspace --exclude browser --locked --no-fail-fast -- --ignored --test-threads=1

simulate: export SCHEDULES ?= 1000000
simulate: ## Try a million schedules in simulated time; SEED=n prints the timeline of one (10 minutes)
	cargo test --profile simulation --package visitas --lib --locked --quiet -- simulation::no_schedule --nocapture

simulate-mutants: ## Break recorder and pool in 27 places, which the simulation must notice (15 minutes)
	@tests/simulation.py

mutants: MINUTES ?= 240
mutants: setup ## Break recorder, stores, health and visit in some 950 places, which a test must notice (240 minutes)
	@tests/mutants.py --minutes $(MINUTES)

sweep: PACKAGES = promtool=prometheus
sweep: setup ## Try 20 rates of failure against the alerts, and print when each fires (5 minutes)
	SWEEP=whole cargo test --locked --test it sweep:: -- --ignored --nocapture

late: setup ## Find 10 000 slow visits among a million at the collector (3 minutes)
	LATE=whole cargo test --locked --test it late::every_slow -- --ignored --nocapture

# BEFORE=REVISION compares with the service of that revision, where the stores are far away.
AGAINST = before=$(if $(BEFORE),$$(bench/before.sh '$(BEFORE)')) && set -- $${before:+--before "$$before"}

bench: bench-ready ## Measure everything, and write bench/report.md; BEFORE=revision compares with it (40 minutes)
	@$(AGAINST) && target/release/bench full "$$@"

bench-quick: bench-ready ## Measure the essentials (3 minutes)
	@$(AGAINST) && target/release/bench quick "$$@"

bench-far: bench-ready ## Measure with both stores a network away; BEFORE=revision compares with it (9 minutes)
	@$(AGAINST) && target/release/bench far "$$@"

bench-peers: bench-ready ## Compare with the same visit in other stacks (10 minutes)
	@target/release/bench peers

bench-scale: bench-ready ## Measure what slower commits allow, next to a model (5 minutes)
	@target/release/bench scale

bench-soak: bench-ready ## Watch memory at the peak, and write bench/soak.md (30 minutes)
	@target/release/bench soak

# Builds the bench and the service as `make run` does.
bench-ready:
	@devstack/install.sh wrk=wrk
	@cargo build --release --locked --quiet --bin visitas --bin bench --bin axum-peer --workspace

chaos: chaos-ready ## Break everything, and write docs/faults.md (11 minutes)
	@target/release/chaos all

chaos-long: chaos-ready ## Kill each part at a hundred random moments, restart replicas a hundred times, and write docs/kills.md (6 minutes)
	@target/release/chaos long

chaos-ready: setup
	@cargo build --release --locked --quiet --bin visitas --bin chaos --workspace

powercut: proof-ready ## Cut the power of the database's machine at each kind of moment; needs root (3 minutes)
	@target/release/proof powercut

powercut-long: proof-ready ## Cut the power a hundred times, and write it into docs/kills.md; needs root (15 minutes)
	@target/release/proof powercut long

powercut-quick: ## Cut the power three times and once without flushes, with a debug build; needs root (1 minute)
	-@devstack/install.sh $(POWER)
	@cargo build --locked --quiet --workspace --bin visitas --bin proof
	@target/debug/proof powercut quick

powercut-compose: ## Cut the power below the volume of the Compose stack, and write it into docs/kills.md; needs Docker and root (2 minutes)
	-@devstack/install.sh $(POWER)
	@cargo build --locked --quiet --workspace --bin visitas --bin chaos --bin proof
	@tests/powercut-compose.sh

failover: proof-ready ## Lose the machine of the database's leader, and write it into docs/kills.md; needs root (4 minutes)
	@target/release/proof failover

VISITS = 10000000
order: proof-ready ## Visit ten million times through kills and a failover, or VISITS=number; needs root (10 minutes)
	@target/release/proof order $(VISITS)

proof: proof-ready ## Hold other counters to the same test, and write docs/proof.md; needs root (4 minutes)
	@target/release/proof compare

# What these tests need in addition to the stores. Where it cannot be installed, they say that they are
# skipped, and why.
POWER = mkfs.xfs=xfsprogs mkfs.ext4=e2fsprogs
MACHINES = etcd=etcd-server haproxy=haproxy curl=curl ip=iproute2 python3:ensurepip=python3-venv
proof-ready:
	-@devstack/install.sh $(POWER) $(MACHINES)
	@cargo build --release --locked --quiet --bin visitas --bin proof --bin counter --workspace

compat compat-ends: PACKAGES = npm=npm python3:pip=python3-pip
compat: setup ## Test with PostgreSQL 14 to 18, Redis and Valkey, and restore dumps of each into 18 (10 minutes)
	@tests/compat.sh

compat-ends: setup ## Test with PostgreSQL 14 and 18 what their versions can change (2 minutes)
	@tests/compat.sh ends

browser: ## Test the page in Chromium, and write target/screenshots; T=name runs the tests with this name (1 minute)
	@tests/browser.sh $(T)

picture: ## Take docs/page.png in Chromium, after ten minutes of visits (12 minutes)
	@rm -f target/screenshots/light.png
	@RUSH_SECONDS=610 tests/browser.sh audit
	@cp target/screenshots/light.png docs/page.png

e2e: ## Test the Compose stack, also with outages; needs Docker (9 minutes)
	@tests/e2e.sh

e2e-kubernetes: ## Test the manifests, also with outages, in the cluster that E2E_KUBECONFIG names (4 minutes)
	@cargo build --locked --quiet --workspace --bin chaos
	@tests/e2e-kubernetes.sh

image: ## Build the image for both architectures, twice, and compare; needs Docker (25 minutes)
	@tests/image.sh

# Programs that tests start leave their part as well, unless they are killed. Without the first line a
# run would count what the one before has left.
coverage: setup ## Measure which lines of src the tests run, and write target/coverage; needs cargo-llvm-cov (15 minutes)
	cargo llvm-cov clean --workspace
	cargo llvm-cov --workspace --exclude browser --locked --no-report
	cargo llvm-cov report --html --output-dir target/coverage
	cargo llvm-cov report --summary-only | tee target/coverage/summary.txt

licences: ## Write the licences of all that is in the program to target/licences; needs cargo-about (seconds)
	@mkdir -p target/licences
	cp LICENSE target/licences
	cargo about generate --locked --fail about.hbs --output-file target/licences/dependencies.txt

clean: ## Delete the build and the data of `make run` (seconds)
	rm -rf target .devstack
