"""A job in one process: real groups, workers and controllers over engines whose numbers are functions of the tokens.

There is no Ray and no model. A reference to an object is a `Ref`; an actor's method runs when it is called. Every
token of a response is one that no other response has, so what an engine gets tells which sample it is of, and what a
role must receive can be computed from the numbers of the tokens alone.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from rlhf_ray.actors import policy, reference, reward, trained
from rlhf_ray.actors.group import Calls
from rlhf_ray.actors.shards import GeneratedShard, ShardFacts
from rlhf_ray.config.jobs import Job, PPOJob
from rlhf_ray.config.roles import Level, RoleSpec
from rlhf_ray.controllers.inputs import PPOInputs
from rlhf_ray.controllers.ppo import PPOController
from rlhf_ray.controllers.ppo_roles import start_ppo_roles
from rlhf_ray.controllers.run_folder import Checkpointing, RunFolder
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.data.trajectory import Trajectory, TrajectoryBatch, offsets_of
from rlhf_ray.recovery.checkpoints import CheckpointStore
from rlhf_ray.telemetry.trace import SpanRecorder

# So far a log-prob or a value moves in one optimizer step, times a number between -1 and 1: some ratios are clipped.
DRIFT = 0.25


def number(name: str, token: int) -> float:
    """A number between -1 and 1 that a token has under a name."""
    return zlib.crc32(f"{name}:{token}".encode()) / 2**31 - 1


def float32(value: float) -> float:
    return float(np.float32(value))


def output(name: str, token: int, steps: int = 0) -> float:
    """What an engine says of a token after so many optimizer steps: a log-prob, a value or a score."""
    level = -1.5 if name in ("policy", "reference", "engine") else 0.3
    return float32(level + 0.7 * number(name, token) + DRIFT * steps * number(f"{name} drift", token))


def entropy_of(token: int) -> float:
    return float32(2 + number("entropy", token))


def response_of(uid: str, sample_index: int) -> list[int]:
    """Tokens of a response, which no other response has."""
    length = 2 + zlib.crc32(f"{uid}#{sample_index}".encode()) % 7
    return [zlib.crc32(f"{uid}#{sample_index}/{place}".encode()) % 2**30 for place in range(length)]


def is_action(response: Sequence[int], place: int) -> bool:
    return place == 0 or number("mask", response[place]) > -0.5


def is_truncated(response: Sequence[int]) -> bool:
    return number("cut", response[0]) > 0.2


@dataclass(eq=False)
class Ref:
    """A reference to an object, or to the error that making it ended with."""

    value: Any
    error: Exception | None = None


def get(refs: Any, timeout: float | None = None) -> Any:
    if isinstance(refs, Ref):
        if refs.error is not None:
            raise refs.error
        return refs.value
    return [get(ref) for ref in refs]


@dataclass
class Pass:
    """A micro-batch that an engine took the gradient of, by token.

    Attributes:
        step: optimizer steps that the engine had made before.
        gradient: of the loss, by each token's log-prob or value.
        entropy_gradient: the same by its entropy.
        last: of its optimizer step, as the worker said.
    """

    step: int
    gradient: dict[int, float]
    entropy_gradient: dict[int, float]
    last: bool


@dataclass
class World:
    """All that happens in a job.

    Attributes:
        events: in order: (role, what, detail).
        engines: of each role, in rank order.
        logged: metrics by step.
        samples: sample rows by step.
        requests: of each call of the rollout, shard by shard.
        spoil: tokens whose log-probs are NaN from a number of optimizer steps on.
        level: added to all log-probs of a policy after a number of optimizer steps, in place of the drift.
    """

    events: list[tuple[str, str, Any]] = field(default_factory=list)
    engines: dict[str, list["ScriptedEngine"]] = field(default_factory=dict)
    logged: dict[int, dict[str, float]] = field(default_factory=dict)
    samples: dict[int, list[Any]] = field(default_factory=dict)
    requests: list[list[list[Any]]] = field(default_factory=list)
    spoil: bool = False
    level: dict[int, float] | None = None
    grad_norm: float = 0.5
    rollout: "ScriptedRollout | None" = None

    def phases(self, *wanted: str) -> list[str]:
        """Methods that were called, each rank's once, as `role.method`."""
        found: list[str] = []
        for role, what, _ in self.events:
            name = f"{role}.{what}"
            if what in wanted and (not found or found[-1] != name):
                found.append(name)
        return found

    def passes(self, role: str) -> list[Pass]:
        return [each for engine in self.engines[role] for each in engine.passes]


