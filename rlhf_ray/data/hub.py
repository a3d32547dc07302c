"""The Hugging Face hub: whether it answers is asked once and within seconds, so that no library waits for it again."""

import logging
import os
import sys
import threading
from functools import cache
from pathlib import Path

import httpx

logger = logging.getLogger(__name__)

ANSWER_S = 4.0
"""Seconds that the hub has for an answer. Its own client tries for half a minute, and for each file anew."""

OFFLINE = "HF_HUB_OFFLINE"


def reach_hub() -> bool:
    """Whether the hub answers, or may be asked at all. When it does not, its libraries use what they have in their
    cache, here and in processes that start later."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    if _answers(constants.ENDPOINT):
        return True
    os.environ[OFFLINE] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return False


def may_be_on_hub(model: str) -> bool:
    """Whether a path that does not exist may be the name of a model of the hub, and not a mistyped folder."""
    parts = Path(model).parts
    return len(parts) == 2 and parts[0] not in ("models", "runs") and not model.startswith((".", "/", "~"))


def tell_of_cache(name: str) -> None:
    """Say that something is used as it was when it was fetched."""
    logger.warning("%s is taken from the cache of this machine, since the hub does not answer", name)


def why_no_model(name: str) -> str | None:
    """Why a model of the hub can't be had; None when it may be."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return "no such folder, and no name that a model of the hub can have"
    if reach_hub():
        return None
    if cached:
        tell_of_cache(name)
        return None
    return (
        f"no such folder, and the hub ({constants.ENDPOINT}) can't be asked for it: correct the path, look at the "
        f"network, HF_ENDPOINT and {OFFLINE}, or download it where there is a network (`hf download {name} --local-dir "
        "FOLDER`) and name that folder"
    )


@cache
def _answers(endpoint: str) -> bool:
    """In a thread, since looking up a host's name knows no limit of time."""
    answers: list[int] = []

    def ask() -> None:
        try:
            answers.append(httpx.head(endpoint, timeout=ANSWER_S).status_code)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
            logger.debug("%s does not answer: %s", endpoint, error)

    thread = threading.Thread(target=ask, name="hub", daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    # What a proxy says of itself is no answer of the hub.
    return bool(answers) and answers[0] < 500 and answers[0] != 407
