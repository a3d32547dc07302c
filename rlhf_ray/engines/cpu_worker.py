"""What each worker of an engine imports on CPU, through `worker_extension_cls`: our gloo backend and the C kernels."""

from rlhf_ray.engines import cpu_kernels
from rlhf_ray.engines.weight_transfer import gloo

__all__ = ["WorkerExtension", "cpu_kernels", "gloo"]


class WorkerExtension:
    """A base class that vLLM adds to its worker's; it is here only to be imported."""
