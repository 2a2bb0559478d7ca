#!/bin/sh
# Make the virtual environment .venv in this checkout and install miniai into it, at the versions of constraints.txt.
#
#   sh scripts/setup.sh             what `import miniai` and miniai_train need
#   sh scripts/setup.sh dev         that, and what the notebooks, the tests and the linter need
#   sh scripts/setup.sh FILE.whl    a built wheel in place of this checkout
#
# Nothing outside the folder is changed, but for one case: Python has no pip at all and this is root (or sudo needs no
# password), then apt-get installs python3-venv. A second run that finds everything in place takes a second.
# These variables are read, none is needed:
#   PYTHON           the Python to use
#   VENV             the folder to make (.venv)
#   TORCH_VERSION    a version of torch other than the one in constraints.txt
#   TORCH_INDEX_URL  the package index that torch comes from, such as https://download.pytorch.org/whl/cpu
set -eu
cd "$(dirname "$0")/.."
what=${1:-run}
VENV=${VENV:-.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

case $what in
    run) package=. editable=-e ;;
    dev) package='.[dev]' editable=-e ;;
    *.whl) [ -f "$what" ] || die "there is no file $what"; package=$what editable= ;;
    *) die "unknown argument '$what': give nothing, dev, or the path of a wheel" ;;
esac

