#!/usr/bin/env bash
# Wheel and sdist, built into build/dist; the wheel, and then one made from the sdist, are installed
# into an empty environment elsewhere and walked. BORROW=FOLDER takes the dependencies from that
# site-packages instead of installing them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
dist=$PWD/build/dist
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
rm -rf "$dist" && mkdir -p "$dist"
"$python" -m venv "$place/build"
bin=bin
[ -d "$place/build/Scripts" ] && bin=Scripts
"$place/build/$bin/python" -m pip install --quiet --disable-pip-version-check "hatchling>=1.27"
"$place/build/$bin/python" -m hatchling build -t sdist -t wheel -d "$dist" >/dev/null
ls -l "$dist"

walk() { # walk ARCHIVE
    local env=$place/env-$RANDOM
    "$python" -m venv "$env"
    if [ -n "${BORROW:-}" ]; then
        local packages
        packages=$("$env/$bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
        echo "$BORROW" >"$packages/borrowed.pth"
        "$env/$bin/python" -m pip install --quiet --disable-pip-version-check \
            --no-deps --ignore-installed "$1"
    else
        "$env/$bin/python" -m pip install --quiet --disable-pip-version-check "$1"
    fi
    mkdir "$env/work"
    cp tests/wheel_walk.py "$env/work/"
    (cd "$env/work" && PATH="$env/$bin:$PATH" PYTHONPATH='' "$env/$bin/python" wheel_walk.py "$env")
}
walk "$(ls "$dist"/*.whl)"
walk "$(ls "$dist"/*.tar.gz)"
