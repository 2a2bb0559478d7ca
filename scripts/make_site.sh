#!/bin/sh
# Build the site of the course from the outputs stored in the notebooks: nothing is executed, and nothing is fetched
# but the packages that are missing (Python's package index, and MathJax from npm's).
#
#   sh scripts/make_site.sh             write the folder _site
#   sh scripts/make_site.sh FOLDER      write another folder; what it held before is deleted
#
# To read it, open _site/index.html in a browser. It needs no network and no server: figures, formulas and the search
# work from file://. Only the excerpts below the hits of a search need a server, such as
#   .venv/bin/python -m http.server -d _site
# A warning is an error. Two builds of one commit are the same, byte for byte.
# These variables are read, none is needed:
#   VENV    the folder with miniai and Sphinx (.venv; made by scripts/setup.sh if it is missing)
set -eu
case ${1:-} in -*) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;; esac
out=${1:-_site}
case $out in /*) ;; *) out=$PWD/$out ;; esac
cd "$(dirname "$0")/.."
[ $# = 0 ] && out=$PWD/_site
VENV=${VENV:-.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
say() { printf 'make_site: %s\n' "$*"; }
die() { printf 'make_site: %s\n' "$*" >&2; exit 1; }
if [ -e "$out" ] && [ -n "$(ls -A "$out")" ] && [ ! -f "$out/objects.inv" ]; then die "$out holds something that is no site: name another folder"; fi

# ---- what it needs
[ -x "$VENV/bin/python" ] || sh scripts/setup.sh
missing=$("$VENV/bin/python" -c '
import re
from importlib.metadata import PackageNotFoundError, version
pins = dict(re.findall(r"^([\w-]+)==(\S+)", open("constraints.txt").read(), re.M))
def installed(name):
    try: return version(name)
    except PackageNotFoundError: return None
wanted = re.search(r"^site_requirements *= *(.+)$", open("settings.ini").read(), re.M)[1].split()
print(*[w for w in wanted for name in [re.split("[<>=]", w)[0]] if installed(name) != pins[name]])')
if [ -n "$missing" ]; then
    say "installing into $VENV: $missing"
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$VENV/bin/python" -m pip install -qq --no-input -c constraints.txt $missing
fi
mathjax=3.2.2
sha256=d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882
store=$VENV/share/mathjax-$mathjax   # a later version fetches parts of itself from a server
if [ ! -f "$store/tex-svg.js" ]; then
    command -v npm >/dev/null 2>&1 || die "npm is missing: MathJax is on npm's index. Install it (Debian, Ubuntu: apt-get install npm)"
    say "fetching mathjax $mathjax from npm's index"
    temp=$(mktemp -d)
    trap 'rm -rf "$temp"' EXIT
    (cd "$temp" && npm pack --silent "mathjax@$mathjax" >/dev/null && tar xzf mathjax-*.tgz package/es5/tex-svg.js)
    "$VENV/bin/python" -c 'import hashlib, sys
found = hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest()
if found != sys.argv[2]: sys.exit(f"make_site: tex-svg.js has the SHA-256 {found}, not {sys.argv[2]}")' \
        "$temp/package/es5/tex-svg.js" "$sha256"
    mkdir -p "$store"
    mv "$temp/package/es5/tex-svg.js" "$store/tex-svg.js"
    rm -rf "$temp"
fi

# ---- stage, build
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
trap 'exit 130' INT TERM
"$VENV/bin/python" scripts/site_stage.py "$temp/pages"
MINIAI_MATHJAX=$store PYTHONPATH=$PWD PYTHONHASHSEED=0 OMP_NUM_THREADS=1 MPLBACKEND=agg SOURCE_DATE_EPOCH=1767225600 \
    "$VENV/bin/python" -m sphinx -q -W --keep-going -j 2 -b html -c docs -d "$temp/doctrees" "$temp/pages" "$temp/site"
rm -rf "$temp/site/.buildinfo" "$temp/site/_sources"
touch "$temp/site/.nojekyll"
rm -rf "$out"
mv "$temp/site" "$out"
say "$(find "$out" -name '*.html' | wc -l | tr -d ' ') pages, $(du -sk "$out" | cut -f1) KB: open $out/index.html"
