"""Memory of processes before they hold a model: interpreter, libraries, and what a GPU needs of each."""

from rlhf_ray.config.base import NonNegativeFloat, Section

MIB = 2**20


class ProcessMemory(Section):
    """What processes take beside their model; `rlhf-ray calibrate` measures those on the host."""

    rank_mib: NonNegativeFloat = 650.0
    """Host memory of a rank that trains or scores."""
    trainer_mib: NonNegativeFloat = 150.0
    """Host memory that a rank that trains on the CPU takes more: what DeepSpeed and the allocator keep."""
    sender_mib: NonNegativeFloat = 250.0
    """Host memory that a rank of the policy takes more, which has imported vLLM to send weights."""
    engine_mib: NonNegativeFloat = 1500.0
    """Host memory of a rollout engine with one worker, all its processes together."""
    worker_mib: NonNegativeFloat = 650.0
    """Host memory of every further worker of an engine, and of a worker of a reward function or service."""
    controller_mib: NonNegativeFloat = 900.0
    """Host memory of the process that runs the job."""
    node_mib: NonNegativeFloat = 600.0
    """Host memory of Ray's own processes on a node."""
    context_mib: NonNegativeFloat = 1000.0
    """Device memory of a process on a GPU: CUDA, its kernels, NCCL's buffers."""
    graphs_mib: NonNegativeFloat = 1000.0
    """Device memory of an engine's CUDA graphs, beside its share of the device."""
    on_gpu_mib: NonNegativeFloat = 1500.0
    """Host memory that a process takes more when it drives a GPU."""

    def bytes_of(self, name: str) -> int:
        """A field in bytes."""
        return int(getattr(self, name) * MIB)
