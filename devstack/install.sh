#!/bin/sh
# Checks, before anything is compiled, that Rust, PostgreSQL, Redis, and each given COMMAND=PACKAGE
# and python3:MODULE=PACKAGE are installed.
#
#   devstack/install.sh [promtool=prometheus python3:prometheus_client=python3-prometheus-client ...]
#
# As root, or with a sudo that asks for no password, it installs missing packages with apt-get.
# Otherwise it prints the commands to type. It never installs Rust.
set -eu
. "$(dirname "$0")/src/find.sh"
# Debian keeps nginx and HAProxy where only root looks for programs.
PATH=$PATH:/usr/sbin

oldest=$(sed -n 's/^rust-version = "1\.\([0-9]*\)"$/\1/p' "$(dirname "$0")/../Cargo.toml")
minor=$(rustc --version 2>/dev/null | sed -n 's/^rustc 1\.\([0-9]*\)\..*/\1/p')
if [ "${minor:-0}" -lt "$oldest" ] || [ -z "$(command -v cargo)" ]; then
    if [ -n "$(command -v rustup)" ]; then
        how='rustup update stable'
    else
        how="curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh"
    fi
    printf 'Rust 1.%s or newer was not found. Install it:\n  %s\n' "$oldest" "$how" >&2
    exit 1
fi

has_module() { "$1" -c "import $2" >/dev/null 2>&1; }

apt_packages=
brew_packages=
pip_packages=
if ! find_postgres >/dev/null 2>&1; then
    apt_packages="$apt_packages postgresql"
    brew_packages="$brew_packages postgresql@16"
fi
if ! find_redis >/dev/null 2>&1; then
    apt_packages="$apt_packages redis-server"
    brew_packages="$brew_packages redis"
fi
for pair in "$@"; do
    wanted=${pair%%=*}
    module=${wanted#python3:}
    if [ "$module" != "$wanted" ]; then
        if ! has_module python3 "$module" && ! has_module /usr/bin/python3 "$module"; then
            apt_packages="$apt_packages ${pair#*=}"
            pip_packages="$pip_packages $module"
        fi
    elif [ -z "$(command -v "$wanted")" ]; then
        apt_packages="$apt_packages ${pair#*=}"
        brew_packages="$brew_packages ${pair#*=}"
    fi
done
if [ -z "$apt_packages" ]; then
    exit 0
fi

if [ "$(id -u)" -eq 0 ]; then
    as_root() { "$@"; }
elif sudo -n true 2>/dev/null; then
    as_root() { sudo -n "$@"; }
else
    as_root() { return 1; }
fi
if [ -z "$(command -v apt-get)" ] || ! as_root true; then
    {
        echo "Missing:$apt_packages. To install:"
        echo "  Debian, Ubuntu:  sudo apt-get install -y --no-install-recommends$apt_packages"
        if [ -n "$brew_packages" ]; then
            echo "  macOS:           brew install$brew_packages"
        fi
        if [ -n "$pip_packages" ]; then
            echo "  macOS:           python3 -m pip install$pip_packages"
        fi
    } >&2
    exit 1
fi

install_packages() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"
}

# The packages would start their own servers, now and at every boot; this project does not use them.
policy=/usr/sbin/policy-rc.d
if ! [ -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
    trap 'as_root rm -f "$policy"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
fi
as_root apt-get update -q
case $apt_packages in *postgresql*)
    settings=/etc/postgresql-common/createcluster.conf
    if ! [ -e "$settings" ]; then
        install_packages postgresql-common
        as_root sed -i 's/^#* *create_main_cluster.*/create_main_cluster = false/' "$settings"
    fi
    ;;
esac
# shellcheck disable=SC2086 # One word per package.
install_packages $apt_packages
if [ -d /run/systemd/system ]; then
    for package in $apt_packages; do
        as_root systemctl disable --quiet "$package" 2>/dev/null || true
    done
fi

# Fails with a message if an installed package is too old.
find_postgres >/dev/null
find_redis >/dev/null
