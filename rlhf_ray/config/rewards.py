"""The parts of the reward: models, Python functions and HTTP services."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from rlhf_ray.config.base import NonNegativeInt, PositiveInt, ProcessCount, Seconds, Section
from rlhf_ray.config.paths import UsablePath
from rlhf_ray.config.training import ScoringEngine


class _RewardPart(Section):
    name: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]*$")
    """Name in metrics (`reward/<name>`) and samples. Empty takes it from the source's last part."""
    weight: float = 1.0
    """Factor in the sum. 0 logs the part without training on it."""


class ModelReward(_RewardPart):
    """A sequence classifier with one output, in reward actors."""

    model: UsablePath
    """Folder of an `AutoModelForSequenceClassification` with one label."""
    trust_remote_code: bool = False
    """Run Python code that comes with this model. Off unless you have read that code."""
    engine: ScoringEngine = ScoringEngine()
    """How it is held and fed."""
    normalise: bool = False
    """Make its scores (score − `score_mean`) ÷ `score_std`, which stand in the `config.json` of a model trained here:
    mean and standard deviation over the texts that it was evaluated on."""


class FunctionReward(_RewardPart):
    """A Python function `f(prompts: list[str], responses: list[str]) -> list[float]`, called in workers. Further
    parameters get the columns of their names: docs/ppo.md."""

    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """`package.module:function`, importable on every node."""
    workers: ProcessCount = 1
    """Processes that call it."""
    batch_size: PositiveInt = 64
    """Samples in one call."""
    timeout_s: Seconds = 60.0
    """Seconds one call may take before the run stops with an error that names the samples."""


class HttpReward(_RewardPart):
    """A service: POST of `{"prompts": [...], "responses": [...]}`, answered by `{"scores": [...]}`. Where rows
    have other columns, the POST has them as `"columns": {name: [...]}`."""

    url: str = Field(pattern=r"^https?://")
    """Address that takes the POST."""
    batch_size: PositiveInt = 32
    """Samples in one request."""
    timeout_s: Seconds = 30.0
    """Seconds one request may take."""
    retries: NonNegativeInt = 4
    """Further tries after a refused connection, a time-out or a 429 or 5xx answer."""
    backoff_s: Seconds = 0.5
    """Wait before the first retry; doubles with each, with jitter."""
    token_env: str | None = None
    """Environment variable, on every node, that holds the bearer token. The token itself never stands in a config."""


def _kind_of_part(value: Any) -> str | None:
    keys = value if isinstance(value, dict) else getattr(value, "model_fields_set", ())
    return next((kind for kind in ("model", "function", "url") if kind in keys), None)


RewardPart = Annotated[
    Annotated[ModelReward, Tag("model")]
    | Annotated[FunctionReward, Tag("function")]
    | Annotated[HttpReward, Tag("url")],
    Discriminator(
        _kind_of_part,
        custom_error_type="reward_kind",
        custom_error_message="a reward part needs one of the keys model, function or url",
    ),
]


def part_name(part: ModelReward | FunctionReward | HttpReward) -> str:
    """The name a part is logged under: its own, else the last piece of its model, function or address."""
    if part.name:
        return part.name
    if isinstance(part, ModelReward):
        pieces = [piece for piece in part.model.split("/") if piece not in ("", "export")]
        return pieces[-1] if pieces else "model"
    if isinstance(part, FunctionReward):
        return part.function.partition(":")[0].rsplit(".", 1)[-1]
    return "http"
