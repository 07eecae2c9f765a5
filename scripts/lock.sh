#!/bin/sh
# Renews requirements.lock by uv, in an environment of its own, and says what changed.
# sh scripts/lock.sh PYTHON TORCH, where TORCH caps the version of torch: see the Makefile.
set -eu

PY=$1
TORCH=$2
LOCK=requirements.lock
TEMPORARY=$(mktemp -d)
trap 'rm -rf "$TEMPORARY"' EXIT

"$PY" -m venv "$TEMPORARY/venv"
"$TEMPORARY/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv

# One version for every Python (fewest), so that one tested is all tested.
echo "$TORCH" >"$TEMPORARY/torch.txt"
"$TEMPORARY/venv/bin/uv" pip compile --quiet --no-annotate --no-header \
    --universal --python-version 3.11 --fork-strategy fewest --python "$TEMPORARY/venv/bin/python" \
    --extra dev --extra eval --extra export --extra hf \
    --constraints "$TEMPORARY/torch.txt" --output-file "$TEMPORARY/all.txt" pyproject.toml

# A CUDA build of torch brings its libraries by itself, a CPU build needs none of them.
{
    echo "# Made by \`make lock\`: what \`make\` and CI install on Linux and macOS, Python 3.11 to 3.13."
    grep -vE "^(cuda|nvidia)-|sys_platform == '(emscripten|win32)'" "$TEMPORARY/all.txt"
} >"$TEMPORARY/new.lock"

"$PY" scripts/versions.py "$LOCK" "$TEMPORARY/new.lock"
cat "$TEMPORARY/new.lock" >"$LOCK"
