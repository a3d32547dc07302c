"""Policy and engine together, as actors that are started and called as a PPO run does it: needs Ray and vLLM too.

Both are imported inside the functions, so that the table names these checks where they are not installed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.gpu_check.check import CheckFailed, Setting, at_most, equal
from benchmarks.gpu_check.training import whole_weights
from rlhf_ray.config.roles import Level
from rlhf_ray.config.rollout import Rollout, RolloutEngine, Sampling
from rlhf_ray.config.training import Policy, TrainingEngine
from rlhf_ray.data.requests import PromptRequest
from rlhf_ray.platform import transfer_backend

if TYPE_CHECKING:
    from rlhf_ray.actors.policy import PolicyGroup, PolicyWorker
    from rlhf_ray.actors.rollout import RolloutGroup

_THREADS = 2
_PROMPTS, _NEW = 4, 12
_NEAR_NATS = 0.1
"""Where the trainer finds two tokens as likely as that, rounding may decide between them."""


def sync(setting: Setting, *, together: bool) -> str:
    """A weight sync: to an engine on the policy's device, or on one of its own."""
    from benchmarks.roles import TIMEOUTS, send_weights

    with _pair(setting, together) as (policy, engine):
        before = _greedy(engine, 0)
        for version in (1, 2):
            _change_weights(policy, version)
            seconds = send_weights(policy, version)
            equal("the engine's version", engine.versions().wait(TIMEOUTS.sync), [version])
            tokens = _greedy(engine, version)
            _check_greedy(setting, policy, tokens)
            if tokens == before:
                raise CheckFailed("the engine generates the same tokens after a change of all weights")
            before = tokens
    return f"{transfer_backend(together)}: greedy tokens and versions are the trainer's; {seconds:.2f} s a sync"


def sleep_and_wake(setting: Setting) -> str:
    """The same greedy tokens before and after the engine has left its device, a checkpoint and a showcase between."""
    from benchmarks.roles import TIMEOUTS, send_weights
    from rlhf_ray.engines.held_weights import WeightsMissing

    with _pair(setting, together=True) as (policy, engine):
        _change_weights(policy, 1)
        send_weights(policy, 1)
        wanted = _greedy(engine, 1)
        for between in ("checkpoint", "showcase"):
            engine.move(Level.OUT).wait(TIMEOUTS.sync)
            if between == "checkpoint":
                policy.save(setting.scratch / "checkpoint").wait(TIMEOUTS.checkpoint)
            try:
                _greedy(engine, 1)
            except WeightsMissing:
                pass
            else:
                raise CheckFailed(f"an engine that has left for a {between} generates without weights")
            for level in (Level.OUT, Level.FULL):
                policy.move(level).wait(TIMEOUTS.sync)
            engine.move(Level.WEIGHTS).wait(TIMEOUTS.sync)
            send_weights(policy, 1)
            engine.move(Level.FULL).wait(TIMEOUTS.sync)
            equal(f"what it generates after a {between}", _greedy(engine, 1), wanted)
    return "greedy tokens are the same after checkpoint and showcase; without weights it refuses to generate"


def rollout(setting: Setting) -> str:
    """Response tokens/s of the engine in its actor, as a share of bare vLLM's."""
    from benchmarks.bare_rollout import bare_rates
    from benchmarks.common import FreshProcess
    from benchmarks.roles import rollout_role, sample_rates
    from rlhf_ray.actors.start import SHARE_CORES

    prompts, new_tokens = (256, 128) if setting.on_gpu else (16, 16)
    batches, section, model = [_requests(prompts)] * 4, _section(setting, new_tokens), setting.large
    with _ray(), rollout_role(model, section, setting.dtype, threads=_THREADS, gpus=setting.gpus_each) as engine:
        mine = max(sample_rates(engine, section, batches))
    with FreshProcess(_THREADS, SHARE_CORES) as process:
        bare = max(process.call(bare_rates, model, setting.dtype, section, batches))
    # On a CPU the model is so small that what surrounds it counts: the number is told, not judged.
    if setting.on_gpu and not mine / bare > 0.8:
        raise CheckFailed(f"{mine:,.0f} tokens/s are {mine / bare:.2f} of bare vLLM's {bare:,.0f}, less than 0.8")
    return f"{mine:,.0f} tokens/s, {mine / bare:.2f} of bare vLLM's"


@contextmanager
def _pair(setting: Setting, together: bool) -> Iterator[tuple["PolicyGroup", "RolloutGroup"]]:
    from benchmarks.roles import policy_and_engines

    engine = TrainingEngine.model_validate({"zero_stage": 2, "dtype": setting.dtype})
    policy, section = Policy(model=str(setting.tiny), engine=engine), _section(setting, _NEW)
    gpus = setting.gpus_each
    with _ray(), policy_and_engines(policy, section, threads=_THREADS, gpus=gpus, together=together) as pair:
        yield pair


@contextmanager
def _ray() -> Iterator[None]:
    """A cluster whose actors' output goes to the log."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=True, address="local")
    try:
        yield
    finally:
        ray.shutdown()


def _section(setting: Setting, new_tokens: int) -> Rollout:
    size = {"max_num_seqs": 256, "gpu_memory_utilization": 0.4} if setting.on_gpu else {"max_num_seqs": 16}
    return Rollout(
        sampling=Sampling(temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True),
        engine=RolloutEngine.model_validate({"max_model_len": 256, **size}),
    )


def _requests(count: int) -> list[PromptRequest]:
    prompts = [np.random.default_rng(n).integers(3, 500, 8 + n % 8).astype(np.int32) for n in range(count)]
    return [PromptRequest(f"p{n}", 0, n, tokens) for n, tokens in enumerate(prompts)]


def _greedy(engine: "RolloutGroup", version: int) -> list[list[int]]:
    from benchmarks.roles import sample

    batch = sample(engine, _requests(_PROMPTS), version)
    return [batch.response(number).tolist() for number in range(len(batch))]


def _check_greedy(setting: Setting, policy: "PolicyGroup", responses: list[list[int]]) -> None:
    """Raise `CheckFailed` where a token is not the likeliest by the trainer's weights."""
    import ray
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(setting.tiny, dtype=torch.float32)
    weights = policy.actors[0].__ray_call__.remote(lambda worker: whole_weights(worker.engine.model))
    theirs.load_state_dict(ray.get(weights), strict=False)
    worst = 0.0
    for request, response in zip(_requests(_PROMPTS), responses, strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([[*request.tokens.tolist(), *response]])).logits[0]
        log_p = logits[len(request.tokens) - 1 : -1].log_softmax(-1)
        chosen = log_p.gather(-1, torch.tensor(response)[:, None])[:, 0]
        worst = max(worst, float((log_p.amax(-1) - chosen).max()))
    at_most("nats from the trainer's likeliest token to the engine's", worst, _NEAR_NATS)


def _change_weights(policy: "PolicyGroup", seed: int) -> None:
    """Scale every weight by random factors. The optimizer's copies are left alone: no step follows."""
    import ray

    ray.get(policy.actors[0].__ray_call__.remote(_scale_weights, seed))


def _scale_weights(worker: "PolicyWorker", seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in worker.engine.model.parameters():
            factors = 1 + 0.3 * torch.randn(parameter.shape, generator=random)
            parameter.mul_(factors.to(parameter.device, parameter.dtype))
