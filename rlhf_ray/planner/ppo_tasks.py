"""What the roles do in one PPO step and what waits for what, as `controllers/ppo.py` orders it.

A shard is scored when its slowest response is complete, while others are generated. Advantages need all of them; then
policy and critic are updated at the same time, and the new weights go to the engines. With `placement.offload_idle`,
roles that share places come to their devices and leave them between these phases.
"""

from collections.abc import Collection

from rlhf_ray.cluster.sharing import DeviceSharing, Phase
from rlhf_ray.config.jobs import PPOJob, shard_count
from rlhf_ray.config.roles import Level
from rlhf_ray.config.sharing import shared_places
from rlhf_ray.planner.decoding import Engine, shard_arrivals
from rlhf_ray.planner.devices import GB
from rlhf_ray.planner.lengths import Lengths
from rlhf_ray.planner.passes import Ranks
from rlhf_ray.planner.seats import Seats, ranks_of
from rlhf_ray.planner.timeline import SWITCH, Task
from rlhf_ray.planner.work import BYTES, Sequences
from rlhf_ray.planner.workload import RolloutRole, Workload

# Shards are followed in so many waves: enough of them to see scoring overlap with generation.
_WAVES = 8
# Token, its log-prob and version from the engine, and four columns of numbers to train on.
_TOKEN_BYTES = 28


def ppo_tasks(
    workload: Workload, config: PPOJob, seats: Seats, lengths: Lengths, cached_tokens: int | None
) -> list[Task]:
    """The tasks of one step, in an order in which none waits for a later one.

    Args:
        cached_tokens: that the KV cache of one engine has room for; None for as many as it can use.
    """
    return _Step(workload, config, seats, lengths, cached_tokens).tasks()


