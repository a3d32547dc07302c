import numpy as np

from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.data.mismatched import mismatched
from rlhf_ray.data.trajectory import offsets_of


def labelled(rows: list[tuple[list[int], list[int]]]) -> ComparisonSet:
    """Prompts and answers as tokens."""
    return ComparisonSet(
        uids=tuple(map(str, range(len(rows)))),
        token_ids=np.array([token for prompt, answer in rows for token in (*prompt, *answer)], np.int32),
        token_offsets=offsets_of([len(prompt) + len(answer) for prompt, answer in rows]),
        answer_starts=np.array([len(prompt) for prompt, _ in rows]),
        candidate_offsets=np.arange(len(rows) + 1),
        ranks=np.zeros(len(rows), np.int64),
        margins=np.zeros(len(rows), np.float32),
        weights=np.ones(len(rows)),
        dropped=0,
        truncated=0,
    )


def texts(data: ComparisonSet) -> list[list[int]]:
    return [data.tokens(row).tolist() for row in range(len(data))]


def test_a_prompt_gets_the_answer_of_the_next_row_with_another_prompt() -> None:
    data = labelled([([1], [10]), ([1], [11]), ([2, 3], [12, 13]), ([1], [14])])
    assert texts(mismatched(data, 100)) == [[1, 12, 13], [1, 12, 13], [2, 3, 14], [1, 12, 13]]
    assert mismatched(data, 100).answer_starts.tolist() == [1, 1, 2, 1]


def test_where_all_prompts_are_the_same_the_next_answer_is_taken() -> None:
    assert texts(mismatched(labelled([([1], [10]), ([1], [11]), ([1], [12])]), 100)) == [[1, 11], [1, 12], [1, 10]]


def test_a_single_row_keeps_its_answer() -> None:
    assert texts(mismatched(labelled([([1], [10])]), 100)) == [[1, 10]]


def test_answers_are_cut_to_the_budget_and_keep_a_token() -> None:
    data = labelled([([1, 2, 3], [10]), ([4], [11, 12, 13])])
    assert texts(mismatched(data, 4)) == [[1, 2, 3, 11], [4, 10]]
    assert texts(mismatched(data, 2)) == [[1, 2, 3, 11], [4, 10]]
