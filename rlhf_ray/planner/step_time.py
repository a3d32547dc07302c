"""How long a step takes, phase by phase, and how long each role idles meanwhile."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.cluster.assignment import assign, requests_of
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
from rlhf_ray.planner.placement import AssignedHardware, JobDevices, ranks_of
from rlhf_ray.planner.timeline import SWITCH, Task, TaskSpan, covered, run
from rlhf_ray.planner.work import BYTES, Lengths
from rlhf_ray.planner.workload import RolloutRole, ScoredRole, TrainedRole, Workload

# Shards are followed in so many waves: enough of them to see scoring overlap with generation.
_WAVES = 8
# Token, its log-prob and version from the engine, and four columns of numbers to train on.
_TOKEN_BYTES = 28


@dataclass(frozen=True)
class RoleTime:
    """What a role does in a step.

    Attributes:
        busy_s: seconds in which it works.
        idle: share of the step in which it does not.
    """

    role: str
    busy_s: float
    idle: float


@dataclass(frozen=True)
class StepTime:
    """A step.

    Attributes:
        seconds: of the whole.
        phases: seconds from the beginning of a phase to its end, named as in the metrics `time/NAME_s`; in PPO scoring
            begins while responses are still generated, and the updates of policy and critic overlap. `SWITCH` is the
            time in which some role comes to its device or leaves it.
        roles: in the order of the job's places.
        response_tokens: that the step generates; 0 in a job over a data set.
    """

    seconds: float
    phases: dict[str, float]
    roles: tuple[RoleTime, ...]
    response_tokens: float = 0.0

    @property
    def response_tokens_per_s(self) -> float:
        """Of the whole step."""
        return self.response_tokens / self.seconds


def step_time(
    workload: Workload, cluster: AssignedHardware, lengths: Lengths, cached_tokens: int | None = None
) -> StepTime:
    """One step of a job, without checkpoints and evaluations.

    Args:
        lengths: of prompts and responses; in a job over a data set, of what is not learnt and what is.
        cached_tokens: that the KV cache of one engine has room for; None for as many as it can use.
    """
    devices = JobDevices(workload.job, cluster)
    if workload.rollout is not None:
        tasks = rollout_tasks(workload, workload.rollout, devices, lengths, cached_tokens)
        generated = workload.rollout.batch.samples * lengths.response
    else:
        tasks, generated = data_tasks(workload, devices, lengths), 0.0
    spans = run(tasks, devices.capacity)
    seconds = max(span.end for span in spans)
    return StepTime(
        seconds,
        _phases(spans),
        tuple(_role_time(role, spans, seconds) for role in workload.job.placements),
        generated,
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
    requests = requests_of(job.placements)
    cluster = AssignedHardware(hardware, assign(requests, hardware.nodes), known)
    return step_time(workload_of(job), cluster, lengths, cached_tokens)


def _phases(spans: Sequence[TaskSpan]) -> dict[str, float]:
    of_phase: dict[str, list[TaskSpan]] = {}
    for span in spans:
        of_phase.setdefault(span.task.phase, []).append(span)
    found = {name: max(s.end for s in mine) - min(s.begin for s in mine) for name, mine in of_phase.items()}
    if SWITCH in found:  # it comes again and again, between the others
        found[SWITCH] = covered(of_phase[SWITCH])
    return found


def _role_time(role: str, spans: Sequence[TaskSpan], seconds: float) -> RoleTime:
    busy = covered(span for span in spans if role in span.task.roles)
    return RoleTime(role, busy, 1.0 - busy / seconds)


def rollout_tasks(
    workload: Workload, rollout: RolloutRole, devices: JobDevices, lengths: Lengths, cached_tokens: int | None
) -> list[Task]:
    """What the roles do in one PPO step and what waits for what, as `controllers/ppo.py` orders it.

    A shard is scored when its slowest response is complete, while others are generated. Advantages need all of them;
    then policy and critic are updated at the same time, and the new weights go to the engines. With
    `placement.offload_idle`, roles on the same devices come to them and leave them between these phases.

    Args:
        cached_tokens: that the KV cache of one engine has room for; None for as many as it can use.

    Returns:
        Tasks in an order in which none waits for a later one.
    """
    return _RolloutStep(workload, rollout, devices, lengths, cached_tokens).tasks()


class _RolloutStep:
    def __init__(
        self, workload: Workload, rollout: RolloutRole, devices: JobDevices, lengths: Lengths, cached_tokens: int | None
    ) -> None:
        self._workload, self._rollout, self._batch = workload, rollout, rollout.batch
        self._devices, self._lengths = devices, lengths
        self._scoring: dict[str, list[tuple[int, Ranks]]] = {}
        for role in workload.roles:
            if not isinstance(role, RolloutRole):
                ranks = ranks_of(role, devices.of[role.placement_key])
                self._scoring.setdefault(role.placement_key, []).append((role.score_passes, ranks))
        self._trained = {name: self._scoring[name][0][1] for name in workload.updated}
        [self._sender] = [
            role.placement_key for role in workload.roles if isinstance(role, TrainedRole) and role.sync_bytes
        ]
        self._engine = _engine(rollout, devices, lengths, cached_tokens)
        self._shards = shard_count(self._batch.samples, self._batch.shard or self._batch.samples)
        self._arrivals = self._generated()
        self._sharing = DeviceSharing(
            shared_places(workload.job.placements) if workload.job.placement.leaves_idle else [],
            needs_by_phase(workload.job.roles),
        )
        self._tasks: list[Task] = []

    def tasks(self) -> list[Task]:
        for _ in range(2):  # roles find their devices as the step before left them
            self._tasks = []
            scored = self._score(self._generate())
            # Each rank of the critic, or else of the policy, fetches some shards, and of each a column of the reference
            # and one of whoever is trained.
            first, ranks = next(iter(self._trained.items()))
            calls = (2 + len(self._trained)) * self._shards / ranks.group.ranks * ranks.constants.ray.call_s
            advantages = self._add("score", first, calls, scored)
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
        engines = self._rollout.placement.engines
        finished = self._engine.finish_times(-(-self._batch.samples // engines), self._lengths)
        return sorted(shard_arrivals(finished, -(-self._shards // engines)))

    def _score(self, waves: list[tuple[int, int]]) -> tuple[int, ...]:
        shard = step_sequences(self._workload.job, self._lengths) / self._shards
        # Engines that must leave their devices first have generated everything before anything is scored; other roles
        # come while the first shards are generated.
        apart = "rollout" in self._sharing.levels
        entered = self._enter("score", (waves[-1][0],) if apart else ())
        last = dict.fromkeys(self._scoring, entered)
        for task, shards in waves:
            for role, models in self._scoring.items():
                seconds = shards * sum(passes * model.scoring_s(shard) for passes, model in models)
                last[role] = (self._add("score", role, seconds, (task, *last[role])),)
        return tuple(task for after in last.values() for task in after)

    def _update(self, after: tuple[int, ...]) -> tuple[int, ...]:
        batch = step_sequences(self._workload.job, self._lengths)
        for turn in self._sharing.turns(self._trained):
            after = self._enter("update", after, turn)
            updates = []
            for role in turn:
                ranks = self._trained[role]
                fetched = batch.tokens * _TOKEN_BYTES / (ranks.constants.ray.object_store_gb_s * GB)
                seconds = self._batch.epochs * ranks.update_s(batch, self._batch.optimizer_steps)
                updates.append(self._add(f"{role}_update", role, fetched + seconds, after))
            after = tuple(updates)
        return after

    def _sync(self, after: tuple[int, ...]) -> None:
        policy, rollout = self._trained[self._sender], self._devices.of["rollout"]
        factors, tensors = policy.constants.weight_sync, sum(tensor.count for tensor in policy.shape.tensors())
        size = policy.weight_bytes
        if self._rollout.adapter_rank:
            size = policy.trained * BYTES[policy.engine.dtype]
        near = len(rollout.nodes | self._devices.of[self._sender].nodes) == 1
        bandwidth = policy.rates.link if near else min(policy.rates.link, policy.rates.network)
        seconds = factors.sync_s + tensors * factors.tensor_s + factors.weights * size / bandwidth
        if policy.engine.zero_stage == 3:
            seconds += policy.group.all_gather_s(size, policy.constants.collectives, policy.shape.layers)
        after = self._enter("sync", after)
        # Nothing else runs meanwhile: the step waits for it.
        self._tasks.append(Task("weight_sync", (self._sender, "rollout"), seconds, {}, after))

    def _enter(self, phase: str, after: tuple[int, ...], only: Collection[str] | None = None) -> tuple[int, ...]:
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
        rates = self._devices.of[role].rates
        if role == "rollout" or not rates.ahead:
            return 0.0
        low, high = sorted((before, level))
        size = 0.0
        for _, ranks in self._scoring[role]:
            size += ranks.held_bytes if low < Level.WEIGHTS <= high else 0.0
            size += ranks.optimizer_bytes if low < Level.FULL <= high and role in self._workload.updated else 0.0
        return size / rates.host

    def _add(self, phase: str, role: str, seconds: float, after: tuple[int, ...]) -> int:
        self._tasks.append(Task(phase, (role,), seconds, self._devices.of[role].needs, after))
        return len(self._tasks) - 1


def _engine(role: RolloutRole, devices: JobDevices, lengths: Lengths, cached_tokens: int | None) -> DecodingEngine:
    at, settings = devices.of["rollout"], role.engine
    slots = settings.max_num_seqs
    if cached_tokens is not None:
        slots = min(slots, int(cached_tokens / (lengths.prompt + lengths.response)))
    return DecodingEngine(
        shape=role.shape,
        dtype=role.dtype,
        slots=max(1, slots),
        prompts_shared=role.batch.samples_per_prompt if settings.prefix_caching else 1,
        rates=at.rates,
        workers=at.group,
        constants=at.constants,
    )


def data_tasks(workload: Workload, devices: JobDevices, lengths: Lengths) -> list[Task]:
    """What the roles do in one step over a data set, as `controllers/epochs.py` and `preference.py` order it.

    Args:
        lengths: of the tokens of a row that are not learnt, and of those that are, by answer.

    Returns:
        Tasks of which each waits for the one before.
    """
    batch = step_sequences(workload.job, lengths)
    trained, *references = [role for role in workload.roles if not isinstance(role, RolloutRole)]
    tasks: list[Task] = []

    def add(phase: str, role: TrainedRole | ScoredRole, seconds: float) -> None:
        after = (len(tasks) - 1,) if tasks else ()
        tasks.append(Task(phase, (role.placement_key,), seconds, devices.of[role.placement_key].needs, after))

    for role in (*references, trained):
        if role.score_passes:
            add("score", role, role.score_passes * ranks_of(role, devices.of[role.placement_key]).scoring_s(batch))
    add("update", trained, ranks_of(trained, devices.of[trained.placement_key]).update_s(batch, optimizer_steps=1))
    return tasks
