"""How long a step takes, phase by phase, and how long each role idles meanwhile."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.cluster.sharing import DeviceSharing
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.roles import Level, needs_by_phase
from rlhf_ray.config.rollout import shard_count
from rlhf_ray.config.sharing import shared_places
from rlhf_ray.planner.calibration import Calibration, Device
from rlhf_ray.planner.decoding_time import DecodingEngine, shard_arrivals
from rlhf_ray.planner.devices import GB
from rlhf_ray.planner.hardware import Hardware
from rlhf_ray.planner.jobs import step_sequences, workload_of
from rlhf_ray.planner.pass_time import Ranks
from rlhf_ray.planner.placement import JobDevices, RoleDevices, ranks_of
from rlhf_ray.planner.timeline import SWITCH, Task, TaskSpan, covered, run
from rlhf_ray.planner.work import BYTES, Lengths
from rlhf_ray.planner.workload import RolloutRole, TrainedRole, Workload

# Shards are followed in so many waves: enough of them to see scoring overlap with generation.
_WAVES = 8
# Token, its log-prob and version from the engine, and four columns of numbers to train on.
_TOKEN_BYTES = 28


@dataclass(frozen=True)
class StepTime:
    """A step.

    Attributes:
        seconds: of the whole.
        phases: seconds from the beginning of a phase to its end, named as in the metrics `time/NAME_s`; in PPO scoring
            begins while responses are still generated, and the updates of policy and critic overlap. `SWITCH` is the
            time in which some role comes to its device or leaves it.
        busy_s: seconds in which each role works, in the order of the job's places.
        response_tokens: that the step generates; 0 in a job over a data set.
    """

    seconds: float
    phases: dict[str, float]
    busy_s: dict[str, float]
    response_tokens: float = 0.0

    @property
    def idle(self) -> dict[str, float]:
        """Share of the step in which each role does not work."""
        return {role: 1.0 - busy_s / self.seconds for role, busy_s in self.busy_s.items()}

    @property
    def response_tokens_per_s(self) -> float:
        """Of the whole step."""
        return self.response_tokens / self.seconds


def step_time(workload: Workload, devices: JobDevices, lengths: Lengths, cached_tokens: int | None = None) -> StepTime:
    """One step of a job, without checkpoints and evaluations.

    Args:
        lengths: of prompts and responses; in a job over a data set, of what is not learnt and what is.
        cached_tokens: that the KV cache of one engine has room for; None for as many as it can use.
    """
    spans = run(_Step(workload, devices, lengths, cached_tokens).tasks(), devices.capacity)
    return StepTime(
        max(span.end for span in spans),
        _phases(spans),
        {role: covered(span for span in spans if role in span.task.roles) for role in workload.job.placements},
        0.0 if workload.rollout is None else workload.rollout.step.samples * lengths.response,
    )


def predict(
    job: Job,
    hardware: Hardware,
    known: Mapping[Device, Calibration],
    lengths: Lengths,
    cached_tokens: int | None = None,
) -> StepTime:
    """One step of a job, its roles placed as a run would place them.

    Args:
        known: constants of each kind of device.

    Raises:
        ShapeError: when the shape of a model can't be read.
        PlacementError: when a role has no place.
    """
    return step_time(workload_of(job), JobDevices(job, hardware, known), lengths, cached_tokens)


def _phases(spans: Sequence[TaskSpan]) -> dict[str, float]:
    of_phase: dict[str, list[TaskSpan]] = {}
    for span in spans:
        of_phase.setdefault(span.task.phase, []).append(span)
    found = {name: max(s.end for s in mine) - min(s.begin for s in mine) for name, mine in of_phase.items()}
    if SWITCH in found:  # it comes again and again, between the others
        found[SWITCH] = covered(of_phase[SWITCH])
    return found


class _Step:
    """What the roles do in one step, and what waits for what: phases as the phase table has it; what is within a phase
    as the controllers have it.

    Where a step generates, a shard is scored when its slowest response is complete, while others are generated.
    Trained roles are updated at the same time, unless they take turns on their devices. With
    `placement.offload_idle`, roles on the same devices come to them and leave them between the phases.
    """

    def __init__(self, workload: Workload, devices: JobDevices, lengths: Lengths, cached_tokens: int | None) -> None:
        job = workload.job
        self._job, self._rollout, self._devices = job, workload.rollout, devices
        self._step, self._sequences = job.step_shape, step_sequences(job, lengths)
        self._shards = shard_count(self._step.samples, self._step.shard or self._step.samples)
        self._models: dict[str, list[tuple[int, Ranks]]] = {}
        for role in workload.roles:
            if not isinstance(role, RolloutRole):
                ranks = ranks_of(role, devices.of[role.placed_as])
                self._models.setdefault(role.placed_as, []).append((role.score_passes, ranks))
        self._trained = {name: self._models[name][0][1] for name in workload.updated}
        self._senders = [role.placed_as for role in workload.roles if isinstance(role, TrainedRole) and role.sync_bytes]
        self._arrivals = [] if self._rollout is None else self._generated(self._rollout, lengths, cached_tokens)
        self._needs = needs_by_phase(job.roles)
        self._sharing = DeviceSharing(shared_places(job.placements) if job.placement.leaves_idle else [], self._needs)
        self._tasks: list[Task] = []
        self._waves: list[tuple[int, int]] = []

    def tasks(self) -> list[Task]:
        """In an order in which none waits for a later one."""
        work = {"generate": self._generate, "score": self._score, "update": self._update, "sync": self._sync}
        for _ in range(2):  # roles find their devices as the step before left them
            self._tasks, self._waves = [], []
            last: dict[str, tuple[int, ...]] = {}
            for phase in self._job.phases:
                after = tuple(task for name in phase.after for task in last[name])
                # What takes no time here, such as a checkpoint, is over when what it waits for is.
                takes_time = phase.name in work and phase.name in self._needs
                last[phase.name] = work[phase.name](after) if takes_time else after
        return self._tasks

    def _generate(self, after: tuple[int, ...]) -> tuple[int, ...]:
        """In waves, of each of which the task is kept, and the number of shards that are complete with it."""
        assert self._rollout is not None
        arrivals = self._arrivals
        number = min(_WAVES, len(arrivals))
        after = self._enter("generate", after)
        seconds, shards = 0.0, 0
        for wave in range(1, number + 1):
            done = wave * len(arrivals) // number
            so_far = round(self._shards * done / len(arrivals))
            task = self._add("generate", self._rollout.placed_as, arrivals[done - 1] - seconds, after)
            self._waves.append((task, so_far - shards))
            after, seconds, shards = (task,), arrivals[done - 1], so_far
        return after

    def _generated(self, rollout: RolloutRole, lengths: Lengths, cached_tokens: int | None) -> list[float]:
        """When one engine's shards are complete; all have as many."""
        engines = rollout.placement.engines
        engine = _engine(rollout, self._devices.of[rollout.placed_as], lengths, cached_tokens)
        finished = engine.finish_times(-(-self._step.samples // engines), lengths)
        return sorted(shard_arrivals(finished, -(-self._shards // engines)))

    def _score(self, after: tuple[int, ...]) -> tuple[int, ...]:
        shard = self._sequences / self._shards
        # Engines that must leave their devices first have generated everything before anything is scored; other roles
        # come while the first shards are generated.
        if self._rollout is not None and self._rollout.placed_as in self._sharing.levels:
            after = (*after, self._waves[-1][0])
        last = dict.fromkeys(self._models, self._enter("score", after))
        waves: list[tuple[tuple[int, ...], int]] = [((task,), shards) for task, shards in self._waves]
        for generated, shards in waves or [((), self._shards)]:
            for role, models in self._models.items():
                if any(passes for passes, _ in models):
                    seconds = shards * sum(passes * ranks.scoring_s(shard) for passes, ranks in models)
                    last[role] = (self._add("score", role, seconds, (*generated, *last[role])),)
        scored = tuple(task for tasks in last.values() for task in tasks)
        if self._rollout is None:
            return scored
        # For the advantages each rank of the critic, or else of the policy, fetches some shards, and of each a column
        # of the reference and one of whoever is trained.
        first, ranks = next(iter(self._trained.items()))
        calls = (2 + len(self._trained)) * self._shards / ranks.group.ranks * ranks.constants.ray.call_s
        return (self._add("score", first, calls, scored),)

    def _update(self, after: tuple[int, ...]) -> tuple[int, ...]:
        for turn in self._sharing.turns(self._trained):
            after = self._enter("update", after, turn)
            after = tuple(self._update_of(role, after) for role in turn)
        return after

    def _update_of(self, role: str, after: tuple[int, ...]) -> int:
        ranks = self._trained[role]
        seconds = self._step.epochs * ranks.update_s(self._sequences, self._step.optimizer_steps)
        if self._rollout is None:
            return self._add("update", role, seconds, after)
        fetched = self._sequences.tokens * _TOKEN_BYTES / (ranks.constants.ray.object_store_gb_s * GB)
        return self._add(f"{role}_update", role, fetched + seconds, after)

    def _sync(self, after: tuple[int, ...]) -> tuple[int, ...]:
        assert self._rollout is not None
        [sender], engines = self._senders, self._rollout.placed_as
        ranks = self._trained[sender]
        factors, tensors = ranks.constants.weight_sync, sum(tensor.count for tensor in ranks.shape.tensors())
        size = ranks.trained * BYTES[ranks.engine.dtype] if self._rollout.adapter_rank else ranks.weight_bytes
        near = len(self._devices.of[engines].nodes | self._devices.of[sender].nodes) == 1
        bandwidth = ranks.rates.link if near else min(ranks.rates.link, ranks.rates.network)
        seconds = factors.sync_s + tensors * factors.tensor_s + factors.weights * size / bandwidth
        if ranks.engine.zero_stage == 3:
            seconds += ranks.group.all_gather_s(size, ranks.constants.collectives, ranks.shape.layers)
        after = self._enter("sync", after)
        # Nothing else runs meanwhile: the step waits for it.
        self._tasks.append(Task("weight_sync", (sender, engines), seconds, {}, after))
        return (len(self._tasks) - 1,)

    def _enter(self, phase: str, after: tuple[int, ...], only: Collection[str] | None = None) -> tuple[int, ...]:
        """Roles that share devices go and come, as `DeviceSharing` says."""
        before = dict(self._sharing.levels)
        for moves in self._sharing.enter(phase, only):
            after = tuple(
                self._add(SWITCH, role, self._move_s(role, before[role], level), after) for role, level in moves.items()
            )
        return after

    def _move_s(self, role: str, before: Level, level: Level) -> float:
        """Seconds in which a process's states move between its device and host memory; on a CPU both are one."""
        rates = self._devices.of[role].rates
        if not rates.ahead:
            return 0.0
        low, high = sorted((before, level))
        weights, states = self._movable(role)
        return (weights * (low < Level.WEIGHTS <= high) + states * (low < Level.FULL <= high)) / rates.host

    def _movable(self, role: str) -> tuple[float, float]:
        """Bytes of weights and of optimizer state that a process takes along. Most engines drop their weights, and all
        of them their KV cache."""
        rollout = self._rollout
        if rollout is not None and role == rollout.placed_as:
            size = BYTES[rollout.engine.dtype] * rollout.shape.parameters / rollout.placement.tensor_parallel
            return size * rollout.keeps_weights, 0.0
        ranks = [ranks for _, ranks in self._models.get(role, ())]
        return sum(one.held_bytes for one in ranks), sum(one.optimizer_bytes for one in ranks)

    def _add(self, phase: str, role: str, seconds: float, after: tuple[int, ...]) -> int:
        self._tasks.append(Task(phase, (role,), seconds, self._devices.of[role].needs, after))
        return len(self._tasks) - 1


def _engine(role: RolloutRole, at: RoleDevices, lengths: Lengths, cached_tokens: int | None) -> DecodingEngine:
    slots = role.engine.max_num_seqs
    if cached_tokens is not None:
        slots = min(slots, int(cached_tokens / (lengths.prompt + lengths.response)))
    return DecodingEngine(
        shape=role.shape,
        dtype=role.engine.dtype,
        slots=max(1, slots),
        prompts_shared=role.step.samples_per_prompt if role.engine.prefix_caching else 1,
        rates=at.rates,
        workers=at.group,
        constants=at.constants,
    )
