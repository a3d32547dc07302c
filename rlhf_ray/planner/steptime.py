"""How long a step takes, phase by phase, and how long each role idles meanwhile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.cluster.assignment import assign, requests_of
from rlhf_ray.config.jobs import JobConfig, PPOJob
from rlhf_ray.planner.calibration import Calibration, Device
from rlhf_ray.planner.epoch_tasks import epoch_tasks
from rlhf_ray.planner.hardware import Hardware
from rlhf_ray.planner.lengths import Lengths
from rlhf_ray.planner.ppo_tasks import ppo_tasks
from rlhf_ray.planner.seats import Cluster, Seats
from rlhf_ray.planner.timeline import SWITCH, Span, covered, run
from rlhf_ray.planner.workload import Workload, workload_of


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


def step_time(workload: Workload, cluster: Cluster, lengths: Lengths, cached_tokens: int | None = None) -> StepTime:
    """One step of a job, without checkpoints and evaluations.

    Args:
        lengths: of prompts and responses; in a job over a data set, of what is not learnt and what is.
        cached_tokens: that the KV cache of one engine has room for; None for as many as it can use.
    """
    config = workload.job
    seats = Seats(config, cluster)
    if isinstance(config, PPOJob):
        tasks = ppo_tasks(workload, config, seats, lengths, cached_tokens)
        generated = config.samples_per_step * lengths.response
    else:
        tasks, generated = epoch_tasks(workload, config, seats, lengths), 0.0
    spans = run(tasks, seats.capacity)
    seconds = max(span.end for span in spans)
    return StepTime(
        seconds,
        _phases(spans),
        tuple(_role_time(role, spans, seconds) for role in config.places),
        generated,
    )


def predict(
    job: JobConfig,
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
    requests = requests_of({role: placed.placement for role, placed in job.places.items()})
    cluster = Cluster(hardware, assign(requests, hardware.nodes), known)
    return step_time(workload_of(job), cluster, lengths, cached_tokens)


def _phases(spans: Sequence[Span]) -> dict[str, float]:
    of_phase: dict[str, list[Span]] = {}
    for span in spans:
        of_phase.setdefault(span.task.phase, []).append(span)
    found = {name: max(s.end for s in mine) - min(s.begin for s in mine) for name, mine in of_phase.items()}
    if SWITCH in found:  # it comes again and again, between the others
        found[SWITCH] = covered(of_phase[SWITCH])
    return found


def _role_time(role: str, spans: Sequence[Span], seconds: float) -> RoleTime:
    busy = covered(span for span in spans if role in span.task.roles)
    return RoleTime(role, busy, 1.0 - busy / seconds)