# ---- a Python that is new enough
least=$(sed -n 's/^min_python *= *//p' settings.ini)
newest=3.14   # the newest Python that the pins have wheels for
between() { [ "$("$1" -c 'import sys, venv
low, high = (tuple(map(int, v.split("."))) for v in sys.argv[1:])
print(low <= sys.version_info[:2] <= high)' "$least" "$2" 2>/dev/null)" = True ]; }
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        between "$PYTHON" 9.9 || die "PYTHON=$PYTHON is not a Python of version $least or newer"
        return 0
    fi
    for PYTHON in python3 python3.13 python3.12 python3.11 python3.14 python; do
        if between "$PYTHON" "$newest"; then return 0; fi
    done
    PYTHON=python3
    if between python3 9.9; then say "this Python is newer than $newest, the newest that was tried: some packages may be missing"; return 0; fi
    die "no Python of version $least to $newest was found. Install one (Debian, Ubuntu: apt-get install python3), or name one: PYTHON=/path/to/python sh scripts/setup.sh"
}

# ---- a virtual environment with pip, also where Debian's Python comes without ensurepip
pip_from() {   # install pip into the environment with the pip that lies at $1 (a folder or a wheel)
    [ -n "$1" ] && PYTHONPATH=$1 "$VENV/bin/python" -m pip install -q --disable-pip-version-check --ignore-installed pip
}
has_pip() { "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }
make_bare() { rm -rf "$VENV"; "$PYTHON" -m venv --without-pip "$VENV"; }
apt_as_root() {
    command -v apt-get >/dev/null 2>&1 || return 1
    case $("$PYTHON" -c 'import sys; print(sys.base_prefix)') in /usr) ;; *) return 1 ;; esac
    if [ "$(id -u)" = 0 ]; then root=env
    elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then root='sudo -n env'
    else return 1; fi
    venv_package=$("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    say "installing Debian's package $venv_package with apt-get"
    $root DEBIAN_FRONTEND=noninteractive apt-get update -qq &&
        $root DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$venv_package" >/dev/null
}
apt_as_user() {   # fetch Debian's pip wheel into a folder of our own: apt-get needs no root for that
    command -v apt-get >/dev/null 2>&1 && command -v dpkg-deb >/dev/null 2>&1 || return 1
    say "fetching Debian's package python3-pip-whl with apt-get, into a temporary folder"
    mkdir -p "$temp/lists/partial" "$temp/cache/archives/partial"
    apt="apt-get -qq -o Dir::State::Lists=$temp/lists -o Dir::Cache=$temp/cache -o Debug::NoLocking=1"
    $apt update && (cd "$temp" && $apt download python3-pip-whl) && dpkg-deb -x "$temp"/*.deb "$temp/deb" &&
        pip_from "$(ls "$temp"/deb/usr/share/python-wheels/pip-*.whl)"
}
make_venv() {
    say "making $VENV with $("$PYTHON" -c 'import sys; print(sys.executable, sys.version.split()[0])')"
    if "$PYTHON" -c 'import ensurepip' 2>/dev/null && "$PYTHON" -m venv "$VENV" && has_pip; then return 0; fi
    say "this Python has no ensurepip (Debian's package python3-venv): trying other ways to get pip into $VENV"
    make_bare || die "'$PYTHON -m venv --without-pip $VENV' failed: its message stands above"
    if pip_from "$("$PYTHON" -c 'import os, pip; print(os.path.dirname(os.path.dirname(pip.__file__)))' 2>/dev/null)" && has_pip; then
        say "took pip from the system's own pip"; return 0; fi
    if pip_from "$(ls /usr/share/python-wheels/pip-*.whl 2>/dev/null | tail -n 1)" && has_pip; then
        say "took pip from /usr/share/python-wheels"; return 0; fi
    if apt_as_root && rm -rf "$VENV" && "$PYTHON" -m venv "$VENV" && has_pip; then return 0; fi
    [ -x "$VENV/bin/python" ] || make_bare
    if apt_as_user && has_pip; then return 0; fi
    rm -rf "$VENV"
    die "pip cannot be had: $PYTHON has neither ensurepip nor pip. Install one of them (Debian, Ubuntu: apt-get install python3-venv), or name another Python: PYTHON=/path/to/python sh scripts/setup.sh"
}

temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
trap 'exit 130' INT TERM
note=$VENV/miniai-setup   # what was installed, so that a second run has nothing to do
if [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ]; then
    die "$VENV exists and is no virtual environment: move it away, or name another folder: VENV=.venv2 sh scripts/setup.sh"
fi
if [ -e "$VENV" ]; then
    if ! between "$VENV/bin/python" 9.9 || ! has_pip; then
        say "$VENV does not work any more: making it anew"; rm -rf "$VENV"
    elif [ -f "$note" ] && ! grep -qxF "folder $VENV" "$note"; then
        say "$VENV was made in another place: making it anew"; rm -rf "$VENV"
    fi
fi
if [ ! -e "$VENV" ]; then find_python; make_venv; fi

# ---- the versions: constraints.txt, or with another torch, whose own requirement of sympy differs between releases
pins=$VENV/constraints.txt
if [ -n "${TORCH_VERSION:-}" ] && [ "$TORCH_VERSION" != "$(sed -n 's/^torch==//p' constraints.txt)" ]; then
    { sed -e '/^torch==/d' -e '/^sympy==/d' constraints.txt; echo "torch==$TORCH_VERSION"; } > "$temp/constraints.txt"
else
    cp constraints.txt "$temp/constraints.txt"
fi
state() {
    echo "folder $VENV"
    echo "sources $(cat settings.ini setup.py pyproject.toml "$temp/constraints.txt" | cksum)"
    echo "installed $1"
}
installed() {
    "$VENV/bin/python" -c 'from importlib.metadata import version; version("miniai"); version("torch")' 2>/dev/null &&
        state "$1" | cmp -s - "$note"
}
if installed "$what" || { [ "$what" = run ] && installed dev; }; then
    say "$VENV has everything already"
else
    say "installing miniai ($what) and what it needs into $VENV: a download of 0.3 GB to 4 GB, mostly torch, some minutes"
    rm -f "$note"
    cp "$temp/constraints.txt" "$pins"
    [ -t 1 ] && quiet= || quiet=-qq   # -qq: errors only
    pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 "$VENV/bin/python" -m pip install $quiet --no-input -c "$pins" "$@"; }
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        say "taking torch from $TORCH_INDEX_URL"
        pip --no-deps --index-url "$TORCH_INDEX_URL" torch || die "pip could not install torch from $TORCH_INDEX_URL: its message stands above"
    fi
    pip $editable "$package" || die "pip could not install $package: its message stands above. Is there a network, and enough room on the disk?"
    state "$what" > "$note"
fi
say "ready: $("$VENV/bin/python" -c 'import sys; from importlib.metadata import version as v
print("Python", sys.version.split()[0] + ", torch", v("torch") + ", miniai", v("miniai"))')"
