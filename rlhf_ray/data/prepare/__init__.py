"""Models and data of the examples: what `rlhf-ray prepare` builds.

Invariants: an item is complete or absent (it is built in a sibling folder and renamed into place); an item that
is there is not built again; the same versions of the libraries give the same rows. What comes from a package
registry is pinned by hash and read as an archive: nothing of it is installed or imported. The item `tiny` needs no
network.
"""

import logging
import os
import tempfile
import time
from pathlib import Path

from rlhf_ray.config.base import nearest
from rlhf_ray.data.prepare.demos import build_dpo_demo, build_kto_demo
from rlhf_ray.data.prepare.imdb import build_imdb_prompts, build_imdb_reviews
from rlhf_ray.data.prepare.item import Item, PreparedItem, PrepareError
from rlhf_ray.data.prepare.movies import build_movie_choices, build_movie_pairs
from rlhf_ray.data.prepare.smollm2 import build_smollm2
from rlhf_ray.data.prepare.tiny import build_tiny

__all__ = ["ITEMS", "Item", "PrepareError", "PreparedItem", "prepare"]

logger = logging.getLogger(__name__)

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
                "data/tiny_preferences_train.jsonl",
                "data/tiny_preferences_eval.jsonl",
                "data/tiny_labels_train.jsonl",
                "data/tiny_labels_eval.jsonl",
                "data/tiny_rankings_train.jsonl",
            ),
            build_tiny,
        ),
        Item("smollm2-135m", ("models/smollm2-135m",), build_smollm2),
        Item(
            "imdb-prompts",
            ("data/imdb_prompts.jsonl", "data/imdb_prompts_eval.jsonl"),
            build_imdb_prompts,
            needs=("smollm2-135m",),
        ),
        Item(
            "imdb-reviews",
            ("data/imdb_reviews_train.jsonl", "data/imdb_reviews_eval.jsonl"),
            build_imdb_reviews,
            needs=("smollm2-135m",),
        ),
        Item("movie-pairs", ("data/movie_pairs_train.jsonl", "data/movie_pairs_eval.jsonl"), build_movie_pairs),
        Item(
            "movie-choices",
            ("data/movie_rankings_train.jsonl", "data/movie_choices_train.jsonl"),
            build_movie_choices,
            needs=("movie-pairs",),
        ),
        Item("dpo-demo", ("data/dpo_demo_train.jsonl", "data/dpo_demo_eval.jsonl"), build_dpo_demo),
        Item("kto-demo", ("data/kto_demo_train.jsonl", "data/kto_demo_eval.jsonl"), build_kto_demo),
    )
}


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
        close = nearest(name, ITEMS)
        hint = f"Did you mean {close!r}?" if close else f"The items are: {', '.join(ITEMS)}."
        raise PrepareError(name, "there is no such item", hint)
    wanted = chosen | {need for name in chosen for need in ITEMS[name].needs}
    return [_prepare_item(item, target, force and name in chosen) for name, item in ITEMS.items() if name in wanted]


def _prepare_item(item: Item, target: Path, force: bool) -> PreparedItem:
    paths = tuple(target / output for output in item.outputs)
    if not force and all(path.exists() for path in paths):
        return PreparedItem(item.name, paths, built=False, seconds=0.0)
    started = time.monotonic()
    logger.info("preparing %s", item.name)
    try:
        target.mkdir(parents=True, exist_ok=True)
        # In the target itself: a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(
            prefix=f".prepare-{item.name}-", dir=target, ignore_cleanup_errors=True
        ) as scratch:
            stage = Path(scratch)
            for folder in ("models", "data", "work"):
                (stage / folder).mkdir()
            item.build(stage, target)
            for output, path in zip(item.outputs, paths, strict=True):
                _publish(stage / output, path, trash=stage / "work")
    except PrepareError:
        raise
    except Exception as error:
        raise PrepareError(
            item.name,
            f"building it failed: {type(error).__name__}: {str(error).rstrip('.')}",
            "Check free disk space and that the extra `examples` is installed (scripts/install.sh does it), then run "
            f"`rlhf-ray prepare --only {item.name}` again.",
        ) from error
    return PreparedItem(item.name, paths, built=True, seconds=time.monotonic() - started)


def _publish(source: Path, path: Path, trash: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        # A folder can't be renamed over one that has files in it.
        os.rename(path, trash / f"replaced-{path.name}")
    os.replace(source, path)
