"""What runs the job."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.actors.worker import join_collectives_of
from rlhf_ray.config.number_formats import NumberFormats
from rlhf_ray.controllers.inputs import check_role_model, collect
from rlhf_ray.controllers.inspection import SourceReport
from rlhf_ray.controllers.job import DataSource, JobDefinition
from rlhf_ray.controllers.roles import Actors
from rlhf_ray.controllers.run_folder import Checkpointing, RunFolder
from rlhf_ray.controllers.step_record import StepRecord
from rlhf_ray.data.errors import DataError
from rlhf_ray.models.heads import load_tokenizer
from rlhf_ray.telemetry.metrics import reduce_means
from toy.config import ToyJob
from toy.workers import StudentGroup, StudentWorker, TellerGroup, TellerWorker


@dataclass(frozen=True)
class ToyInputs:
    """Texts and their tokens."""

    steps: int
    texts: list[str]
    rows: list[list[int]]


class ToyDefinition(JobDefinition[ToyJob, ToyInputs]):
    """The toy job."""

    def check(self, config: ToyJob, problems: list[str]) -> ToyInputs | None:
        """Model and texts."""
        with collect(problems, "student.model"):
            tokenizer = load_tokenizer(config.student.model, trust_remote_code=config.student.trust_remote_code)
            check_role_model(config.role("student"), problems)
            with collect(problems, "data.texts"):
                texts = Path(config.data.texts).read_text().splitlines()
                if not all(texts):
                    raise DataError(config.data.texts, None, "has an empty line")
                rows = [tokenizer(text)["input_ids"][: config.data.max_tokens] for text in texts]
                return ToyInputs(config.run.steps, texts, rows)
        return None

    def run(self, config: ToyJob, inputs: ToyInputs, formats: NumberFormats) -> None:
        """Train."""
        timeouts = config.run.timeouts
        with RunFolder(config, inputs.steps, formats) as folder, Actors.of_job(config, folder.watch) as actors:
            student = actors.ranks(config.role("student"), StudentWorker, StudentGroup, config)
            teller = actors.unplaced(config.role("teller"), TellerWorker, TellerGroup)
            join_collectives_of([student], timeouts)
            student.load_model(config.student, inputs.steps).wait(timeouts.setup)
            checkpointing = Checkpointing(folder, {"student": student}, timeouts)
            ToyController(config, inputs, student, teller, folder, checkpointing).train()

    def load_source(self, config: ToyJob, source: DataSource, report: SourceReport) -> None:
        """Nothing but how many there are."""
        report.findings.read = len(Path(source.name).read_text().splitlines())


class ToyController:
    """Its loop."""

    def __init__(
        self,
        config: ToyJob,
        inputs: ToyInputs,
        student: StudentGroup,
        teller: TellerGroup,
        folder: RunFolder,
        checkpointing: Checkpointing,
    ) -> None:
        self.config, self.inputs, self.student, self.teller = config, inputs, student, teller
        self.folder, self.checkpointing, self.told = folder, checkpointing, 0

    def train(self) -> None:
        """All steps from where the run stands."""
        done = self.folder.resumed
        if done is not None:
            self.checkpointing.load(done)
            self.told = done.state["told"]
        self.folder.start_progress()
        for step in range(done.step + 1 if done else 1, self.inputs.steps + 1):
            self._step(step)
        self.checkpointing.export("student", wait=True)

    def _step(self, step: int) -> None:
        record, limits = StepRecord(step, self.folder.recorder), self.config.run.timeouts
        count, size = len(self.inputs.texts), self.config.data.rows_per_step
        chosen = [row % count for row in range((step - 1) * size, step * size)]
        [weights] = self.teller.weigh([self.inputs.texts[row] for row in chosen], self.config.teller.word).wait(
            limits.score
        )
        self.told += len(weights)
        with record.span("update"):
            reports = self.student.step([self.inputs.rows[row] for row in chosen], weights).wait(limits.update)
        metrics: dict[str, Any] = {f"train/{k}": v for k, v in reduce_means([r.means for r in reports]).items()}
        metrics |= record.timings(self.folder.collect_spans([self.student, self.teller], limits.setup))
        due = self.folder.checkpoint_due(step, step == self.inputs.steps)
        if due:
            self.checkpointing.save(step)
        self.folder.log_step(step, metrics)
        if due:
            self.checkpointing.commit(step, {"told": self.told}, metrics)


TOY = ToyDefinition()
