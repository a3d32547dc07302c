"""An advantage estimator and a policy loss of one's own."""

import torch

from rlhf_ray.algorithms.estimators import SampleInputs
from rlhf_ray.config.plugs import Estimator, PolicyLoss

SIGNED = Estimator("toy_plugs:signed", groups=True)
LEARNT_ALONE = PolicyLoss("rlhf_ray.algorithms.policy_loss:clipped_policy_loss", columns=("engine_logprobs",))
VALUED = Estimator("rlhf_ray.algorithms.estimators:gae_of_tokens", per_token=True, values=True)


def signed(inputs: SampleInputs) -> torch.Tensor:
    """1 for a sample of a positive return, -1 for one of a negative."""
    return inputs.returns.double().sign()
