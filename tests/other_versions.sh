#!/usr/bin/env bash
# Runs the suite with another Python and another torch, in an environment of its own:
#     tests/other_versions.sh python3.13 2.13.0
#     tests/other_versions.sh python3.11 2.6.0
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3} torch=${2:-2.6.0}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder"
grep -v "^torch" constraints.txt > "$folder/constraints.txt"
"$folder/bin/python" -m pip install --disable-pip-version-check -q "torch==$torch" \
    -r requirements-dev.txt -c "$folder/constraints.txt"
"$folder/bin/python" -c "import sys, torch; print(f'Python {sys.version.split()[0]}, torch {torch.__version__}')"
"$folder/bin/python" -m pytest -n auto --dist worksteal -rfE
