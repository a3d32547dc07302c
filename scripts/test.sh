#!/usr/bin/env bash
# Sets up the CPU environment and runs the tests; arguments go to pytest.
#   scripts/test.sh                          everything but what is marked as long
#   scripts/test.sh -m long                  that: offload to a disk, for which DeepSpeed compiles an operator
#   scripts/test.sh -m "not integration"     unit tests alone: no Ray, DeepSpeed or vLLM
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Where this is set, every actor would compile all that it imports.
unset PYTHONDONTWRITEBYTECODE
"$root/scripts/install.sh" "${RLHF_RAY_PROFILE:-cpu}"
cd "$root"
exec "${RLHF_RAY_VENV:-$root/.venv}/bin/python" -m pytest "$@"
