"""What the roles do in one step over a data set, as `controllers/epochs.py` and `preference.py` order it."""

from rlhf_ray.config.jobs import EpochJob, PreferenceJob, RewardModelJob
from rlhf_ray.planner.lengths import Lengths
from rlhf_ray.planner.seats import Seats, ranks_of
from rlhf_ray.planner.timeline import Task
from rlhf_ray.planner.work import Sequences
from rlhf_ray.planner.workload import RolloutRole, Workload

_CANDIDATES = 2
"""Answers of a row that are compared; rows of choices and rankings can have more."""


def epoch_tasks(workload: Workload, config: EpochJob, seats: Seats, lengths: Lengths) -> list[Task]:
    """The tasks of one step, in an order in which none waits for a later one.

    Args:
        lengths: of the tokens of a row that are not learnt, and of those that are, by answer.
    """
    batch = _batch(config, lengths)
    trained, *others = [role for role in workload.roles if not isinstance(role, RolloutRole)]
    ranks = ranks_of(trained, seats.of[trained.seat])
    tasks: list[Task] = []

    def add(phase: str, role: str, seconds: float) -> None:
        """Each waits for the one before."""
        after = (len(tasks) - 1,) if tasks else ()
        tasks.append(Task(phase, (role,), seconds, seats.of[role].needs, after))

    if isinstance(config, PreferenceJob):
        algorithm = config.algorithm
        passes = 1 if algorithm.kto is None else 2  # KTO compares with mismatched answers too
        for reference in others:
            add("score", "reference", passes * ranks_of(reference, seats.of["reference"]).scoring_s(batch))
        by_policy = int(algorithm.couples_rows) + passes - 1
        if algorithm.needs_reference and config.policy_is_reference and config.reference.cache is None:
            by_policy += passes
        if by_policy:
            add("score", "policy", by_policy * ranks.scoring_s(batch))
    add("update", trained.name, ranks.update_s(batch, optimizer_steps=1))
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
