#!/bin/sh
# Set mlenv up in this checkout: the operating-system packages it uses, and .venv with mlenv in it.
#
#   ./setup.sh          what `mlenv` needs to run
#   ./setup.sh --test   that, and what the tests need
#
# For Debian 12 or newer and Ubuntu 22.04 or newer; as root, or as a user with sudo. Safe to run again: what is there
# already is left alone, and a second run with nothing to do takes a moment and asks for no rights.
set -eu

usage="usage: ./setup.sh [--test]"

# Each line: what it is for. A name after `?` is used where the distribution has it, and done without where not.
run_packages="
  python3 python3-venv                            the interpreter of mlenv itself
  ca-certificates git                             indexes over https; specs from git
  debian-archive-keyring debootstrap              Debian bases: the keys, and the default mirror outside Debian
  uidmap                                          newuidmap: several uids in a rootless container
  slirp4netns ?passt                              outbound network of rootless containers
  nftables iproute2                               outbound network of root's containers
  gcc libc6-dev                                   the static init; without them a Python one serves
"
test_packages="
  crun runc                                       oracles: the same bundle under another runtime
  skopeo ?umoci                                   oracles: images read by other tools
  busybox-static                                  a root filesystem of one file
  ?chromium                                       JupyterLab in a real browser
  procps strace tmux                              looking at processes and terminals
"

say() { printf 'setup: %s\n' "$*" >&2; }

fail() {
    printf 'error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '  hint: %s\n' "$2" >&2
    exit 1
}

# Print the package names of a table: the words before the first run of two spaces.
names_in() { printf '%s\n' "$1" | sed -n 's/^  *\([^ ].*\)$/\1/p' | sed 's/   *.*$//'; }

# Print those of the packages $@ that are missing; the mark `?` stays on them.
missing_of() {
    # shellcheck disable=SC2046,SC2116 # names hold no blanks
    installed=$(dpkg-query -W -f='${db:Status-Status} ${Package} ' $(echo "$@" | tr -d '?') 2>/dev/null || :)
    for name; do
        case " $installed" in *" installed ${name#\?} "*) ;; *) printf '%s\n' "$name" ;; esac
    done
}

has_candidate() {
    candidate=$(LC_ALL=C apt-cache policy "$1" 2>/dev/null | sed -n 's/^  Candidate: //p')
    # Ubuntu's chromium is a transition to a snap, which neither a container nor a test machine can install.
    case "$candidate" in '' | '(none)' | *snap*) return 1 ;; *) return 0 ;; esac
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        env DEBIAN_FRONTEND=noninteractive "$@"
    else
        # The caller's proxies come along: apt reads them from the environment, and sudo drops it.
        sudo env DEBIAN_FRONTEND=noninteractive ${http_proxy:+"http_proxy=$http_proxy"} \
            ${https_proxy:+"https_proxy=$https_proxy"} ${no_proxy:+"no_proxy=$no_proxy"} "$@"
    fi
}

apt_get() { as_root apt-get -q -y -o DPkg::Lock::Timeout=300 "$@"; }

install_packages() {
    # shellcheck disable=SC2046 # names hold no blanks
    missing=$(missing_of $(names_in "$1"))
    [ -n "$missing" ] || return 0
    needed=$(printf '%s\n' "$missing" | sed '/^?/d' | tr '\n' ' ')
    offered=$(printf '%s\n' "$missing" | sed -n 's/^?//p' | tr '\n' ' ')
    # A package that apt knows not to exist is no reason to ask for root's rights once more.
    if [ -z "$needed" ] && ! any_candidate $offered; then return 0; fi
    command -v apt-get >/dev/null || fail "this is neither Debian nor Ubuntu: there is no apt-get" \
        "install the equivalents of these by hand, then run ./setup.sh again: $needed$offered"
    if [ "$(id -u)" -ne 0 ] && ! command -v sudo >/dev/null; then
        fail "packages are missing, and this is neither root nor a user with sudo" \
            "as root: apt-get install $needed$offered"
    fi
    say "installing operating-system packages: $needed$offered"
    apt_get update >/dev/null || fail "\`apt-get update\` failed" "see its message above; then run ./setup.sh again"
    for name in $offered; do
        if has_candidate "$name"; then needed="$needed$name "; else say "apt has no $name here; going on without"; fi
    done
    [ -n "$needed" ] || return 0
    # shellcheck disable=SC2086
    apt_get install --no-install-recommends $needed >/dev/null ||
        fail "\`apt-get install\` failed" "see its message above; then run ./setup.sh again"
}

any_candidate() {
    for name; do
        if has_candidate "$name"; then return 0; fi
    done
    return 1
}

can_host_mlenv() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

# Print the interpreter that .venv is made from: the user's own choice first, then the system's, then any.
find_python() {
    for candidate in python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if can_host_mlenv "$candidate"; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    fail "no Python 3.10 or newer with venv was found" "on Ubuntu: apt-get install python3.10-venv, or a newer release"
}

# Print what the contents of .venv depend on, as one hash.
wanted_state() {
    { pwd; cat pyproject.toml setup.sh; "$1" --version; } | sha256sum | cut -d' ' -f1
}

install_mlenv() {
    extra=$1
    if [ -x .venv/bin/python ] && .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
    then
        python=.venv/bin/python
    else
        python=$(find_python)
    fi
    state=$(wanted_state "$python")
    if [ -e ".venv/.setup-$state$extra" ] || [ -e ".venv/.setup-$state-test" ]; then return 0; fi
    if [ "$python" != .venv/bin/python ]; then
        say "making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv || fail "\`$python -m venv\` failed" "see its message above"
    fi
    say "installing Python packages into .venv (a minute or two)"
    target=.
    [ -z "$extra" ] || target=".[${extra#-}]"
    .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --editable "$target" ||
        fail "\`pip install\` failed" "see its message above; pip's own settings and proxies are honoured"
    # pip compiles what it copies, and an editable install copies nothing.
    .venv/bin/python -m compileall -q mlenv || fail "compiling mlenv failed" "see its message above"
    rm -f .venv/.setup-*
    : >".venv/.setup-$(wanted_state .venv/bin/python)$extra"
}

main() {
    packages=$run_packages
    extra=
    case "$#:${1-}" in
        0:) ;;
        1:--test) packages=$run_packages$test_packages extra=-test ;;
        1:-h | 1:--help) printf '%s\n' "$usage"; exit 0 ;;
        *) printf '%s\n' "$usage" >&2; exit 2 ;;
    esac
    cd "$(dirname "$0")"
    install_packages "$packages"
    install_mlenv "$extra"
}

main "$@"