class _Step:
    def __init__(
        self, workload: Workload, config: PPOJob, seats: Seats, lengths: Lengths, cached_tokens: int | None
    ) -> None:
        self._config, self._seats, self._lengths = config, seats, lengths
        self._scoring: dict[str, list[Ranks]] = {}
        for role in workload.roles:
            if isinstance(role, RolloutRole):
                self._engine = _engine(role, seats, lengths, config.data.samples_per_prompt, cached_tokens)
                continue
            self._scoring.setdefault(role.seat, []).append(ranks_of(role, seats.of[role.seat]))
        [self._policy], [self._critic] = self._scoring["policy"], self._scoring["critic"]
        if config.policy_is_reference:
            self._scoring["policy"] *= 2  # once more, with its adapters off
        self._shards = shard_count(config.samples_per_step, config.rollout.shard_samples)
        self._arrivals = self._generated()
        self._sharing = DeviceSharing(shared_places(config.places) if config.placement.offload_idle else [])
        self._tasks: list[Task] = []

    def tasks(self) -> list[Task]:
        for _ in range(2):  # roles find their devices as the step before left them
            self._tasks = []
            scored = self._score(self._generate())
            # Each rank of the critic fetches some shards, and three columns of each.
            calls = 4 * self._shards / self._critic.group.ranks * self._critic.constants.ray.call_s
            advantages = self._add("score", "critic", calls, scored)
            self._sync(self._update((advantages,)))
        return self._tasks

    def _generate(self) -> list[tuple[int, int]]:
        """Each wave's task, and the shards that are complete with it."""
        arrivals = self._arrivals
        number = min(_WAVES, len(arrivals))
        waves: list[tuple[int, int]] = []
        before = self._enter("generate", ())
        seconds, shards = 0.0, 0
        for wave in range(1, number + 1):
            done = wave * len(arrivals) // number
            so_far = round(self._shards * done / len(arrivals))
            task = self._add("generate", "rollout", arrivals[done - 1] - seconds, before)
            waves.append((task, so_far - shards))
            before, seconds, shards = (task,), arrivals[done - 1], so_far
        return waves

    def _generated(self) -> list[float]:
        """When one engine's shards are complete; all have as many."""
        engines = self._config.placement.rollout.engines
        finished = self._engine.finish_times(-(-self._config.samples_per_step // engines), self._lengths)
        return sorted(shard_arrivals(finished, -(-self._shards // engines)))

    def _score(self, waves: list[tuple[int, int]]) -> tuple[int, ...]:
        shard = self._sequences(self._config.samples_per_step / self._shards)
        # Engines that must leave their devices first have generated everything before anything is scored; other roles
        # come while the first shards are generated.
        apart = "rollout" in self._sharing.levels
        entered = self._enter("score", (waves[-1][0],) if apart else ())
        last = dict.fromkeys(self._scoring, entered)
        for task, shards in waves:
            for role, models in self._scoring.items():
                seconds = shards * sum(model.scoring_s(shard) for model in models)
                last[role] = (self._add("score", role, seconds, (task, *last[role])),)
        return tuple(task for after in last.values() for task in after)

    def _update(self, after: tuple[int, ...]) -> tuple[int, ...]:
        algorithm, batch = self._config.algorithm, self._sequences(self._config.samples_per_step)
        trained = {"critic": self._critic, "policy": self._policy}
        for turn in self._sharing.turns(trained):
            after = self._enter("update", after, turn)
            updates = []
            for role in turn:
                ranks = trained[role]
                fetched = batch.tokens * _TOKEN_BYTES / (ranks.constants.ray.object_store_gb_s * GB)
                seconds = algorithm.epochs * ranks.update_s(batch, algorithm.optimizer_steps)
                updates.append(self._add(f"{role}_update", role, fetched + seconds, after))
            after = tuple(updates)
        return after

    def _sync(self, after: tuple[int, ...]) -> None:
        policy, rollout = self._policy, self._seats.of["rollout"]
        factors, tensors = policy.constants.weight_sync, sum(tensor.count for tensor in policy.shape.tensors())
        size = policy.weight_bytes
        if self._config.policy.lora is not None and self._config.rollout.lora_sync == "adapters":
            size = policy.trained * BYTES[policy.engine.dtype]
        near = len(rollout.nodes | self._seats.of["policy"].nodes) == 1
        bandwidth = policy.rates.link if near else min(policy.rates.link, policy.rates.network)
        seconds = factors.sync_s + tensors * factors.tensor_s + factors.weights * size / bandwidth
        if policy.engine.zero_stage == 3:
            seconds += policy.group.all_gather_s(size, policy.constants.collectives, policy.shape.layers)
        after = self._enter("sync", after)
        # Nothing else runs meanwhile: the step waits for it.
        self._tasks.append(Task("weight_sync", ("policy", "rollout"), seconds, {}, after))

    def _sequences(self, samples: float) -> Sequences:
        return Sequences.of(samples, self._lengths.prompt, self._lengths.response)

    def _enter(self, phase: Phase, after: tuple[int, ...], only: Collection[str] | None = None) -> tuple[int, ...]:
        """Roles that share devices go and come, as `DeviceSharing` says."""
        before = dict(self._sharing.levels)
        for moves in self._sharing.enter(phase, only):
            after = tuple(
                self._add(SWITCH, role, self._move_s(role, before[role], level), after) for role, level in moves.items()
            )
        return after

    def _move_s(self, role: str, before: Level, level: Level) -> float:
        """Seconds in which a rank's states move between its device and host memory; engines drop theirs, and on a CPU
        both are one."""
        rates = self._seats.of[role].rates
        if role == "rollout" or not rates.ahead:
            return 0.0
        low, high = sorted((before, level))
        size = 0.0
        for ranks in self._scoring[role][:1] if role == "policy" else self._scoring[role]:
            size += ranks.held_bytes if low < Level.WEIGHTS <= high else 0.0
            size += ranks.optimizer_bytes if low < Level.FULL <= high and role in ("policy", "critic") else 0.0
        return size / rates.host

    def _add(self, phase: str, role: str, seconds: float, after: tuple[int, ...]) -> int:
        self._tasks.append(Task(phase, (role,), seconds, self._seats.of[role].needs, after))
        return len(self._tasks) - 1


def _engine(
    role: RolloutRole, seats: Seats, lengths: Lengths, samples_per_prompt: int, cached_tokens: int | None
) -> Engine:
    seat, settings = seats.of["rollout"], role.engine
    slots = settings.max_num_seqs
    if cached_tokens is not None:
        slots = min(slots, int(cached_tokens / (lengths.prompt + lengths.response)))
    return Engine(
        shape=role.shape,
        dtype=role.dtype,
        slots=max(1, slots),
        prompts_shared=samples_per_prompt if settings.prefix_caching else 1,
        rates=seat.rates,
        workers=seat.group,
        constants=seat.constants,
    )