class ScriptedEngine:
    """Instead of a model. Scalar models have one output per place, causal ones a log-prob and an entropy per target."""

    sequence_parallel = 1
    sharded = False

    def __init__(self, world: World, kind: str, source: str, trains: bool, total_steps: int = 0) -> None:
        self.world, self.kind, self.trains, self.total_steps = world, kind, trains, total_steps
        if kind == "causal":
            self.name = "policy" if trains else "reference"
        else:
            self.name = "critic" if trains else source
        self.model = SimpleNamespace(adapters=True)
        self.steps, self.passes, self.level = 0, list[Pass](), Level.FULL
        self.temperatures: list[float] = []
        self._tokens: list[int] = []
        self._leaves: list[torch.Tensor] = []

    def __call__(
        self,
        packed: Any,
        positions: torch.Tensor,
        targets: torch.Tensor | None = None,
        temperature: float = 1.0,
        recompute: str = "",
    ) -> Any:
        assert self.level >= Level.WEIGHTS, f"{self.name} has no weights on its device"
        ids = packed.input_ids[0]
        if self.kind == "scalar" and not self.trains:
            return torch.tensor([output(self.name, token) for token in ids[positions].tolist()])
        tokens = ids[positions + 1].tolist()
        leaves = [torch.tensor([self._output(token) for token in tokens])]
        if targets is not None:
            assert targets.tolist() == tokens
            self.temperatures.append(temperature)
            leaves.append(torch.tensor([entropy_of(token) for token in tokens]))
        if self.trains and torch.is_grad_enabled():
            assert self.level == Level.FULL
            self._tokens, self._leaves = tokens, [leaf.requires_grad_() for leaf in leaves]
        return leaves[0] if targets is None else tuple(leaves)

    def _output(self, token: int) -> float:
        if not self.model.adapters:
            return output("adapters off", token)
        if self.world.spoil and self.trains and torch.is_grad_enabled():
            return float("nan")
        if self.world.level is not None and self.name == "policy":
            return float32(output("policy", token) + self.world.level[self.steps])
        return output(self.name, token, self.steps)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        gradients = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        by_token = [
            dict(zip(self._tokens, [0.0] * len(self._tokens) if grad is None else grad.tolist(), strict=True))
            for grad in gradients
        ]
        self.passes.append(Pass(self.steps, by_token[0], by_token[1] if len(by_token) > 1 else {}, last))

    def step(self) -> Any:
        self.steps += 1
        return SimpleNamespace(grad_norm=self.world.grad_norm, lr=0.1 * self.steps)

    def move(self, level: Level) -> None:
        self.level = level

    def save(self, folder: Path) -> None:
        assert self.level == Level.FULL
        (folder / "steps.json").write_text(json.dumps(self.steps))

    def load(self, folder: Path) -> None:
        assert self.level == Level.FULL
        self.steps = json.loads((folder / "steps.json").read_text())


class ScriptedSync:
    """Gives the weights of a policy to the rollout, which knows them by the steps that were made."""

    def __init__(self, world: World, engine: ScriptedEngine) -> None:
        self.world, self.engine = world, engine

    def send(self, version: int) -> None:
        assert self.world.rollout is not None
        assert self.engine.level >= Level.WEIGHTS
        self.world.rollout.receive(version, self.engine.steps)


