#!/bin/sh
# Brings what the Makefile's targets need: Debian packages where it may install them, and .venv.
#
#   tools/setup.sh run         to build, run and test
#   tools/setup.sh run lint    to check the sources as well
#   tools/setup.sh run test    and a browser, for the tests of the HTML report
#   tools/setup.sh run iso     to make ISO images as well
#
# Where it may not install, it stops with the commands to run. Nothing is done twice: with all in place it
# takes some milliseconds. Without the browser the rest goes on: its tests say what they miss.
# VMXLAB_INSTALL=no keeps it from installing packages, PYTHON=... names the interpreter to use, V=1 shows what
# apt-get and pip say.
set -eu

cd "$(dirname "$0")/.."
checkout=$(pwd -P)
stamp=.venv/vmxlab-setup
log=build/setup.log

run_packages="gcc binutils bochs bochs-term bochsbios vgabios qemu-system-x86"
lint_packages="clang-format"
browser_packages="chromium chromium-driver"
iso_packages="grub-common grub-pc-bin grub-efi-amd64-bin xorriso mtools"

say() {
    printf 'vmxlab: %s\n' "$*" >&2
}

have() {
    command -v "$1" >/dev/null 2>&1
}

# Runs a command with its output in the log; a person sees it with V=1, or its end when it failed. What it
# leaves running, such as a service that a package starts, must not keep our lock: 9 is closed for it.
logged() {
    if [ "${V:-0}" = 1 ]; then
        "$@" >&2 9>&-
        return
    fi
    "$@" >"$log" 2>&1 9>&- && return
    status=$?
    tail -n 30 "$log" >&2
    return $status
}

# --- Debian packages ---------------------------------------------------------------------------------------

