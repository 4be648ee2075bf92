#!/usr/bin/env bash
# Make the most of ten minutes on a GPU that nobody watches; see gpu_first_light.py, whose options it takes.
#
#     bash benchmarks/gpu_first_light.sh                the whole walk; results in $OUT or build/gpu, as first_light.json
#     bash benchmarks/gpu_first_light.sh --dry-run      the same walk on the CPU with a tiny shape
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" benchmarks/gpu_first_light.py "$@"
