"""What the roles do in one step over a data set, as `controllers/epochs.py` and `preference.py` order it."""

from collections.abc import Mapping, Sequence

from rlhf_ray.cluster.planner.lengths import Lengths
from rlhf_ray.cluster.planner.passes import Ranks
from rlhf_ray.cluster.planner.seats import Seats
from rlhf_ray.cluster.planner.shapes import ModelShape
from rlhf_ray.cluster.planner.timeline import Task
from rlhf_ray.cluster.planner.work import Sequences
from rlhf_ray.config.jobs import EpochJob, PreferenceJob, RewardModelJob

_CANDIDATES = 2
"""Answers of a row that are compared; rows of choices and rankings can have more."""


def epoch_tasks(
    config: EpochJob, shapes: Mapping[str, Sequence[ModelShape]], seats: Seats, lengths: Lengths
) -> list[Task]:
    """The tasks of one step, in an order in which none waits for a later one.

    Args:
        lengths: of the tokens of a row that are not learnt, and of those that are, by answer.
    """
    role, batch = config.role, _batch(config, lengths)
    seat = seats.of[role.name]
    trained = role.trained
    ranks = Ranks(shapes[role.name][0], trained.engine, seat.rates, seat.group, seat.constants, trained.lora)
    tasks: list[Task] = []

    def add(phase: str, name: str, seconds: float) -> None:
        """Each waits for the one before."""
        after = (len(tasks) - 1,) if tasks else ()
        tasks.append(Task(phase, (name,), seconds, seats.of[name].needs, after))

    if isinstance(config, PreferenceJob):
        algorithm = config.algorithm
        passes = 1 if algorithm.kto is None else 2  # KTO compares with mismatched answers too
        if algorithm.needs_reference and config.reference.cache is None:
            if config.policy_is_reference:
                add("score", "policy", passes * ranks.scoring_s(batch))
            else:
                at = seats.of["reference"]
                engine = config.reference.engine
                reference = Ranks(shapes["reference"][0], engine, at.rates, at.group, at.constants)
                add("score", "reference", passes * reference.scoring_s(batch))
        extra = int(algorithm.couples_rows) + passes - 1
        if extra:
            add("score", "policy", extra * ranks.scoring_s(batch))
    add("update", role.name, ranks.update_s(batch, 1))
    return tasks


def _batch(config: EpochJob, lengths: Lengths) -> Sequences:
    rows = config.data.rows_per_step
    if isinstance(config, RewardModelJob):
        texts = Sequences.of(rows * _CANDIDATES, lengths.prompt + lengths.response, 0)
        return Sequences(rows, texts.tokens, texts.pairs, texts.count)
    if isinstance(config, PreferenceJob) and not config.algorithm.unpaired:
        answers = Sequences.of(rows * _CANDIDATES, lengths.prompt, lengths.response)
        # The answers of a row share their prompt's tokens, but each attends to them.
        shared = rows * (_CANDIDATES - 1) * lengths.prompt
        return Sequences(rows, answers.tokens - shared, answers.pairs, answers.scored)
    return Sequences.of(rows, lengths.prompt, lengths.response)