class LocalActor:
    """A worker whose methods run when they are called."""

    def __init__(self, world: World, role: str, worker: Any) -> None:
        self.world, self.role, self.worker = world, role, worker

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any, **kwargs: Any) -> Ref:
            args = tuple(get(each) if isinstance(each, Ref) else each for each in args)
            if name not in ("drain_spans", "make_training_shard"):
                self.world.events.append((self.role, name, args[0] if args else None))
            try:
                return Ref(self._run(name, args, kwargs))
            except Exception as error:  # as Ray does, for those who wait
                return Ref(None, error)

        def remote_for_two(*args: Any) -> tuple[Ref, Ref]:
            self.world.events.append((self.role, name, self.worker.rank))
            first, second = self._run(name, args, {})
            return Ref(first), Ref(second)

        return SimpleNamespace(
            remote=remote,
            options=lambda num_returns: SimpleNamespace(remote=remote_for_two),
        )

    def _run(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "address":
            return "host", 1
        if name == "join":
            return None
        if name == "connect":
            self.worker._sync = ScriptedSync(self.world, self.worker.engine)
            return None
        found = getattr(self.worker, name)(*args, **kwargs)
        if name == "load_model":
            self.world.engines.setdefault(self.role, []).append(self.worker.engine)
        return found


class ScriptedRollout:
    """Engines that answer each request in the one way that there is; the last shard is complete first."""

    role = "rollout"

    def __init__(self, world: World) -> None:
        self.world, self.actors = world, ["an engine"]
        self.version: int | None = None
        self.policy_steps: int | None = None
        self.level = Level.FULL
        world.rollout = self

    def load_model(self, setup: Any) -> Calls[None]:
        self.setup = setup
        self.version, self.policy_steps = 0, 0
        self.world.events.append(("rollout", "load_model", None))
        return Calls([Ref(None)], "rollout: load_model")

    def receive(self, version: int, policy_steps: int) -> None:
        self.version, self.policy_steps = version, policy_steps

    def move(self, level: Level) -> Calls[None]:
        self.world.events.append(("rollout", "move", level))
        if level == Level.OUT:
            self.version = self.policy_steps = None
        self.level = level
        return Calls([Ref(None)], "rollout: move")

    def drain_spans(self) -> Calls[Any]:
        return Calls([Ref([])], "rollout: drain_spans")

    def generate(self, shards: Sequence[Sequence[Any]], version: int) -> Iterator[GeneratedShard]:
        assert self.version is not None, "generates without weights"
        assert self.level == Level.FULL
        self.world.events.append(("rollout", "generate", (version, self.version, self.policy_steps)))
        self.world.requests.append([list(shard) for shard in shards])
        for place, requests in reversed(list(enumerate(shards))):
            batch = TrajectoryBatch.of([trajectory_of(request, self.version) for request in requests])
            yield GeneratedShard(place, len(shards), Ref(batch), ShardFacts.of(batch, version))


def trajectory_of(request: Any, version: int) -> Trajectory:
    response = response_of(request.uid, request.sample_index)
    return Trajectory(
        uid=request.uid,
        sample_index=request.sample_index,
        seed=request.seed,
        prompt_tokens=request.tokens,
        response_tokens=response,
        engine_logprobs=[output("engine", token) for token in response],
        weight_versions=[version] * len(response),
        finish_reason="length" if is_truncated(response) else "stop",
        loss_mask=[is_action(response, place) for place in range(len(response))],
    )


class ScriptedActors:
    """Starts workers as `Actors` does."""

    def __init__(self, world: World) -> None:
        self.world = world

    def ranks(self, role: RoleSpec, worker: Callable[..., Any], group: Callable[..., Any], config: Job) -> Any:
        engine = role.model_engine
        assert engine is not None
        actors = [
            LocalActor(self.world, role.name, worker(role.name, rank, role.ranks, config.seed, False))
            for rank in range(role.ranks)
        ]
        return group(role.name, actors, engine.sequence_parallel, sharded=engine.zero_stage == 3)

    def engines(self, *args: Any, **kwargs: Any) -> Any:
        return ScriptedRollout(self.world)


class ScriptedTokenizer:
    def decode(self, token_ids: list[int], **options: Any) -> str:
        return " ".join(map(str, token_ids))


def script(monkeypatch: pytest.MonkeyPatch) -> World:
    """A world without Ray and models, until the test is over."""
    world = World()
    monkeypatch.setattr(ray, "put", Ref)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda refs, **_: (list(refs), []))
    sender = "rlhf_ray.engines.weight_transfer.sender"
    monkeypatch.setitem(__import__("sys").modules, sender, ModuleType(sender))
    for module in (trained, reference):
        monkeypatch.setattr(module, "load_causal", lambda source, **_: ("causal", source))
    for module in (trained, reward):
        monkeypatch.setattr(module, "load_scalar", lambda source, **_: ("scalar", source))
    monkeypatch.setattr(
        trained,
        "TrainingEngine",
        lambda model, engine, optimizer, steps: ScriptedEngine(world, model[0], model[1], True, steps),
    )
    for module in (reference, reward):
        monkeypatch.setattr(
            module, "ForwardEngine", lambda model, engine: ScriptedEngine(world, model[0], model[1], False)
        )
    for module in (policy, reference):
        monkeypatch.setattr(module, "load_tokenizer", lambda source, **_: None)
        monkeypatch.setattr(module, "count_ids", lambda tokenizer: None)
    monkeypatch.setattr(reward, "positions_of", lambda source, **_: None)
    return world


class ScriptedFolder(RunFolder):
    """A run folder with real checkpoints, whose metrics and samples go to the world."""

    def __init__(self, config: Job, world: World) -> None:
        self.path = Path(config.run.dir)
        self.path.mkdir(parents=True, exist_ok=True)
        self._config = config
        self.checkpoints = CheckpointStore(self.path, config.run.keep_last, config.run.keep_best)
        self.resumed = self.checkpoints.latest()
        self.recorder = SpanRecorder()
        self._timeline = None
        self._world = world
        self._exported = SimpleNamespace(phases=lambda role, spans: None)  # type: ignore[assignment]
        self.samples = SimpleNamespace(append=world.samples.__setitem__)  # type: ignore[assignment]

    def start_progress(self) -> None:
        pass

    def log_step(self, step: int, metrics: Any) -> None:
        assert step not in self._world.logged
        self._world.logged[step] = dict(metrics)


def prompts(count: int) -> PromptSet:
    lengths = [1 + place % 3 for place in range(count)]
    return PromptSet(
        uids=tuple(f"p{place}" for place in range(count)),
        token_ids=np.arange(sum(lengths), dtype=np.int32),
        offsets=offsets_of(lengths),
        dropped=0,
        truncated=0,
    )


def start_ppo(config: PPOJob, world: World, prompt_count: int = 10) -> PPOController:
    """The controller of a job in this world."""
    inputs = PPOInputs(config.run.steps, ScriptedTokenizer(), prompts(prompt_count), [True, True])
    folder = ScriptedFolder(config, world)
    roles = start_ppo_roles(config, inputs, ScriptedActors(world))  # type: ignore[arg-type]
    parts: dict[str, Any] = {"policy": roles.policy}
    if roles.critic is not None:
        parts["critic"] = roles.critic
    checkpointing = Checkpointing(folder, parts, config.run.timeouts, roles.devices)
    return PPOController(config, inputs, roles, folder, checkpointing)
