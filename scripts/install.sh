#!/usr/bin/env bash
# Sets up a virtual environment with the locked packages and rlhf_ray itself (editable). Run again, it does only
# what is missing.
#   scripts/install.sh [cpu|gpu] [--lock-only]
#   --lock-only             the locked packages without rlhf_ray: what a layer of an image holds
#   RLHF_RAY_VENV=folder    another place than .venv
#   PYTHON=interpreter      another Python than the first of python3.11, python3.12 and python3 that fits
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
profile=${1:-cpu} extent=${2:-}
venv=${RLHF_RAY_VENV:-$root/.venv}
lock=$root/locks/$profile.txt
fail() {
    echo "install.sh: $*" >&2
    exit 1
}
[[ $# -le 2 && ($profile == cpu || $profile == gpu) && ($extent == "" || $extent == --lock-only) ]] ||
    fail "usage: scripts/install.sh [cpu|gpu] [--lock-only]"
[[ $(uname -sm) == "Linux x86_64" ]] || fail "the locks are for Linux on x86-64, this is $(uname -sm)"

fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))'
if [[ ! -x $venv/bin/python ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c "$fits" >/dev/null 2>&1; then
            python=$candidate
            break
        fi
    done
    [[ -n $python ]] || fail "Python 3.11 or 3.12 is needed: install one, or name one with PYTHON=…"
    "$python" -m venv "$venv"
fi
"$venv/bin/python" -c "$fits" || fail "$venv has another Python than 3.11 or 3.12: remove it or set RLHF_RAY_VENV"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# A stamp holds what was installed; it is written last.
lock_stamp=$venv/.rlhf_ray-lock
package_stamp=$venv/.rlhf_ray-package
wanted="$profile $(sha256sum <"$lock")"
if [[ ! -f $lock_stamp || $(<"$lock_stamp") != "$wanted" ]]; then
    rm -f "$lock_stamp" "$package_stamp"
    if [[ $profile == cpu ]]; then
        # Look before downloading gigabytes of CUDA.
        torch=$(grep -oE '^torch==[^ ]+' "$lock")
        pip install -qq --dry-run --no-deps --report "$venv/torch.json" "$torch"
        cure="let it see PyTorch's own CPU index (pip's extra-index setting), or use scripts/install.sh gpu"
        "$venv/bin/python" - "$venv/torch.json" <<'END' || fail "pip would take the CUDA build of $torch: $cure"
import json, sys
found = [entry["metadata"]["version"] for entry in json.load(open(sys.argv[1]))["install"]]
if not found:  # there already
    from importlib.metadata import version
    found = [version("torch")]
sys.exit(not all(name.endswith("+cpu") for name in found))
END
    fi
    echo "install.sh: installing the $profile set ($(grep -c '==' "$lock") packages) into $venv"
    # Byte code of all 200 packages would double the time. What a run imports is compiled below.
    pip install -qq --no-compile --no-deps -r "$lock"
    echo "$wanted" >"$lock_stamp"
fi
[[ $extent == --lock-only ]] && exit

wanted="$root $(sha256sum <"$root/pyproject.toml")"
if [[ ! -f $package_stamp || $(<"$package_stamp") != "$wanted" ]]; then
    # The build needs setuptools, which the lock has: no second download of it.
    pip install -qq --no-deps --no-build-isolation -e "$root"
    # Once, here: otherwise the actors, which start together, would each compile the same modules.
    errors=$(PYTHONDONTWRITEBYTECODE='' "$venv/bin/python" -c \
        "import rlhf_ray.cli.app, rlhf_ray.controllers.train, rlhf_ray.engines.rollout, rlhf_ray.engines.training" \
        2>&1 >/dev/null) || printf 'install.sh: first starts will be slower, not all was compiled:\n%s\n' "$errors" >&2
    echo "$wanted" >"$package_stamp"
fi
# DeepSpeed compiles a small operator at its first start.
command -v g++ >/dev/null || echo "install.sh: g++ is missing; DeepSpeed needs it at its first start" >&2
if [[ $profile == cpu ]] && ! "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
    echo "install.sh: libnuma is missing (Debian's package libnuma1); vLLM needs it on CPU" >&2
fi
