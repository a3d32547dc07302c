"""What a rollout engine is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from rlhf_ray.config.rollout import shard_count
from rlhf_ray.data.cursor import PromptTicket, visit_uid
from rlhf_ray.data.prompt_rows import NO_COLUMNS
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.data.seeds import sample_seed
from rlhf_ray.data.trajectory import Tokens

T = TypeVar("T")


@dataclass(frozen=True)
class PromptRequest:
    """One sample to draw.

    Attributes:
        uid, sample_index, seed: see `Trajectory`.
        tokens: of the prompt; a view of the `PromptSet`'s, which takes a fortieth of the memory of Python's numbers.
        row: the other columns of the prompt's row, as JSON; the `PromptSet`'s.
    """

    uid: str
    sample_index: int
    seed: int
    tokens: Tokens
    row: bytes = NO_COLUMNS


def requests_for(
    prompts: PromptSet, tickets: Sequence[PromptTicket], samples_per_prompt: int, run_seed: int
) -> list[PromptRequest]:
    """`samples_per_prompt` requests for each ticket, in order of ticket and sample index."""
    requests = []
    for ticket in tickets:
        uid = visit_uid(prompts.uids[ticket.index], ticket.epoch)
        tokens = prompts.tokens(ticket.index)
        row = prompts.row(ticket.index)
        requests += [
            PromptRequest(uid, index, sample_seed(run_seed, uid, index), tokens, row)
            for index in range(samples_per_prompt)
        ]
    return requests


def cut_into_shards(requests: Sequence[PromptRequest], shard_samples: int) -> list[list[PromptRequest]]:
    """Shards of at most `shard_samples`, their sizes differing by one at most."""
    return cut_evenly(requests, shard_count(len(requests), shard_samples))


def cut_evenly(items: Sequence[T], parts: int) -> list[list[T]]:
    """So many parts of neighbours, their sizes differing by one at most."""
    bounds = [round(number * len(items) / parts) for number in range(parts + 1)]
    return [list(items[start:end]) for start, end in pairwise(bounds)]
