#!/usr/bin/env bash
# The tests and measurements that need an NVIDIA GPU, within 9 minutes: one JSON, one Markdown table.
#
#   benchmarks/gpu.sh [--out DIR] [--peers DIR] [--budget SECONDS] [--only STAGE,STAGE] [--plan] [--smoke]
#
# It needs a Python with torch, numpy and safetensors; it says what else is missing and goes on.
# See docs/gpu.md. Another Python than python3: PY=python3.12 benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
exec "${PY:-python3}" benchmarks/gpu/run.py "$@"