# Whether what a package is wanted for is there without it: built by hand, or on another distribution.
provided() {
    case $1 in
        gcc) have gcc ;;
        binutils) have as && have ld && have objcopy ;;
        bochs) have bochs-bin || have bochs ;;
        bochs-term) any_file /usr/lib*/bochs/plugins/libbx_term*.so /usr/lib/*/bochs/plugins/libbx_term*.so \
            /usr/local/lib/bochs/plugins/libbx_term*.so ;;
        bochsbios) any_file /usr/share/bochs/BIOS-bochs-latest /usr/local/share/bochs/BIOS-bochs-latest ;;
        vgabios) any_file /usr/share/vgabios/vgabios.bin /usr/share/bochs/VGABIOS-lgpl-latest* \
            /usr/local/share/bochs/VGABIOS-lgpl-latest* ;;
        qemu-system-x86) have qemu-system-x86_64 ;;
        clang-format) have clang-format ;;
        chromium) have chromium || have chromium-browser || have google-chrome ;;
        chromium-driver) have chromedriver ;;
        grub-common) have grub-mkimage ;;
        grub-pc-bin) any_file /usr/lib/grub/i386-pc/multiboot.mod ;;
        grub-efi-amd64-bin) any_file /usr/lib/grub/x86_64-efi/multiboot.mod ;;
        xorriso) have xorriso ;;
        mtools) have mformat ;;
        *) return 1 ;;
    esac
}

any_file() {
    for file; do
        [ -e "$file" ] && return
    done
    return 1
}

# The packages among its arguments that are neither installed nor provided otherwise.
missing_of() {
    installed=" "
    if have dpkg-query; then
        # It fails when it knows one of them not at all, and still lists the others.
        # shellcheck disable=SC2016  # ${...} is dpkg-query's
        installed=" $(dpkg-query -W -f '${Package}:${db:Status-Status} ' "$@" 2>/dev/null || true) "
    fi
    for package; do
        case $installed in
            *" $package:installed "*) ;;
            *) provided "$package" || printf '%s ' "$package" ;;
        esac
    done
}

# Prints how to become root for apt-get ("" when we are), or fails where that takes a person.
root_prefix() {
    if [ "${VMXLAB_INSTALL:-yes}" = no ]; then
        return 1
    elif [ "$(id -u)" = 0 ]; then
        :
    elif have sudo && sudo -n true 2>/dev/null; then
        printf 'sudo -n'
    else
        return 1
    fi
}

install_packages() {
    missing=$(missing_of "$@")
    missing=${missing% }
    [ -n "$missing" ] || return 0
    if ! have apt-get; then
        other_distribution
    elif ! prefix=$(root_prefix); then
        ask_for_packages
    fi
    if ! apt_install; then
        say "apt-get could not install: $missing"
        say "on Ubuntu they are in 'universe': sudo add-apt-repository universe"
        exit 1
    fi
}

# Installs $missing, with $prefix before the command.
apt_install() {
    say "installing $missing"
    apt_get="$prefix env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300"
    # Word splitting is wanted in both: a command, and a list. Old lists may do where the update fails.
    # shellcheck disable=SC2086
    logged $apt_get update || say "apt-get update failed; trying with the package lists that are here"
    # shellcheck disable=SC2086
    logged $apt_get install -y --no-install-recommends $missing
}

# The same for what the rest goes on without. Ubuntu has no such packages of a browser: where it was looked for
# in vain it is not looked for at each make again, but after a `make clean`.
install_if_possible() {
    missing=$(missing_of "$@")
    missing=${missing% }
    if [ -z "$missing" ] || [ -e build/no-browser ] || ! have apt-get || ! prefix=$(root_prefix); then
        return 0
    fi
    apt_install && return
    say "apt-get could not install $missing: the tests that need it are skipped (it is tried again after: make clean)"
    : >build/no-browser
}

ask_for_packages() {
    update="apt-get update"
    install="apt-get install -y --no-install-recommends $missing"
    say "packages are missing: $missing"
    if [ "${VMXLAB_INSTALL:-yes}" = no ]; then
        say "VMXLAB_INSTALL=no says not to install them. Run this, then the same make again:"
    else
        say "only root may install them, and sudo is missing or asks for a password."
        say "Run this, then the same make again:"
    fi
    if [ "$(id -u)" = 0 ]; then
        printf '\n    %s\n    %s\n\n' "$update" "$install" >&2
    elif have sudo; then
        printf '\n    sudo %s\n    sudo %s\n\n' "$update" "$install" >&2
    else
        printf "\n    su -c '%s && %s'\n\n" "$update" "$install" >&2
    fi
    exit 1
}

other_distribution() {
    container=docker
    have docker || ! have podman || container=podman
    say "packages are missing, and this is neither Debian nor Ubuntu (no apt-get): $missing"
    say "Install what your distribution calls them. Or run all of it in a Debian container:"
    # shellcheck disable=SC2016  # $PWD is for the person's shell
    printf '\n    %s run --rm -v "$PWD":/vmxlab -w /vmxlab debian:12 \\\n        sh -c "%s"\n\n' "$container" \
        "apt-get update && apt-get install -y git make python3 && make test" >&2
    exit 1
}

# --- Python ------------------------------------------------------------------------------------------------

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python3.14 python3.13 python3.12 python3.11
    fi
    for python; do
        if have "$python" && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            return
        fi
    done
    found=$(python3 --version 2>/dev/null || echo "no python3")
    say "Python 3.11 or newer is needed; here is $found${PYTHON:+, and PYTHON=$PYTHON is none either}."
    say "If it has another name or place, say so: make PYTHON=/path/to/python3.11 ..."
    exit 1
}

# Debian's Python comes without what makes environments; the package is called by the version.
venv_package() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        "$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'
}

# What .venv was made of and for. An environment that was copied or moved along with its checkout, or whose
# interpreter was upgraded since, differs in it.
stamp_text() {
    printf 'checkout %s\ninterpreter %s\npyproject %s\n' "$checkout" \
        "$(readlink -f .venv/bin/python)" "$(sha256sum <pyproject.toml)"
}

venv_is_current() {
    [ -x .venv/bin/python ] && [ -f "$stamp" ] && [ "$(stamp_text)" = "$(cat "$stamp")" ]
}

# Whether .venv works here at all, so that only the packages in it may be out of date.
venv_is_usable() {
    [ -x .venv/bin/python ] || return 1
    if [ -f "$stamp" ]; then
        [ "$(stamp_text | head -n 2)" = "$(head -n 2 "$stamp")" ]
    else
        grep -qxF "VIRTUAL_ENV=\"$checkout/.venv\"" .venv/bin/activate 2>/dev/null
    fi
}

make_venv() {
    venv_is_current && return
    if ! venv_is_usable; then
        [ ! -e .venv ] || say ".venv was made for another place or interpreter, or not finished: making it again"
        rm -rf .venv
        say "making .venv with $("$python" --version)"
        logged "$python" -m venv .venv || { rm -rf .venv; exit 1; }
    fi
    say "installing vmxlab and its Python packages into .venv"
    if ! logged .venv/bin/python -m pip install --disable-pip-version-check -e '.[dev]'; then
        say "pip could not install them. To see more: V=1 make setup"
        exit 1
    fi
    stamp_text >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

# --- main --------------------------------------------------------------------------------------------------

[ $# -gt 0 ] || set -- run
packages=""
optional=""
for purpose; do
    case $purpose in
        run) packages="$packages $run_packages" ;;
        lint) packages="$packages $lint_packages" ;;
        iso) packages="$packages $iso_packages" ;;
        test) optional="$browser_packages" ;;
        *) say "usage: tools/setup.sh [run] [lint] [iso] [test]"; exit 2 ;;
    esac
done

mkdir -p build
# One at a time in a checkout: two makes may have been started at once.
exec 9>build/setup.lock
flock 9

if venv_is_current; then
    # shellcheck disable=SC2086
    install_packages $packages
else
    find_python
    # shellcheck disable=SC2046,SC2086
    install_packages $packages $(venv_package)
    make_venv
fi
# shellcheck disable=SC2086
[ -z "$optional" ] || install_if_possible $optional
