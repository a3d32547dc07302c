"""A job with other values under some keys of its config, and how to give these on the command line."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import ConfigError, parse_config

Overrides = Mapping[str, Any]
"""Values by dotted path, as `model_dump(mode="json")` has them."""


class JobVariants:
    """What a job becomes with other values. A search asks this a hundred thousand times, so there is no way through
    YAML, and what does not change is not copied."""

    def __init__(self, job: Job) -> None:
        self._raw = job.model_dump(mode="json", by_alias=True)

    def job(self, overrides: Overrides) -> Job | None:
        """With these keys; None where the config does not allow them."""
        raw = self._raw
        for path, value in overrides.items():
            raw = _with(raw, path.split("."), value)
        try:
            return parse_config(raw)
        except ConfigError:
            return None

    def has(self, path: str, value: Any) -> bool:
        """Whether the job has this value there already, spelt out as it is."""
        return bool(_with(self._raw, path.split("."), value) == self._raw)


def arguments(overrides: Overrides) -> list[str]:
    """As `key=value`, to give on the command line; values in YAML on one line, as they are read."""
    return [f"{key}={_written(value)}" for key, value in overrides.items()]


def _with(raw: Any, keys: Sequence[str], value: Any) -> Any:
    """What has another value under a path, and all else from `raw`."""
    if not keys:
        return value
    key, *rest = keys
    if isinstance(raw, list):
        return [_with(inner, rest, value) if number == int(key) else inner for number, inner in enumerate(raw)]
    return {**raw, key: _with(raw.get(key), rest, value)}


def _written(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("\n...\n").strip()
