"""`job: sft` and `job: reward_model`: what runs them, and what people are told of them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from rlhf_ray.actors.reward_training import RewardTrainingGroup, RewardTrainingWorker
from rlhf_ray.actors.sft import SFTGroup, SFTWorker
from rlhf_ray.actors.worker import join_collectives_of
from rlhf_ray.config.jobs import EpochJob, RewardModelJob, SFTJob
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

ConfigT = TypeVar("ConfigT", bound=EpochJob)
InputsT = TypeVar("InputsT", bound=EpochInputs)


class EpochDefinition(JobDefinition[ConfigT, InputsT]):
    """What is told alike of all jobs over a data set."""

    def lines(
        self,
        config: ConfigT,
        inputs: InputsT | None,
        *,
        steps: int | None = None,
        rows: str = "rows",
        beside: Iterable[Line] = (),
    ) -> Iterator[Line]:
        """Steps, model, what there is beside it, and what was read of the rows.

        Args:
            steps: of a run that is not counted in epochs.
            rows: what a row is called.
        """
        epochs = several(config.run.epochs, "epoch")
        planned = epochs if inputs is None else f"{inputs.steps} ({epochs})"
        yield "steps", f"{steps or planned}, {config.rows_per_step} {rows} a step"
        yield config.trained.name, role_text(config.trained)
        yield from beside
        if inputs is not None:
            train = inputs.train
            yield rows, "read while training" if isinstance(train, ConversationStream) else counts(train)
            if inputs.held_out is not None:
                yield f"held-out {rows}", counts(inputs.held_out)

    def sources(self, config: ConfigT) -> list[DataSource]:
        """Those to train on, and the held-out one."""
        data = config.data
        limits = {"data.eval": data.eval_rows}
        return [replace(each, limit=limits.get(each.key, data.train_rows)) for each in super().sources(config)]


class SFTDefinition(EpochDefinition[SFTJob, EpochInputs]):
    """Supervised fine-tuning."""

    mark = "⟦…⟧ counts in the loss"

    def check(self, config: SFTJob, problems: list[str]) -> EpochInputs | None:
        """Model and data."""
        return check_sft(config, problems)

    def run(self, config: SFTJob, inputs: EpochInputs, formats: NumberFormats) -> None:
        """Train."""
        with RunFolder(config, inputs.steps, formats) as folder, Actors.of_job(config, folder.watch) as actors:
            group = start_sft(config, inputs.steps, actors)
            checkpointing = Checkpointing(folder, {config.trained.name: group}, config.run.timeouts)
            EpochController(config, inputs, group, folder, checkpointing).train()

    def describe(self, config: SFTJob, inputs: EpochInputs | None) -> Iterator[Line]:
        """Steps, model, rows."""
        return self.lines(config, inputs, steps=config.run.steps)

    def results(self, config: SFTJob, rows: Sequence[Metrics]) -> Iterator[Line]:
        """The held-out perplexity."""
        yield held_out_line(rows, "perplexity")

    def sources(self, config: SFTJob) -> list[DataSource]:
        """Those to train on with their weights, and the held-out one."""
        found = super().sources(config)
        train = config.data.sources
        weighted = [replace(each, weight=source.weight) for each, source in zip(found, train, strict=False)]
        return weighted + found[len(train) :]

    def load_source(self, config: SFTJob, source: DataSource, report: SourceReport) -> None:
        """Conversations."""
        talks = load_conversations(config.data, source.name, report.tokenizer, report.findings)
        report.show_conversations(talks, source.limit)


class RewardModelDefinition(EpochDefinition[RewardModelJob, EpochInputs]):
    """Training of a reward model."""

    mark = "⟦…⟧ is where the score is read"

    def check(self, config: RewardModelJob, problems: list[str]) -> EpochInputs | None:
        """Model and data."""
        return check_reward_model(config, problems)

    def run(self, config: RewardModelJob, inputs: EpochInputs, formats: NumberFormats) -> None:
        """Train."""
        with RunFolder(config, inputs.steps, formats) as folder, Actors.of_job(config, folder.watch) as actors:
            group = start_reward_training(config, inputs.steps, actors)
            checkpointing = Checkpointing(folder, {config.trained.name: group}, config.run.timeouts)
            RewardModelController(config, inputs, group, folder, checkpointing).train()

    def finish(self, config: RewardModelJob) -> None:
        """The plot of how far its probabilities can be relied on."""
        plot_reliability(Path(config.run.dir))

    def describe(self, config: RewardModelJob, inputs: EpochInputs | None) -> Iterator[Line]:
        """Steps, model, rows."""
        return self.lines(config, inputs, rows="pairs" if isinstance(config.loss, BradleyTerry) else "rows")

    def results(self, config: RewardModelJob, rows: Sequence[Metrics]) -> Iterator[Line]:
        """The held-out accuracy."""
        yield held_out_line(rows, "accuracy")

    def load_source(self, config: RewardModelJob, source: DataSource, report: SourceReport) -> None:
        """Judged answers."""
        found = load_comparisons(config.data, source.name, report.tokenizer, config.kind, report.findings)
        judged = report.show_comparisons(found, source.limit, whole=True)
        report.problems += unfit_rows(config, source.key, judged)


def start_sft(config: SFTJob, steps: int, actors: Actors) -> SFTGroup:
    """The ranks of the policy, ready to train for so many steps."""
    group = actors.ranks(config.trained, SFTWorker, SFTGroup, config)
    join_collectives_of([group], config.run.timeouts)
    group.load_model(config.policy, steps).wait(config.run.timeouts.setup)
    return group


def start_reward_training(config: RewardModelJob, steps: int, actors: Actors) -> RewardTrainingGroup:
    """The same of a reward model."""
    group = actors.ranks(config.trained, RewardTrainingWorker, RewardTrainingGroup, config)
    join_collectives_of([group], config.run.timeouts)
    group.load_model(config.reward, config.loss, steps, config.seed).wait(config.run.timeouts.setup)
    return group


SFT = SFTDefinition()
REWARD_MODEL = RewardModelDefinition()
