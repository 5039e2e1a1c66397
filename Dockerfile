# The service in a small image. Two rules keep a rebuild short: dependencies are compiled from the
# manifests alone, and every step that depends on the source comes after them.

FROM docker.io/library/rust:1.95-slim-bookworm AS dependencies
WORKDIR /build

# The allocator's build needs make.
RUN apt-get update \
 && apt-get install -y --no-install-recommends make \
 && rm -rf /var/lib/apt/lists/*

# A proxy that opens TLS signs with its own authority. The optional build secret `ca`, a PEM file, adds
# it to the roots that cargo trusts; nothing of it gets into the service's image.
ENV CARGO_HTTP_CAINFO=/tmp/roots.pem

# Dependencies, with empty crates in place of ours: rebuilt only when a manifest changes.
COPY Cargo.toml Cargo.lock ./
COPY bench/Cargo.toml bench/
COPY browser/Cargo.toml browser/
COPY chaos/Cargo.toml chaos/
COPY devstack/Cargo.toml devstack/
COPY lab/Cargo.toml lab/
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=secret,id=ca \
    cat /etc/ssl/certs/ca-certificates.crt >$CARGO_HTTP_CAINFO \
 && if [ -e /run/secrets/ca ]; then cat /run/secrets/ca >>$CARGO_HTTP_CAINFO; fi \
 && mkdir -p src bench/src browser/src chaos/src devstack/src lab/src \
 && for crate in . bench browser chaos devstack lab; do touch $crate/src/lib.rs; done \
 && echo 'fn main() {}' >src/main.rs \
 && cargo build --release --locked --bin visitas

FROM dependencies AS build

# The program. Cargo compares modification times, and a checkout's files can be older than the
# build of the empty crates: hence the touch.
COPY . .
ARG VISITAS_REVISION
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    touch build.rs src/lib.rs src/main.rs \
 && head=$(cat .git/HEAD 2>/dev/null || true) \
 && case $head in "ref: "*) ref=${head#ref: } \
     && head=$(cat ".git/$ref" 2>/dev/null || sed -n "s|^\([0-9a-f]*\) $ref\$|\1|p" .git/packed-refs 2>/dev/null || true) ;; esac \
 && VISITAS_REVISION=${VISITAS_REVISION:-$(printf %.12s "$head")} cargo build --release --locked --bin visitas

FROM docker.io/library/debian:bookworm-slim

# Root certificates for TLS to stores and collectors, and the challenge's ping. Debian's ping has the
# file capability cap_net_raw, and a process that cannot gain capabilities cannot run such a file. It
# can run a plain copy, because Docker, or docker-compose.yml, lets its group open ping sockets.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates iputils-ping \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log \
 && install -m 0755 /bin/ping /bin/ping-plain \
 && mv /bin/ping-plain /bin/ping

COPY --from=build /build/target/release/visitas /usr/local/bin/visitas

ARG VISITAS_REVISION
LABEL org.opencontainers.image.title="visitas" \
      org.opencontainers.image.description="Records visits in Postgres and counts them in Redis" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${VISITAS_REVISION}"

# A number, so that an orchestrator can see that it is not root; no user on the host has this id.
USER 10001:10001
EXPOSE 5000
# No shell in between: the program is PID 1 and receives SIGTERM.
ENTRYPOINT ["/usr/local/bin/visitas"]
