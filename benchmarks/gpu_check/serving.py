"""Policy and engine together: needs Ray and vLLM too. Both are real actors, called as a PPO run calls them."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.gpu_check.check import CheckFailed, Setting, at_most, equal

_WAIT_S = 240
_PROMPTS, _NEW = 4, 12
_NEAR_NATS = 0.1
"""Where the trainer finds two tokens as likely as that, rounding may decide between them."""


def sync(*, together: bool) -> Callable[[Setting], str]:
    """A weight sync: to an engine on the policy's device, or on one of its own."""
    return partial(_sync, together)


def _sync(together: bool, setting: Setting) -> str:
    from rlhf_ray.platform import transfer_backend

    with _pair(setting, together) as pair:
        before = pair.generate(0)
        seconds = []
        for version in (1, 2):
            pair.change_weights(version)
            began = time.perf_counter()
            pair.send(version)
            seconds.append(time.perf_counter() - began)
            equal("the engine's version", pair.wait(pair.engine.version.remote()), version)
            tokens = pair.generate(version)
            pair.check_greedy(tokens)
            if tokens == before:
                raise CheckFailed("the engine generates the same tokens after a change of all weights")
            before = tokens
    return f"{transfer_backend(together)}: greedy tokens and versions are the trainer's; {seconds[-1]:.2f} s a sync"


def sleep_and_wake(setting: Setting) -> str:
    """The same greedy tokens before and after the engine has left its device, a checkpoint and a showcase between."""
    from rlhf_ray.config.roles import Level

    with _pair(setting, together=True) as pair:
        pair.change_weights(1)
        pair.send(1)
        wanted = pair.generate(1)
        levels = [Level.OUT, Level.FULL]
        for between in ("checkpoint", "showcase"):
            pair.wait(pair.engine.move.remote(Level.OUT))
            if between == "checkpoint":
                pair.wait(pair.policy.save.remote(str(setting.scratch / "checkpoint")))
            refused = _refuses(lambda: pair.generate(1))
            for level in levels:
                pair.wait(pair.policy.move.remote(level))
            pair.wait(pair.engine.move.remote(Level.WEIGHTS))
            pair.send(1)
            pair.wait(pair.engine.move.remote(Level.FULL))
            equal(f"what it generates after a {between}", pair.generate(1), wanted)
            if not refused:
                raise CheckFailed(f"an engine that has left for a {between} generates without weights")
    return "greedy tokens are the same after checkpoint and showcase; without weights it refuses to generate"


def rollout(setting: Setting) -> str:
    """Response tokens/s of the engine in its actor, as a share of bare vLLM's."""
    size = (256, 128) if setting.on_gpu else (16, 16)
    with _ray(setting), _engine_actor(setting, setting.large, together=False, sleep=0) as engine:
        mine = max(_rate(lambda: _generate(engine, *size), size) for _ in range(3))
    bare = _bare_rate(setting, *size)
    # On a CPU the model is so small that what surrounds it counts: the number is told, not judged.
    if setting.on_gpu and not mine / bare > 0.8:
        raise CheckFailed(f"{mine:,.0f} tokens/s are {mine / bare:.2f} of bare vLLM's {bare:,.0f}, less than 0.8")
    return f"{mine:,.0f} tokens/s, {mine / bare:.2f} of bare vLLM's"


@dataclass
class _Pair:
    """A policy and an engine.

    Attributes:
        policy, engine: actors.
        model: folder of both.
    """

    policy: Any
    engine: Any
    model: Path

    def wait(self, ref: Any) -> Any:
        """What a call gives."""
        import ray

        return ray.get(ref, timeout=_WAIT_S)

    def change_weights(self, seed: int) -> None:
        """Scale every weight by random factors."""
        self.wait(self.policy.__ray_call__.remote(_scale_weights, seed))

    def send(self, version: int) -> None:
        """Give the engine the policy's weights."""
        self.wait(self.policy.send_weights.remote(version))

    def generate(self, version: int) -> list[list[int]]:
        """The engine's greedy responses."""
        return _generate(self.engine, _PROMPTS, _NEW, version)

    def check_greedy(self, responses: list[list[int]]) -> None:
        """Raise `CheckFailed` where a token is not the likeliest by the trainer's weights."""
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        theirs.load_state_dict(self.wait(self.policy.__ray_call__.remote(_whole_weights)), strict=False)
        worst = 0.0
        for prompt, response in zip(_prompts(_PROMPTS), responses, strict=True):
            with torch.no_grad():
                logits = theirs(torch.tensor([[*prompt.tolist(), *response]])).logits[0, len(prompt) - 1 : -1]
            log_p = logits.log_softmax(-1)
            chosen = log_p.gather(-1, torch.tensor(response)[:, None])[:, 0]
            worst = max(worst, float((log_p.amax(-1) - chosen).max()))
        at_most("nats from the trainer's likeliest token to the engine's", worst, _NEAR_NATS)


@contextmanager
def _pair(setting: Setting, together: bool) -> Iterator[_Pair]:
    with (
        _ray(setting),
        _engine_actor(setting, setting.tiny, together=together, sleep=2 if together else 0) as engine,
        _policy_actor(setting, together=together) as policy,
    ):
        pair = _Pair(policy, engine, setting.tiny)
        host, port = pair.wait(policy.address.remote())
        pair.wait(policy.join.remote(host, port, 120.0))
        pair.wait(policy.load_model.remote(_policy(setting), _ppo(), 1.0, 10, "merged"))
        host, port = pair.wait(policy.address.remote())
        pair.wait(policy.connect.remote([engine], 1, host, port, 2**26, 60.0, together))
        yield pair


