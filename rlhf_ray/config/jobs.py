"""The job types, by the name that a config has for them."""

from rlhf_ray.config.epoch_job import EpochJob
from rlhf_ray.config.job import Job
from rlhf_ray.config.ppo_job import PPOJob
from rlhf_ray.config.preference_job import PreferenceJob
from rlhf_ray.config.reward_model_job import RewardModelJob
from rlhf_ray.config.sft_job import SFTJob
from rlhf_ray.config.training import RewardModel

__all__ = [
    "JOB_TYPES",
    "EpochJob",
    "Job",
    "PPOJob",
    "PreferenceJob",
    "RewardModel",
    "RewardModelJob",
    "SFTJob",
]

JOB_TYPES: dict[str, type[Job]] = {
    "ppo": PPOJob,
    "preference": PreferenceJob,
    "reward_model": RewardModelJob,
    "sft": SFTJob,
}
