import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.rewards import FunctionReward
from rlhf_ray.data.prompt_rows import RowColumn
from rlhf_ray.data.trajectory import Trajectory, TrajectoryBatch
from rlhf_ray.rewards.errors import RewardError
from rlhf_ray.rewards.function import FunctionScorer
from rlhf_ray.rewards.text import decode_responses

MODULE = """
import threading

import numpy as np

calls = []
release = threading.Event()
number = 3
answer = None


def length(prompts, responses):
    calls.append((prompts, responses, threading.get_ident()))
    return [len(prompt) + 10 * len(response) for prompt, response in zip(prompts, responses)]


def given(prompts, responses):
    return answer


def raises(prompts, responses):
    raise KeyError("no such lexicon")


def leaves(prompts, responses):
    raise SystemExit(3)


def exact(responses, answer, level=None):
    calls.append((responses, answer, level))
    return [float(response == text) for response, text in zip(responses, answer)]


def hangs(prompts, responses):
    release.wait(30)
    return [0.0] * len(prompts)
"""

UIDS = ["a@0", "b@0", "c@0"]
PROMPTS = ["p", "pp", "ppp"]
RESPONSES = ["r", "", "rr"]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import no_such_package")
    (tmp_path / "leaving_rewards.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    import my_rewards  # type: ignore[import-not-found]

    yield my_rewards
    my_rewards.release.set()


def scorer(function: str, /, **config: Any) -> FunctionScorer:
    return FunctionScorer(FunctionReward(**{"function": f"my_rewards:{function}", **config}))


def test_scores_come_in_order_and_in_batches(module: Any) -> None:
    scores = scorer("length", batch_size=2).score(PROMPTS, RESPONSES, UIDS)
    assert scores.dtype == np.float32
    assert scores.tolist() == [11, 2, 23]
    assert [(prompts, responses) for prompts, responses, _ in module.calls] == [
        (["p", "pp"], ["r", ""]),
        (["ppp"], ["rr"]),
    ]


def test_columns_come_with_the_batch_that_they_belong_to(module: Any) -> None:
    part = scorer("exact", batch_size=2)
    scores = part.score(PROMPTS, RESPONSES, UIDS, {"answer": ["r", "x", "rr"], "group": [1, 2, 3]})
    assert scores.tolist() == [1, 0, 1]
    assert module.calls == [(["r", ""], ["r", "x"], None), (["rr"], ["rr"], None)]


def test_a_column_that_no_row_has_is_told_with_the_function(module: Any) -> None:
    message = r"^reward 'my_rewards': reward function 'my_rewards:exact' asks for column 'answer', which no row"
    with pytest.raises(RewardError, match=message):
        scorer("exact").check([RowColumn("level", 3, None)], 3)
    scorer("exact").check([RowColumn("answer", 3, None)], 3)


def test_all_calls_are_made_in_one_thread_that_is_not_the_callers(module: Any) -> None:
    part = scorer("length", batch_size=1)
    part.score(PROMPTS, RESPONSES, UIDS)
    part.score(PROMPTS, RESPONSES, UIDS)
    threads = {thread for _, _, thread in module.calls}
    assert len(module.calls) == 6
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_no_samples_give_no_scores_and_no_call(module: Any) -> None:
    assert scorer("length").score([], [], []).shape == (0,)
    assert module.calls == []


@pytest.mark.parametrize(
    "answer", [[1, 2.5, -3], (1, 2.5, -3), np.array([1, 2.5, -3]), [np.float32(1), np.float64(2.5), np.int8(-3)]]
)
def test_lists_tuples_and_arrays_of_numbers_are_scores(module: Any, answer: Any) -> None:
    module.answer = answer
    assert scorer("given").score(PROMPTS, RESPONSES, UIDS).tolist() == [1, 2.5, -3]


@pytest.mark.parametrize(
    ("answer", "message", "samples"),
    [
        ([1.0, 2.0], "gave 2 scores for 3 samples, but must give one for each", UIDS),
        ([1.0] * 4, "gave 4 scores for 3 samples", UIDS),
        (None, "gave NoneType, but must give a list of numbers", UIDS),
        (1.0, "gave float, but must give a list of numbers", UIDS),
        ("123", "gave str, but must give a list of numbers", UIDS),
        ({"a": 1, "b": 2, "c": 3}, "gave dict, but must give a list of numbers", UIDS),
        ([1.0, "2", 3.0], r"gave '2' \(str\) as a score, but must give numbers", ["b@0"]),
        ([1.0, None, [3.0]], r"gave None \(NoneType\) as a score", ["b@0", "c@0"]),
        ([1.0, True, 0.0], r"gave True \(bool\) as a score", ["b@0"]),
        (np.ones((3, 1)), r"gave \[1.0\] \(list\) as a score", UIDS),
        ([float("nan"), 0.0, float("-inf")], "gave nan as a score, but must give finite float32", ["a@0", "c@0"]),
        ([0.0, 1e300, 0.0], r"gave 1e\+300 as a score, but must give finite float32", ["b@0"]),
        ([0.0, 10**400, 0.0], "gave a score that no float holds", UIDS),
    ],
)
def test_an_answer_that_is_no_list_of_finite_numbers_names_the_samples(
    module: Any, answer: Any, message: str, samples: list[str]
) -> None:
    module.answer = answer
    with pytest.raises(
        RewardError, match=f"reward 'my_rewards': reward function 'my_rewards:given' {message}"
    ) as caught:
        scorer("given").score(PROMPTS, RESPONSES, UIDS)
    assert list(caught.value.samples) == samples
    assert caught.value.part == "my_rewards"
    assert all(uid in str(caught.value) for uid in samples)


def test_only_the_samples_of_the_bad_batch_are_named(module: Any) -> None:
    module.answer = [1.0, 2.0]
    with pytest.raises(RewardError, match="gave 2 scores for 1 samples") as caught:
        scorer("given", batch_size=2, name="mine").score(PROMPTS, RESPONSES, UIDS)
    assert caught.value.samples == ("c@0",)
    assert caught.value.part == "mine"


def test_an_exception_in_the_function_is_the_cause(module: Any) -> None:
    with pytest.raises(RewardError, match="'my_rewards:raises' raised KeyError: 'no such lexicon'") as caught:
        scorer("raises").score(PROMPTS, RESPONSES, UIDS)
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.samples == tuple(UIDS)


def test_a_function_that_exits_is_an_error_not_a_hang(module: Any) -> None:
    with pytest.raises(RewardError, match="raised SystemExit: 3"):
        scorer("leaves", timeout_s=20).score(PROMPTS, RESPONSES, UIDS)


def test_a_call_that_hangs_is_given_up_and_so_is_the_scorer(module: Any) -> None:
    part = scorer("hangs", timeout_s=0.1, batch_size=2)
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"did not return within timeout_s \(0.1 s\): raise timeout_s") as caught:
        part.score(PROMPTS, RESPONSES, UIDS)
    assert time.monotonic() - start < 5
    assert caught.value.samples == ("a@0", "b@0")
    with pytest.raises(RewardError, match="still hangs in an earlier call"):
        part.score(PROMPTS, RESPONSES, UIDS)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "no_such_module:f",
            "reward function 'no_such_module:f' can't be imported: ModuleNotFoundError: .* Python path",
        ),
        (
            "broken_rewards:f",
            "'broken_rewards:f' can't be imported: ModuleNotFoundError: No module named 'no_such_pack",
        ),
        ("leaving_rewards:f", "'leaving_rewards:f' can't be imported: SystemExit"),
        (
            "my_rewards:lenght",
            "module 'my_rewards' .*my_rewards.py.* has no such name; write function: package.module:",
        ),
        ("my_rewards:number", "has int under that name"),
    ],
)
def test_a_function_that_cannot_be_had_is_an_error_at_the_start(module: Any, function: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        FunctionScorer(FunctionReward(function=function))


def test_text_is_decoded_without_special_tokens(tokenizer: Any) -> None:
    prompt, response = "I saw this film and", " it was good , really.<|im_end|>"
    batch = TrajectoryBatch.of(
        [
            Trajectory("a", 0, 0, tokenizer("<|im_start|>" + prompt)["input_ids"], ids, [0.0] * len(ids), ids, "stop")
            for ids in (tokenizer(response)["input_ids"], [])
        ]
    )
    assert decode_responses(batch, tokenizer) == ([prompt, prompt], [" it was good , really.", ""])


def test_a_response_keeps_the_space_it_begins_with(tiny_metaspace: Any) -> None:
    prompt, response = tiny_metaspace.encode("a b").ids, tiny_metaspace.encode("b a").ids
    batch = TrajectoryBatch.of([Trajectory("a", 0, 0, prompt, response, [0.0] * 2, [0] * 2, "stop")])

    class Plain:
        def decode(self, token_ids: list[int], skip_special_tokens: bool = False, **options: Any) -> str:
            return str(tiny_metaspace.decode(token_ids, skip_special_tokens=skip_special_tokens))

    assert decode_responses(batch, Plain()) == (["a b"], [" b a"])


@pytest.fixture
def tiny_metaspace() -> Any:
    """As SentencePiece models do, it drops the space that begins a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def test_a_character_split_between_prompt_and_response_does_not_break_decoding(tokenizer: Any) -> None:
    ids = tokenizer("🙂")["input_ids"]
    assert len(ids) == 4
    batch = TrajectoryBatch.of([Trajectory("a", 0, 0, ids[:2], ids[2:], [0.0] * 2, [0] * 2, "stop")])
    assert decode_responses(batch, tokenizer) == ([tokenizer.decode(ids[:2])], [tokenizer.decode(ids[2:])])
    assert set(tokenizer.decode(ids[2:])) == {"\ufffd"}
