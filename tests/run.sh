#!/usr/bin/env bash
# Everything that must hold, in one go and in a new virtual environment: style, types, import
# contracts, tests. PYTHON says which interpreter (default: python3). Stops at the first stage that
# fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stage() { # stage NAME COMMAND...
    local name=$1 began=$SECONDS
    shift
    printf '== %s ...\n' "$name"
    if "$@"; then
        printf '== %s passed in %d s\n' "$name" $((SECONDS - began))
    else
        printf '== %s FAILED after %d s: %s\n' "$name" $((SECONDS - began)) "$*" >&2
        exit 1
    fi
}

rm -rf .venv-test
stage environment "${PYTHON:-python3}" -m venv .venv-test
export PATH="$PWD/.venv-test/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
# by uv where it is there: a minute instead of several; compiled, so that no command compiles again
installer=$(command -v uv || echo python -m)
UV_COMPILE_BYTECODE=1 VIRTUAL_ENV="$PWD/.venv-test" \
    stage install $installer pip install --quiet --quiet -e '.[dev]' -c constraints.txt
stage lint ruff check --quiet
stage format ruff format --check --quiet
stage types mypy --no-error-summary
stage imports lint-imports --no-logo
# A worker a core, each with one thread: most tests are too small for two.
OMP_NUM_THREADS=1 stage tests python -m pytest -q -n auto --dist loadfile
