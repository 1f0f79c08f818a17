# Sourced by every script: messages, the cache, packages, builds that are atomic and made once.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CACHE=${EPOCHS_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/epochs}
export DEBIAN_FRONTEND=noninteractive

say() { printf '%s\n' "-- $*" >&2; }
fail() { printf '%s\n' "epochs: $*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo "$@"
    else fail "this needs root: $*"
    fi
}

# need PACKAGE... : install those that are missing, in one call.
need() {
    local missing
    missing=$(missing_of "$@")
    [ -n "$missing" ] || return 0
    mkdir -p "$CACHE"
    (
        flock 7
        missing=$(missing_of "$@") # another script may have installed them meanwhile
        [ -n "$missing" ] || exit 0
        say "installing $missing"
        apt_update
        # shellcheck disable=SC2086 # a list of words
        apt_get install -y --no-install-recommends $missing
    ) 7>"$CACHE/apt.lock"
}

missing_of() {
    local package missing=()
    for package in "$@"; do
        dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
            missing+=("$package")
    done
    printf '%s' "${missing[*]}"
}

# apt-get as root, quiet unless it fails; waits for another apt instead of failing.
apt_get() {
    as_root apt-get -o DPkg::Lock::Timeout=300 "$@" </dev/null >"$CACHE/apt.log" 2>&1 7>&- 8>&- ||
        { tail -n 20 "$CACHE/apt.log" >&2; fail "apt-get $1 failed"; }
}

# Package lists, once a day.
apt_update() {
    mkdir -p "$CACHE"
    (
        flock 8
        [ -z "$(find "$CACHE/apt-updated" -mmin -1440 2>/dev/null)" ] || exit 0
        apt_get update
        touch "$CACHE/apt-updated"
    ) 8>"$CACHE/apt-update.lock"
}

# set_up : the packages, then .venv in the background, while guests are built; wait_set_up ends it.
set_up() {
    "$ROOT/scripts/setup" packages
    "$ROOT/scripts/setup" &
    setup_pid=$!
    trap wait EXIT # whatever fails, nothing goes on behind the user's back
}

wait_set_up() {
    wait "$setup_pid" || fail "set-up failed"
    trap - EXIT
}

# mirror LABEL : the address that this machine's own apt takes Debian (or Debian-Security) from.
mirror() {
    # shellcheck disable=SC2016 # apt expands these
    apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' |
        awk -v label="$1" '$1 == "Debian" && $2 == label && !done++ { print $3 }'
}

# build NAME FUNCTION FILE... : run FUNCTION DIRECTORY unless the cache holds what it makes from the
# FILEs as they are now; prints the directory, which FUNCTION knows as $place and fills under another
# name. An interrupted build leaves nothing that counts. Not to be called in a condition (if, ||, &&):
# there bash lets FUNCTION go on after a command failed.
build() {
    local name=$1 make=$2 key place work status
    shift 2
    key=$(cat "$@" | sha256sum | cut -c1-16)
    place=$CACHE/$name-$key
    mkdir -p "$CACHE"
    exec 9>"$CACHE/$name.lock"
    flock 9
    if [ ! -d "$place" ]; then
        rm -rf --one-file-system "$CACHE/$name".tmp.*
        work=$(mktemp -d "$CACHE/$name.tmp.XXXXXX")
        say "building $name"
        set +e
        (set -e; "$make" "$work") </dev/null >"$CACHE/$name.log" 2>&1 9>&-
        status=$?
        set -e
        if [ $status != 0 ]; then
            tail -n 25 "$CACHE/$name.log" >&2
            rm -rf --one-file-system "$work"
            fail "building $name failed; all of it is in $CACHE/$name.log"
        fi
        chmod 755 "$work"
        find "$CACHE" -maxdepth 1 -name "$name-????????????????" -mtime +1 -exec rm -rf {} +
        mv "$work" "$place"
    fi
    exec 9>&-
    printf '%s\n' "$place"
}

# sources RELEASE DIRECTORY : lines for sources.list, from where this machine's own apt takes Debian, signed by the
# keys of debian-archive-keyring as this machine's apt knows it: the installed one may be older than
# RELEASE. It goes to DIRECTORY/keys.
sources() {
    local release=$1 directory=$2 keys=$2/keys/root/usr/share/keyrings/debian-archive-keyring.gpg
    [ -e "$keys" ] || download "$directory/keys" debian-archive-keyring >&2
    printf 'deb [signed-by=%s] %s %s main\n' "$keys" "$(mirror Debian)" "$release"
    if [ -n "$(mirror Debian-Security)" ]; then
        printf 'deb [signed-by=%s] %s %s-security main\n' "$keys" "$(mirror Debian-Security)" "$release"
    fi
}

# How this machine's apt gets through to its mirror: proxies, certificates, clock checks. Written to a
# file for mmdebstrap's --aptopt.
apt_way() {
    apt-config dump | grep -E '^Acquire::(http|https|ftp|Check-|Retries)' || true
    echo 'APT::Install-Recommends "false";'
    echo 'APT::Sandbox::User "root";'
}

# download DIRECTORY PACKAGE... : fetch .deb files into DIRECTORY and unpack them into DIRECTORY/root.
download() {
    local place=$1
    shift
    mkdir -p "$place/debs" "$place/root"
    (cd "$place/debs" && apt-get download "$@")
    for deb in "$place"/debs/*.deb; do dpkg-deb -x "$deb" "$place/root"; done
    rm -r "$place/debs"
}

# unpack RELEASE DIRECTORY PACKAGES OPTION... : packages (a,b,c) of a Debian release with all they need, as
# DIRECTORY/root. Unpacked only: nothing in it is ever configured or started as a system.
unpack() {
    local release=$1 place=$2 packages=$3
    shift 3
    apt_update
    apt_way >"$place/apt.conf"
    sources "$release" "$place" >"$place/sources"
    TMPDIR=$place mmdebstrap --mode=root --variant=extract --architectures=amd64 \
        --aptopt="$place/apt.conf" --include="$packages" "$@" "$release" "$place/root" "$place/sources"
    rm -r "$place/apt.conf" "$place/sources" "$place/keys"
}

# source_of DIRECTORY PACKAGE RELEASE : a package's source, with Debian's changes, as DIRECTORY/PACKAGE.
source_of() {
    local place=$1 package=$2 release=$3 way
    mkdir -p "$place/lists/partial"
    printf 'deb-src %s %s main\n' "$(mirror Debian)" "$release" >"$place/sources.list"
    way=(-o Dir::Etc::sourcelist="$place/sources.list" -o Dir::Etc::sourceparts=-
        -o Dir::State::lists="$place/lists" -o APT::Sandbox::User=root)
    apt-get "${way[@]}" update
    (cd "$place" && apt-get "${way[@]}" source --download-only "$package")
    dpkg-source --no-check -x "$place/$package"_*.dsc "$place/$package"
}

# The package that holds the newest cloud kernel's files.
cloud_kernel() {
    apt-cache depends linux-image-cloud-amd64 |
        awk '/Depends: linux-image-[0-9]/ { print $2; exit }'
}
