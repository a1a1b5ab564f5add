#!/usr/bin/env bash
# The site on http://127.0.0.1:8000, made again whenever a page changes. PYTHON says which
# interpreter (default: python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m mkdocs serve --quiet "$@"
