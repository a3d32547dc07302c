import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.kernel import IrOpPriorityConfig
from vllm.model_executor.layers.activation import SiluAndMul

from rlhf_ray.engines import cpu_kernels

# Of one rounding step in each format; the kernels may round in another place than torch.
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
ROWS, WIDTHS = st.integers(1, 70), st.sampled_from([1, 8, 16, 40, 48, 576])
DTYPES = st.sampled_from(list(CLOSE))


@pytest.fixture(autouse=True, scope="module")
def priority() -> None:
    """As in an engine's worker."""
    native = {"rms_norm": ["native"], "fused_add_rms_norm": ["native"], "gelu_and_mul_sparse": ["native"]}
    ours = {name: [*providers, "native"] for name, providers in cpu_kernels.PRIORITY.items()}
    IrOpPriorityConfig(**{**native, **ours}).set_default()


@settings(deadline=None, max_examples=30)
@given(rows=ROWS, width=WIDTHS, dtype=DTYPES)
def test_norms_are_those_of_torch(rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((rows, width), (rows, width), (width,)))
    added = x.float() + residual.float()

    normed = ir.ops.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(normed.float(), _rms_norm(x, weight), **CLOSE[dtype])

    output, total = ir.ops.fused_add_rms_norm.maybe_inplace(x.clone(), residual.clone(), weight, 1e-5)
    torch.testing.assert_close(total.float(), added, **CLOSE[dtype])
    torch.testing.assert_close(output.float(), _rms_norm(total, weight), **CLOSE[dtype])


def test_norms_of_a_slice_are_those_of_torch() -> None:
    """Models norm queries and keys that lie inside a wider tensor."""
    wide, weight = torch.randn(5, 3, 64), torch.randn(16)
    x = wide[..., 16:32]
    torch.testing.assert_close(ir.ops.rms_norm(x, weight, 1e-5), _rms_norm(x, weight), **CLOSE[torch.float32])
    output, _ = ir.ops.fused_add_rms_norm.maybe_inplace(x, torch.zeros_like(x), weight, 1e-5)
    torch.testing.assert_close(output, _rms_norm(wide[..., 16:32].clone(), weight), **CLOSE[torch.float32])


def test_kernels_are_used() -> None:
    x, weight = torch.randn(4, 64), torch.randn(64)
    assert ir.ops.rms_norm.dispatch(x, weight, 1e-5).provider == cpu_kernels.PROVIDER
    assert ir.ops.fused_add_rms_norm.dispatch(x, x, weight, 1e-5).provider == cpu_kernels.PROVIDER
    with set_current_vllm_config(VllmConfig()):
        assert SiluAndMul().forward_cpu.__func__ is not SiluAndMul.forward_cpu


@settings(deadline=None, max_examples=30)
@given(rows=ROWS, width=WIDTHS, dtype=DTYPES)
def test_activation_is_that_of_torch(rows: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, 2 * width).to(dtype)
    gate, up = x.float().chunk(2, dim=-1)
    with set_current_vllm_config(VllmConfig()):
        found = SiluAndMul().forward_cpu(x)
    torch.testing.assert_close(found.float(), F.silu(gate) * up, **CLOSE[dtype])


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.float()
