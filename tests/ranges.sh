#!/usr/bin/env bash
# tests/ranges.sh lowest|newest [PYTEST ARGUMENT...]: the tests with the lowest or the newest
# versions that pyproject.toml allows. torch is apart: its wheels are chosen by pip (TORCH, default
# torch==2.13.0). Needs uv. The environment stays in .venv-RANGE.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
range=${1:?lowest or newest}
shift
case $range in
    lowest) resolution=lowest-direct ;;
    newest) resolution=highest ;;
    *) printf 'tests/ranges.sh takes lowest or newest; given %s\n' "$range" >&2; exit 2 ;;
esac
torch=${TORCH:-torch==2.13.0}
venv=.venv-$range
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch"
override=$(mktemp)
trap 'rm -f "$override"' EXIT
printf '%s\n' "$torch" >"$override"
uv pip install --quiet --compile-bytecode --python "$venv/bin/python" \
    --resolution "$resolution" --override "$override" -e '.[dev]'
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q -n "${WORKERS:-auto}" --dist loadfile "$@"
