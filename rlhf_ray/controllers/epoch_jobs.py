"""`job: sft` and `job: reward_model`: what runs them, and what people are told of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_ray.actors.reward_training import RewardTrainingGroup, RewardTrainingWorker
from rlhf_ray.actors.sft import SFTGroup, SFTWorker
from rlhf_ray.actors.worker import join_collectives_of
from rlhf_ray.config.jobs import RewardModelJob, SFTJob
from rlhf_ray.config.number_formats import NumberFormats
from rlhf_ray.config.reward_loss import BradleyTerry
from rlhf_ray.controllers.descriptions import Line, counts, held_out_line, role_text, several
from rlhf_ray.controllers.epochs import EpochController
from rlhf_ray.controllers.inputs import EpochInputs, check_reward_model, check_sft, unfit_rows
from rlhf_ray.controllers.inspection import SourceReport
from rlhf_ray.controllers.job import DataSource, JobDefinition
from rlhf_ray.controllers.reward_model import RewardModelController
from rlhf_ray.controllers.roles import Actors
from rlhf_ray.controllers.run_folder import Checkpointing, RunFolder
from rlhf_ray.data.comparisons import load_comparisons
from rlhf_ray.data.conversations import load_conversations
from rlhf_ray.data.streaming import ConversationStream
from rlhf_ray.telemetry.metrics import Metrics
from rlhf_ray.telemetry.reliability_plot import plot_reliability


class SFTDefinition(JobDefinition[SFTJob, EpochInputs]):
    """Supervised fine-tuning."""

    mark = "⟦…⟧ counts in the loss"

    def check(self, config: SFTJob, problems: list[str]) -> EpochInputs | None:
        """Model and data."""
        return check_sft(config, problems)

    def run(self, config: SFTJob, inputs: EpochInputs, formats: NumberFormats) -> None:
        """Train."""
        with RunFolder(config, inputs.steps, formats) as folder, Actors.of_job(config, folder.watch) as actors:
            group = actors.ranks(config.trained, SFTWorker, SFTGroup, config)
            join_collectives_of([group], config.run.timeouts)
            group.load_model(config.policy, inputs.steps).wait(config.run.timeouts.setup)
            checkpointing = Checkpointing(folder, {config.trained.name: group}, config.run.timeouts)
            EpochController(config, inputs, group, folder, checkpointing).train()

    def describe(self, config: SFTJob, inputs: EpochInputs | None) -> Iterator[Line]:
        """Steps, model, rows."""
        epochs = several(config.run.epochs, "epoch")
        steps = epochs if inputs is None else f"{inputs.steps} ({epochs})"
        if config.run.steps is not None:
            steps = str(config.run.steps)
        yield "steps", f"{steps}, {config.rows_per_step} rows a step"
        yield config.trained.name, role_text(config.trained)
        yield from row_lines(inputs, "rows")

    def results(self, config: SFTJob, rows: Sequence[Metrics]) -> Iterator[Line]:
        """The held-out perplexity."""
        yield held_out_line(rows, "perplexity")

    def sources(self, config: SFTJob) -> list[DataSource]:
        """Those to train on with their weights, and the held-out one."""
        data = config.data
        train = (
            [DataSource("data.train", data.train, data.train_rows)]
            if isinstance(data.train, str)
            else [
                DataSource(f"data.train.{index}.path", source.path, data.train_rows, source.weight)
                for index, source in enumerate(data.train)
            ]
        )
        return train + held_out_source(data.eval, data.eval_rows)

    def load_source(self, config: SFTJob, source: DataSource, report: SourceReport) -> None:
        """Conversations."""
        talks = load_conversations(config.data, source.name, report.tokenizer, report.findings)
        report.show_conversations(talks, source.limit)


class RewardModelDefinition(JobDefinition[RewardModelJob, EpochInputs]):
    """Training of a reward model."""

    mark = "⟦…⟧ is where the score is read"

    def check(self, config: RewardModelJob, problems: list[str]) -> EpochInputs | None:
        """Model and data."""
        return check_reward_model(config, problems)

    def run(self, config: RewardModelJob, inputs: EpochInputs, formats: NumberFormats) -> None:
        """Train."""
        with RunFolder(config, inputs.steps, formats) as folder, Actors.of_job(config, folder.watch) as actors:
            group = actors.ranks(config.trained, RewardTrainingWorker, RewardTrainingGroup, config)
            join_collectives_of([group], config.run.timeouts)
            loading = group.load_model(config.reward, config.loss, inputs.steps, config.seed)
            loading.wait(config.run.timeouts.setup)
            checkpointing = Checkpointing(folder, {config.trained.name: group}, config.run.timeouts)
            RewardModelController(config, inputs, group, folder, checkpointing).train()

    def finish(self, config: RewardModelJob) -> None:
        """The plot of how far its probabilities can be relied on."""
        plot_reliability(Path(config.run.dir))

    def describe(self, config: RewardModelJob, inputs: EpochInputs | None) -> Iterator[Line]:
        """Steps, model, rows."""
        rows = "pairs" if isinstance(config.loss, BradleyTerry) else "rows"
        epochs = several(config.run.epochs, "epoch")
        steps = epochs if inputs is None else f"{inputs.steps} ({epochs})"
        yield "steps", f"{steps}, {config.rows_per_step} {rows} a step"
        yield config.trained.name, role_text(config.trained)
        yield from row_lines(inputs, rows)

    def results(self, config: RewardModelJob, rows: Sequence[Metrics]) -> Iterator[Line]:
        """The held-out accuracy."""
        yield held_out_line(rows, "accuracy")

    def sources(self, config: RewardModelJob) -> list[DataSource]:
        """Those to train on and to evaluate on."""
        data = config.data
        return [
            DataSource("data.train", data.train, data.train_rows),
            *held_out_source(data.eval, data.eval_rows),
        ]

    def load_source(self, config: RewardModelJob, source: DataSource, report: SourceReport) -> None:
        """Judged answers."""
        found = load_comparisons(config.data, source.name, report.tokenizer, config.kind, report.findings)
        judged = report.show_comparisons(found, source.limit, whole=True)
        report.problems += unfit_rows(config, source.key, judged)


def row_lines(inputs: EpochInputs | None, rows: str) -> Iterator[Line]:
    """What was read of the rows of a data set."""
    if inputs is not None:
        train = inputs.train
        yield rows, "read while training" if isinstance(train, ConversationStream) else counts(train)
        if inputs.held_out is not None:
            yield f"held-out {rows}", counts(inputs.held_out)


def held_out_source(name: str | None, limit: int | None) -> list[DataSource]:
    """What `data.eval` names."""
    return [] if name is None else [DataSource("data.eval", name, limit)]


SFT = SFTDefinition()
REWARD_MODEL = RewardModelDefinition()
