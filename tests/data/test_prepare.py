"""What `prepare` promises, without network: the tiny model and its data, and complete-or-absent items."""

import json
import subprocess
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.data import prepare as module
from rlhf_ray.data.prepare import Item, PrepareError, prepare
from rlhf_ray.models.tiny import NEGATIVE_SENTENCES, POSITIVE_SENTENCES, build_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("prepared")
    prepare(target, only={"tiny"})
    return target


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pair_texts(pairs: list[dict]) -> set[str]:
    return {row[side] for row in pairs for side in ("chosen", "rejected")}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def replace_item(monkeypatch: pytest.MonkeyPatch):
    """Puts an item with outputs models/x and data/x.jsonl, built by the given function, in place of all others."""

    def replace(build) -> None:
        monkeypatch.setattr(module, "ITEMS", {"x": Item("x", ("models/x", "data/x.jsonl"), build)})

    return replace


def build_x(stage: Path, target: Path) -> None:
    (stage / "models/x").mkdir()
    (stage / "models/x/weights").write_text("w")
    (stage / "work/scratch").write_text("s")
    (stage / "data/x.jsonl").write_text("{}\n")


# --- the tiny model


def test_tiny_model_is_the_same_bytes_for_the_same_seed(tiny: Path, tmp_path: Path) -> None:
    again = build_tiny_model(tmp_path / "again")
    other = build_tiny_model(tmp_path / "other", seed=1)
    assert files(again) == files(tiny / "models/tiny")
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()
    assert (other / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()


def test_tiny_model_loads_and_generates(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny / "models/tiny")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "models/tiny")
    config = model.config
    assert (config.vocab_size, config.head_dim, config.tie_word_embeddings) == (512, 32, True)
    assert config.num_key_value_heads < config.num_attention_heads
    assert len(tokenizer) == config.vocab_size
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    batch = tokenizer("The acting in", return_tensors="pt")
    out = model.generate(**batch, min_new_tokens=4, max_new_tokens=4, do_sample=False)
    assert out.shape[1] == batch["input_ids"].shape[1] + 4


def test_tiny_models_greedy_choice_does_not_hang_on_rounding(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny / "models/tiny")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "models/tiny")
    prompts = [row["prompt"] for row in rows(tiny / "data/tiny_prompts.jsonl")]
    gaps = []
    for prompt in prompts:
        best = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].topk(2).values.tolist()
        gaps.append(best[0] - best[1])
    assert min(gaps) > 1e-4


@pytest.mark.parametrize("text", ["A warm film.", "  two  spaces , it 's 10!", "Grüße, 映画 🎬", "line\nbreak\t"])
def test_tiny_tokenizer_gives_back_what_it_was_given(tiny: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny / "models/tiny")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tiny_tokenizer_has_chatml_and_a_pad_that_is_not_eos(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny / "models/tiny")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|im_end|>", None)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


