# The service in a small image. Two rules keep a rebuild short: dependencies are compiled from the
# manifests alone, and every step that depends on the source comes after them.
#
# Every step runs on the machine that builds, whichever architecture the image is for, so an image for
# another one takes no longer: docker buildx build --platform linux/amd64,linux/arm64 .

FROM --platform=$BUILDPLATFORM docker.io/library/rust:1.95-slim-trixie AS dependencies
WORKDIR /build

# A proxy that opens TLS signs with its own authority. The optional build secret `ca`, a PEM file, adds
# it to the roots that cargo trusts; nothing of it gets into the service's image.
ENV CARGO_HTTP_CAINFO=/tmp/roots.pem

# The allocator's build needs make. Another architecture needs its C compiler and Rust's standard
# library for it. A kernel for arm64 has pages of up to 64 KiB, and an allocator that was built for
# smaller ones refuses to start on it. AUDITABLE is a version of cargo-auditable, which adds the list of
# dependencies to a release's program.
ARG BUILDARCH
ARG TARGETARCH
ARG AUDITABLE
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=secret,id=ca \
    case $TARGETARCH in arm64) cpu=aarch64 gcc=gcc-aarch64-linux-gnu ;; *) cpu=x86_64 gcc=gcc-x86-64-linux-gnu ;; esac \
 && if [ "$TARGETARCH" = "$BUILDARCH" ]; then cross=; else cross="$gcc libc6-dev-$TARGETARCH-cross"; fi \
 && apt-get update \
 && apt-get install -y --no-install-recommends make $cross \
 && rm -rf /var/lib/apt/lists/* \
 && cat /etc/ssl/certs/ca-certificates.crt >$CARGO_HTTP_CAINFO \
 && if [ -e /run/secrets/ca ]; then cat /run/secrets/ca >>$CARGO_HTTP_CAINFO; fi \
 && if [ -n "$AUDITABLE" ]; then cargo install --locked --version "$AUDITABLE" cargo-auditable; fi \
 && if [ "$TARGETARCH" = arm64 ]; then printf '[env]\nJEMALLOC_SYS_WITH_LG_PAGE = "16"\n' >>$CARGO_HOME/config.toml; fi \
 && if [ -n "$cross" ]; then \
        rustup target add $cpu-unknown-linux-gnu \
     && printf '[build]\ntarget = "%s"\n[target.%s]\nlinker = "%s"\n' \
            $cpu-unknown-linux-gnu $cpu-unknown-linux-gnu $cpu-linux-gnu-gcc >>$CARGO_HOME/config.toml; fi

# Dependencies, with empty crates in place of ours: rebuilt only when a manifest changes.
COPY Cargo.toml Cargo.lock ./
COPY bench/Cargo.toml bench/
COPY browser/Cargo.toml browser/
COPY chaos/Cargo.toml chaos/
COPY devstack/Cargo.toml devstack/
COPY lab/Cargo.toml lab/
COPY proof/Cargo.toml proof/
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    mkdir -p src bench/src browser/src chaos/src devstack/src lab/src proof/src \
 && for crate in . bench browser chaos devstack lab proof; do touch $crate/src/lib.rs; done \
 && echo 'fn main() {}' >src/main.rs \
 && cargo ${AUDITABLE:+auditable} build --release --locked --bin visitas

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
 && VISITAS_REVISION=${VISITAS_REVISION:-$(printf %.12s "$head")} cargo ${AUDITABLE:+auditable} build --release --locked --bin visitas \
 && find target -path '*/release/visitas' -exec cp {} /visitas \;

# What the image adds to Debian's base: root certificates for TLS to stores and collectors, and the
# challenge's ping with the libraries that the base lacks, each unpacked as it is in its package. So
# ping lacks the file capability cap_net_raw, which it would get when installed, and that is as it must
# be: a process that cannot gain capabilities cannot run such a file. Docker, or docker-compose.yml,
# lets ping's group open ping sockets. apt is shown the base as one of the image's architecture.
FROM --platform=$BUILDPLATFORM docker.io/library/debian:trixie-slim AS files
ARG TARGETARCH
RUN sed "s/^Architecture: $(dpkg --print-architecture)\$/Architecture: $TARGETARCH/" /var/lib/dpkg/status >/tmp/status \
 && printf '%s;\n' "APT::Architecture \"$TARGETARCH\"" 'Dir::State::status "/tmp/status"' 'Dir::Cache::archives "/tmp/packages"' >/tmp/apt.conf \
 && export APT_CONFIG=/tmp/apt.conf \
 && mkdir -p /tmp/packages/partial /files/var/lib/dpkg/status.d /files/etc/ssl/certs \
 && cd /tmp/packages \
 && apt-get update \
 && apt-get install -y --no-install-recommends --download-only iputils-ping \
 && apt-get download ca-certificates \
    # A package can still name these folders, which are links to those beneath usr.
 && for folder in bin lib sbin; do mkdir -p /files/usr/$folder && ln -s usr/$folder /files/$folder; done \
 && for package in *.deb; do \
        dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink -C /files \
        # Scanners look here for packages.
     && dpkg-deb --field "$package" >"/files/var/lib/dpkg/status.d/$(dpkg-deb --field "$package" Package)"; done \
 && cat /files/usr/share/ca-certificates/*/*.crt >/files/etc/ssl/certs/ca-certificates.crt \
 && rm -rf /files/bin /files/lib /files/sbin /files/usr/sbin \
        /files/usr/share/ca-certificates /files/usr/share/lintian /files/usr/share/locale /files/usr/share/man \
 && find /files/usr/share/doc -type f ! -name copyright -delete

# Licence texts of everything that is in the program, which a release puts in place of this stage:
# --build-context licences=FOLDER.
FROM scratch AS licences

FROM docker.io/library/debian:trixie-slim

COPY --from=files /files/ /
COPY --from=licences / /usr/share/doc/visitas/
COPY --from=build /visitas /usr/local/bin/visitas

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
