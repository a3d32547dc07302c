"""Jobs as they are on machines that multiply in bfloat16, whatever this one does."""

from typing import TypeVar, cast

from rlhf_ray.config.jobs import Job
from rlhf_ray.config.number_formats import choose
from rlhf_ray.platform import CpuProducts

JobT = TypeVar("JobT", bound=Job)


def on_bfloat16(config: JobT) -> JobT:
    """The job with bfloat16 in place of every `auto`."""
    return cast(JobT, choose(config, lambda role: {"this machine": CpuProducts(True, "has AMX_BF16")}).config)