@pytest.mark.parametrize(("arguments", "said"), [({"hidden": 48}, "hidden=48"), ({"corpus": ["a b"]}, "vocab=512")])
def test_tiny_model_names_the_argument_it_cannot_use(tmp_path: Path, arguments: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_tiny_model(tmp_path / "m", **arguments)
    assert not (tmp_path / "m").exists()


def test_tiny_data_has_distinct_rows_and_no_sentence_in_both_splits(tiny: Path) -> None:
    prompts = rows(tiny / "data/tiny_prompts.jsonl")
    train, held_out = rows(tiny / "data/tiny_pairs_train.jsonl"), rows(tiny / "data/tiny_pairs_eval.jsonl")
    assert (len(prompts), len(train), len(held_out)) == (64, 64, 32)
    for part in (prompts, train, held_out):
        assert len({row["uid"] for row in part}) == len(part)
    assert pair_texts(train).isdisjoint(pair_texts(held_out))


@pytest.mark.parametrize("kind", ["preferences", "labels"])
def test_tiny_answers_share_no_prompt_and_no_sentence_between_splits(tiny: Path, kind: str) -> None:
    train, held_out = (rows(tiny / f"data/tiny_{kind}_{split}.jsonl") for split in ("train", "eval"))
    assert (len(train), len(held_out)) == (48, 16)
    for keys in (["prompt"], ["chosen", "rejected", "completion"]):
        said = [{str(row[key]) for row in part for key in keys if key in row} for part in (train, held_out)]
        assert said[0].isdisjoint(said[1])


def test_tiny_preferences_choose_the_positive_sentence_and_labels_say_which_one_is_there(tiny: Path) -> None:
    preferences = {row["uid"]: row for row in rows(tiny / "data/tiny_preferences_train.jsonl")}
    for row in preferences.values():
        assert [message["role"] for key in ("prompt", "chosen", "rejected") for message in row[key]] == [
            "user",
            "assistant",
            "assistant",
        ]
        assert row["chosen"][0]["content"] in POSITIVE_SENTENCES
        assert row["rejected"][0]["content"] in NEGATIVE_SENTENCES
    labels = rows(tiny / "data/tiny_labels_train.jsonl")
    assert [row["label"] for row in labels] == [True, False] * 24
    for row in labels:
        assert row["completion"] == preferences[row["uid"]]["chosen" if row["label"] else "rejected"]


def test_tiny_rankings_have_an_order_and_a_tie(tiny: Path) -> None:
    rankings = rows(tiny / "data/tiny_rankings_train.jsonl")
    assert len(rankings) == 24
    for row in rankings:
        assert len(set(row["completions"])) == 4
        assert sorted(row["ranks"]) == [0, 1, 2, 2]
        by_rank = dict(zip(row["ranks"], row["completions"], strict=True))
        assert by_rank[0] in POSITIVE_SENTENCES
        assert by_rank[2] in NEGATIVE_SENTENCES
    assert len({tuple(row["ranks"]) for row in rankings}) > 1


# --- items are complete or absent


def test_prepare_builds_once_and_skips_after(replace_item, tmp_path: Path) -> None:
    calls = []
    replace_item(lambda stage, target: (calls.append(1), build_x(stage, target)))
    first, second = prepare(tmp_path)[0], prepare(tmp_path)[0]
    assert (first.built, second.built, len(calls)) == (True, False, 1)
    assert first.paths == (tmp_path / "models/x", tmp_path / "data/x.jsonl")
    assert files(tmp_path) == {"models/x/weights": b"w", "data/x.jsonl": b"{}\n"}


def test_prepare_builds_again_when_forced_or_when_a_part_is_gone(replace_item, tmp_path: Path) -> None:
    replace_item(build_x)
    prepare(tmp_path)
    (tmp_path / "models/x/weights").write_text("damaged")
    assert prepare(tmp_path, force=True)[0].built
    (tmp_path / "data/x.jsonl").unlink()
    assert prepare(tmp_path)[0].built
    assert files(tmp_path) == {"models/x/weights": b"w", "data/x.jsonl": b"{}\n"}


def test_a_failed_build_leaves_nothing_behind(replace_item, tmp_path: Path) -> None:
    def fail(stage: Path, target: Path) -> None:
        build_x(stage, target)
        raise OSError("disk full")

    replace_item(fail)
    with pytest.raises(PrepareError, match="disk full") as caught:
        prepare(tmp_path)
    assert caught.value.item == "x"
    assert "prepare --only x" in caught.value.cure
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rebuild_leaves_the_old_item(replace_item, tmp_path: Path) -> None:
    replace_item(build_x)
    prepare(tmp_path)
    before = files(tmp_path)
    replace_item(lambda stage, target: 1 / 0)
    with pytest.raises(PrepareError, match="ZeroDivisionError"):
        prepare(tmp_path, force=True)
    assert files(tmp_path) == before


def test_unknown_items_are_answered_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="Did you mean 'movie-pairs'"):
        prepare(tmp_path, only={"movie-pair"})


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (subprocess.CompletedProcess([], 1, "", "ERROR: no such host\n"), "no such host"),
        (subprocess.TimeoutExpired([], 900.0), "within 900 s"),
    ],
)
def test_a_failed_download_names_the_package_and_the_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outcome, said: str
) -> None:
    def run(command, **kwargs):
        assert "--require-hashes" in command
        assert "--no-binary=vaderSentiment" in command
        assert kwargs["timeout"] > 0
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(PrepareError, match=said) as caught:
        prepare(tmp_path, only={"movie-pairs"})
    assert "vaderSentiment==3.3.2" in caught.value.problem
    assert "pip reaches" in caught.value.cure
    assert list(tmp_path.iterdir()) == []
