"""vLLM's own C kernels for what it leaves to eager torch on CPU: RMS norms and the SwiGLU activation.

vLLM 0.32 has these kernels for CPU but expects `torch.compile` to fuse the torch code, which costs every start of an
engine a compilation. Importing this module registers them; an engine that is given `PRIORITY` uses them.
"""

import torch
from torch import Tensor
from vllm import ir
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.platforms import current_platform

PROVIDER = "rlhf_ray_cpu"
PRIORITY = {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER]}

# Widths that the kernels accept, in elements: of one vector register. Torch computes the others.
_VECTOR = 16

current_platform.import_kernels()


def _fits(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return variance_size is None and weight is not None and weight.dtype == x.dtype and x.shape[-1] % _VECTOR == 0


def _fits_added(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _fits(x, weight, epsilon, variance_size) and x.is_contiguous() and x_residual.is_contiguous()


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    output = torch.empty(x.shape, dtype=x.dtype)
    torch.ops._C.rms_norm(output, x.contiguous(), weight, epsilon)
    return output


def _fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


class _SiluAndMul(SiluAndMul):
    def forward_cpu(self, x: Tensor) -> Tensor:
        width = x.shape[-1] // 2
        if width % _VECTOR:
            native: Tensor = self.forward_native(x)
            return native
        output = torch.empty((*x.shape[:-1], width), dtype=x.dtype)
        torch.ops._C.silu_and_mul(output, x.contiguous())
        return output


if PROVIDER not in ir.ops.rms_norm.impls:  # a module can be imported under two names
    ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_fits)(_rms_norm)
    ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_fits_added, inplace=True)(_fused_add_rms_norm)
    SiluAndMul.register_oot(_SiluAndMul, name="SiluAndMul")
