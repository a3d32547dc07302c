"""Whether a CPU multiplies in bfloat16: read from its flags, and held back by oneDNN's variables as oneDNN is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.platform import cpu_products

HASWELL = "processor\t: 0\nmodel name\t: a CPU\nflags\t\t: fpu sse4_1 avx avx2 fma\nbugs\t\t: none"
SKYLAKE = HASWELL.replace("fma", "fma avx512f avx512bw avx512vl avx512dq")
ZEN4 = SKYLAKE.replace("fma", "fma avx512_bf16")
SAPPHIRE_RAPIDS = ZEN4.replace("fma", "fma amx_bf16 amx_tile")


@pytest.mark.parametrize(
    ("cpuinfo", "environ", "why"),
    [
        (ZEN4, {}, "has AVX512_BF16"),
        (SAPPHIRE_RAPIDS, {}, "has AVX512_BF16 and AMX_BF16"),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "has AVX512_BF16"),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "a word that oneDNN does not know"}, "has AVX512_BF16"),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "ALL", "DNNL_MAX_CPU_ISA": "AVX2"}, "has AVX512_BF16"),
        (ZEN4, {"ATEN_CPU_CAPABILITY": "avx2"}, "has AVX512_BF16"),
    ],
)
def test_products_in_bfloat16(cpuinfo: str, environ: dict[str, str], why: str) -> None:
    found = cpu_products(cpuinfo, environ)
    assert found.in_bfloat16
    assert found.why == why


@pytest.mark.parametrize(
    ("cpuinfo", "environ", "why", "slower"),
    [
        (HASWELL, {}, "has neither AVX512_BF16 nor AMX", "4 to 60 times as long"),
        (SKYLAKE, {}, "has neither AVX512_BF16 nor AMX", "1.3 times as long"),
        ("", {}, "has neither AVX512_BF16 nor AMX", "4 to 60 times as long"),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "avx2"}, "is held to AVX2 by ONEDNN_MAX_CPU_ISA", "4 to 60 times as long"),
        (ZEN4, {"DNNL_MAX_CPU_ISA": "AVX2"}, "is held to AVX2 by DNNL_MAX_CPU_ISA", "4 to 60 times as long"),
        (
            ZEN4,
            {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
            "is held to AVX512_CORE by ONEDNN_MAX_CPU_ISA",
            "1.3 times as long",
        ),
    ],
)
def test_no_products_in_bfloat16(cpuinfo: str, environ: dict[str, str], why: str, slower: str) -> None:
    found = cpu_products(cpuinfo, environ)
    assert not found.in_bfloat16
    assert (found.why, found.times_as_long) == (why, slower)


VALIDATE = (
    "import sys; from rlhf_ray.cluster.processors import look_here; from rlhf_ray.config.number_formats import choose;"
    "from rlhf_ray.config.loading import load_config; from pathlib import Path;"
    "found = choose(load_config(Path(sys.argv[1])), look_here(load_config(Path(sys.argv[1]))));"
    "sys.stdout.write(found.config.policy.engine.dtype)"
)
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("held", "dtype"), [({}, ""), ({"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, "float32")]
)
def test_the_choice_follows_the_machine(held: dict[str, str], dtype: str) -> None:
    """Of this machine, as it is and held back as an older one."""
    flags = Path("/proc/cpuinfo").read_text().split()
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_MAX_CPU_ISA")}
    done = subprocess.run(
        [sys.executable, "-c", VALIDATE, QUICKSTART], capture_output=True, text=True, timeout=120, env=environ | held
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (dtype or ("bfloat16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "float32"))
