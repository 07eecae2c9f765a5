#!/bin/sh
# Makes an environment with the Python that is named, or brings it up to date.
#
#     sh scripts/environment.sh PYTHON .venv               # exactly the versions of requirements.lock
#     sh scripts/environment.sh PYTHON .venv-newest TORCH  # the newest that pyproject.toml and TORCH allow
#
# $VENV/ready exists only once everything is in; an environment that was cut short is made anew.
# What goes wrong is said in one line; pip's own words are in $VENV/setup.log.

PY=$1
VENV=$2
TORCH=$3
LOG=$VENV/setup.log

fail() {
    echo "retentive: $1" >&2
    exit 1
}

check_python() {
    command -v "$PY" >/dev/null ||
        fail "$PY is not here: install Python 3.11, 3.12 or 3.13, or name one: make PY=/path/to/python3"
    "$PY" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
        fail "$PY is $("$PY" --version 2>&1), but this needs 3.11, 3.12 or 3.13: name one with make PY=python3.12"
    "$PY" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$PY has no venv module: install it (Debian, Ubuntu: apt install python3-venv)"
}

pip_install() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check "$@" >>"$LOG" 2>&1 ||
        fail "$(cause "pip failed: $(grep -i '^error' "$LOG" | head -n 1) ($LOG); run make again once that is settled")"
}

# Why a step failed: a full disk, no network, or else $1.
cause() {
    if grep -qi 'no space left' "$LOG" || disk_is_full; then
        echo "the disk is full: free about 2 GB (8 GB for a CUDA build of torch), then run make again"
    elif grep -qiE 'connection broken|connectionerror|name resolution|timed out|proxyerror' "$LOG"; then
        echo "no network: pip cannot reach its package index ($LOG); connect, then run make again"
    else
        echo "$1"
    fi
}

disk_is_full() { # then the log may have had no room to say so
    ! { head -c 65536 /dev/zero >"$VENV/probe"; } 2>/dev/null
}

# In both, torch first and alone: beside other requirements pip may choose another build of it.

locked() {
    pip_install -c requirements.lock torch
    # What builds packages is of the lock, too, and the lock is complete: nothing else comes in.
    pip_install -c requirements.lock hatchling editables setuptools
    pip_install --no-deps --no-build-isolation -r requirements.lock -e .
}

newest() {
    pip_install "$TORCH"
    pip_install --upgrade --upgrade-strategy eager "$TORCH" -e '.[dev,eval,export,hf]'
}

check_python
if [ -e "$VENV/unfinished" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$VENV"
fi
mkdir -p "$VENV" && touch "$VENV/unfinished" || fail "cannot write to $(pwd): make needs its checkout writable"
rm -f "$VENV/ready"
: >"$LOG"

echo "retentive: making the environment in $VENV (a few minutes, unless it is there already)"
[ -x "$VENV/bin/python" ] || "$PY" -m venv "$VENV" >>"$LOG" 2>&1 ||
    fail "$(cause "$PY cannot make an environment ($LOG): install its venv module (Debian, Ubuntu: apt install python3-venv)")"
if [ -z "$TORCH" ]; then locked; else newest; fi
mv "$VENV/unfinished" "$VENV/ready"
touch "$VENV/ready"
