# shellcheck shell=sh
# What the scripts share: messages, Debian packages, builds, pid files. Plain POSIX sh; sourced, never run.

CHECKOUT=$(cd "$(dirname "$0")/.." && pwd)
# Where things go; the environment can move all of it, so that the scripts can be tried beside a real installation.
DEST=${INSULA_DESTDIR-}
INSTALL=$DEST/opt/insula
BIN=$DEST/usr/local/bin
LOGS=$DEST/var/log/insula
STATE=${INSULA_ROOT:-/var/lib/insula}
RUN=${INSULA_RUN:-/run/insula}
PREFIX=${INSULA_PREFIX:-insula}
PYTHON=/usr/bin/python3
SERVICE=/etc/systemd/system/insulad.service
MAN=$DEST/usr/local/share/man
CONFIG=$DEST/etc/insula/insulad.toml
[ -z "$DEST" ] || export INSULA_CONFIG="${INSULA_CONFIG:-$CONFIG}"
COMPLETIONS="$DEST/usr/local/share/bash-completion/completions/insula
$DEST/usr/local/share/zsh/site-functions/_insula
$DEST/usr/local/share/fish/vendor_completions.d/insula.fish"

PATH=$BIN:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:$PATH
export PATH DEBIAN_FRONTEND=noninteractive
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE PYTHONUNBUFFERED

say() { printf '%s\n' "$*"; }
step() { printf '==> %s\n' "$*"; }

# die WHAT HINT: the one line that every error is.
die() {
    printf 'error: %s; hint: %s\n' "$1" "$2" >&2
    exit 1
}

need_root() { [ "$(id -u)" = 0 ] || die "this needs root" "run it as root, for example with sudo"; }

# quietly WHAT HINT COMMAND…: its output only when it fails.
quietly() {
    complaint=$1 advice=$2
    shift 2
    output=$(mktemp)
    if "$@" >"$output" 2>&1 9>&-; then
        rm -f "$output"
    else
        tail -n 20 "$output" >&2
        rm -f "$output"
        die "$complaint" "$advice"
    fi
}

# one_at_a_time: a second script of ours waits here for the first.
one_at_a_time() {
    mkdir -p "$INSTALL"
    exec 9>"$INSTALL/.lock"
    flock -n 9 || { say "another script of Insula is at work, waiting"; flock 9; }
}

# -- Debian packages ------------------------------------------------------------------------------------------

# packages KIND…: the names that scripts/packages lists for these kinds.
packages() {
    for kind in "$@"; do
        awk -v kind="$kind" '$1 == kind { print $2 }' "$CHECKOUT/scripts/packages"
    done
}

missing_packages() {
    for name in $(packages "$@"); do
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || printf '%s ' "$name"
    done
}

apt() { apt-get -q -y -o DPkg::Lock::Timeout=300 -o APT::Install-Recommends=false "$@"; }

# ensure_packages KIND…: installs what is missing; fetches package lists only if that fails without.
ensure_packages() {
    command -v dpkg-query >/dev/null || die "this is not a Debian system" \
        "install the equivalents of: $(packages "$@" | tr '\n' ' ')and use pip"
    missing=$(missing_packages "$@")
    [ -n "$missing" ] || return 0
    step "installing Debian packages: $missing"
    [ -z "$(dpkg --audit 2>/dev/null)" ] || dpkg --configure -a >/dev/null 2>&1 || true
    # shellcheck disable=SC2086  # a list of words
    apt install $missing >/dev/null 2>&1 9>&- || {
        quietly "package lists can't be fetched" "check the network and /etc/apt/sources.list" apt update
        quietly "packages can't be installed: $missing" "see the lines above" apt install $missing
    }
}

# -- the Python part ------------------------------------------------------------------------------------------

check_python() {
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die "$PYTHON is missing or older than 3.11" "use Debian 12 or later"
}

# source_hash PATH…: names one state of these files of the checkout and of the Python that runs them.
source_hash() {
    (
        cd "$CHECKOUT"
        "$PYTHON" -VV
        find "$@" -type f ! -name '*.pyc' -exec sha256sum {} + | LC_ALL=C sort -k 2
    ) | sha256sum | cut -c 1-16
}

# site_packages ENVIRONMENT: where its Python looks for packages.
site_packages() { echo "$1"/lib/python3*/site-packages; }

# install_requirements: what pyproject.toml asks for, in an environment of its own, $requirements, that builds share:
# a new build takes a second then, and no package index.
install_requirements() {
    requirements=$INSTALL/requirements/$(source_hash pyproject.toml)
    [ ! -e "$requirements/.complete" ] || return 0
    step "installing Python packages into $requirements"
    rm -rf "$requirements"
    quietly "no virtual environment at $requirements" "is python3-venv installed?" "$PYTHON" -m venv "$requirements"
    # shellcheck disable=SC2046  # one word a requirement
    quietly "the Python packages can't be installed" "is the package index reachable? see pip's lines above" \
        "$requirements/bin/python" -m pip install -q --disable-pip-version-check --no-compile $(required)
    quietly "byte-compiling failed" "see the lines above" \
        "$requirements/bin/python" -m compileall -q -j 0 "$(site_packages "$requirements")"
    touch "$requirements/.complete"
}

# required: the dependencies in pyproject.toml, a line each.
required() {
    "$PYTHON" -c 'import sys, tomllib
print(*tomllib.load(sys.stdin.buffer)["project"]["dependencies"], sep="\n")' <"$CHECKOUT/pyproject.toml"
}

# -- processes ------------------------------------------------------------------------------------------------

# start_time PID: field 22 of proc_pid_stat(5); with the pid it names a process for ever.
start_time() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20; }

# running NAME: prints the pid of insulad, keeper (the monitor) or spawner (the zygote), if it runs. insulad holds a lock, which the kernel
# drops with it; the others write "PID START_TIME".
running() {
    if [ "$1" = insulad ]; then
        [ -e "$STATE/insulad.pid" ] && ! flock -n "$STATE/insulad.pid" true && cat "$STATE/insulad.pid"
        return
    fi
    pid='' started=''
    [ -r "$RUN/$1.pid" ] || return 1
    read -r pid started <"$RUN/$1.pid" || true
    [ -n "$pid" ] && [ -n "$started" ] && [ "$(start_time "$pid")" = "$started" ] || return 1
    # a zombie, unless threads of it run on: state, and number of threads
    [ "$(sed 's/.*) //' "/proc/$pid/stat" 2>/dev/null | cut -d ' ' -f 1,18)" != "Z 1" ] && printf '%s\n' "$pid"
}

# stop_process NAME: SIGTERM, and after ten seconds SIGKILL.
stop_process() {
    victim=$(running "$1") || return 0
    kill -TERM "$victim" 2>/dev/null || true
    tries=0
    while running "$1" >/dev/null; do
        tries=$((tries + 1))
        [ "$tries" != 100 ] || kill -KILL "$victim" 2>/dev/null || true
        [ "$tries" -lt 150 ] || die "$1 (process $victim) does not end" "look at /proc/$victim/stack"
        sleep 0.1
    done
}

has_systemd() { [ -z "$DEST" ] && [ -d /run/systemd/system ]; }

answers() { insula status >/dev/null 2>&1 9>&-; }
