#!/usr/bin/env bash
# Whether this machine computes what it should: kernels, trainer, engines, each against a reference. Prints a table, and
# exits with 1 when a check failed. At most 10 minutes on one GPU; on a machine without, what a CPU can show.
#   scripts/gpu_check.sh [--only TEXT] [--log FILE]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${RLHF_RAY_VENV:-$root/.venv}/bin/python
[[ -x $python ]] || python=python3
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m benchmarks.gpu_check "$@"