@contextmanager
def _ray(setting: Setting) -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, num_gpus=setting.gpus, include_dashboard=False, log_to_driver=True, address="local")
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _engine_actor(setting: Setting, model: Path, *, together: bool, sleep: Literal[0, 1, 2]) -> Iterator[Any]:
    import ray

    from rlhf_ray.actors.rollout import RolloutWorker
    from rlhf_ray.engines.rollout_setup import RolloutSetup

    engine = _start(RolloutWorker, setting, together=together, rank=0)
    try:
        setup = RolloutSetup(
            str(model), _rollout_engine(setting), _dtype(setting), 1, 0, beside_policy=together, sleep=sleep
        )
        ray.get(engine.load_model.remote(setup), timeout=_WAIT_S)
        yield engine
        ray.get(engine.shutdown.remote(), timeout=_WAIT_S)
    finally:
        ray.kill(engine)


@contextmanager
def _policy_actor(setting: Setting, *, together: bool) -> Iterator[Any]:
    import ray

    from rlhf_ray.actors.policy import PolicyWorker

    policy = _start(
        PolicyWorker, setting, together=together, role="policy", rank=0, world_size=1, seed=0, deterministic=False
    )
    try:
        yield policy
    finally:
        ray.kill(policy)


def _start(worker: type, setting: Setting, *, together: bool, **arguments: Any) -> Any:
    from rlhf_ray.actors.start import HIDE_GPUS, QUIET
    from rlhf_ray.actors.watched import actor_class

    env = {"OMP_NUM_THREADS": "2", **HIDE_GPUS, **QUIET}
    gpus = (0.5 if together else 1.0) if setting.on_gpu else 0.0
    return actor_class(worker).options(num_cpus=0, num_gpus=gpus, runtime_env={"env_vars": env}).remote(**arguments)


def _dtype(setting: Setting) -> str:
    return "bfloat16" if setting.on_gpu else "float32"


def _policy(setting: Setting) -> Any:
    from rlhf_ray.config.training import Policy, TrainingEngine

    engine = TrainingEngine.model_validate({"zero_stage": 2, "dtype": _dtype(setting)})
    return Policy(model=str(setting.tiny), engine=engine)


def _ppo() -> Any:
    from rlhf_ray.config.algorithm import PPO

    return PPO()


def _rollout_engine(setting: Setting) -> Any:
    from rlhf_ray.config.rollout import RolloutEngine

    settings: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 256 if setting.on_gpu else 16}
    return RolloutEngine.model_validate(settings | ({"gpu_memory_utilization": 0.4} if setting.on_gpu else {}))


def _prompts(count: int) -> list[np.ndarray]:
    return [np.random.default_rng(n).integers(3, 500, 8 + n % 8).astype(np.int32) for n in range(count)]


def _generate(engine: Any, prompts: int, new_tokens: int, version: int = 0) -> list[list[int]]:
    """Greedy responses of the engine in an actor."""
    import ray

    from rlhf_ray.config.rollout import Sampling
    from rlhf_ray.data.requests import PromptRequest

    sampling = Sampling(temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True)
    requests = [PromptRequest(f"p{n}", 0, n, tokens) for n, tokens in enumerate(_prompts(prompts))]
    call = engine.generate.options(num_returns=2).remote(requests, sampling, version)
    batch = ray.get(call[0], timeout=_WAIT_S)
    return [batch.response(sample).tolist() for sample in range(len(batch))]


def _rate(generate: Callable[[], Any], size: tuple[int, int]) -> float:
    began = time.perf_counter()
    generate()
    return size[0] * size[1] / (time.perf_counter() - began)


def _bare_rate(setting: Setting, prompts: int, new_tokens: int) -> float:
    """Tokens/s of vLLM's own class with the same settings, in this process."""
    engine = _rollout_engine(setting)
    more: dict[str, Any] = {}
    if not setting.on_gpu:
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
        more["enforce_eager"] = True
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=str(setting.large),
        dtype=_dtype(setting),
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        enable_prefix_caching=engine.prefix_caching,
        **more,
    )
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    texts = [TokensPrompt(prompt_token_ids=tokens.tolist()) for tokens in _prompts(prompts)]
    rate = max(_rate(lambda: llm.generate(texts, params, use_tqdm=False), (prompts, new_tokens)) for _ in range(3))
    llm.llm_engine.engine_core.shutdown()
    return rate


def _refuses(work: Callable[[], Any]) -> bool:
    try:
        work()
    except Exception:  # as another process raised it, under Ray's own type
        return True
    return False


def _scale_weights(worker: Any, seed: int) -> None:
    """In the policy's process. The optimizer's copies are left alone: no step follows."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in worker.engine.model.parameters():
            factors = 1 + 0.3 * torch.randn(parameter.shape, generator=random)
            parameter.mul_(factors.to(parameter.device, parameter.dtype))


def _whole_weights(worker: Any) -> dict[str, torch.Tensor]:
    from rlhf_ray.engines.training import full_weights

    return {name: tensor.detach().float().cpu().clone() for name, tensor in full_weights(worker.engine.model, 2**24)}
