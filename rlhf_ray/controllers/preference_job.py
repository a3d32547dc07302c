"""`job: preference`: what runs it, and what people are told of it."""

from collections.abc import Iterator, Sequence

from rlhf_ray.config.jobs import PreferenceJob
from rlhf_ray.config.number_formats import NumberFormats
from rlhf_ray.controllers.descriptions import Line, held_out_line, role_text
from rlhf_ray.controllers.epoch_jobs import EpochDefinition
from rlhf_ray.controllers.inputs import PreferenceInputs, check_preference
from rlhf_ray.controllers.inspection import SourceReport
from rlhf_ray.controllers.job import DataSource
from rlhf_ray.controllers.preference import PreferenceController
from rlhf_ray.controllers.preference_roles import start_preference_roles
from rlhf_ray.controllers.reference_columns import reference_cache
from rlhf_ray.controllers.roles import Actors
from rlhf_ray.controllers.run_folder import Checkpointed, Checkpointing, RunFolder
from rlhf_ray.data.comparisons import load_comparisons
from rlhf_ray.telemetry.metrics import Metrics


class PreferenceDefinition(EpochDefinition[PreferenceJob, PreferenceInputs]):
    """Offline preference learning."""

    mark = "⟦…⟧ counts in the loss"

    def check(self, config: PreferenceJob, problems: list[str]) -> PreferenceInputs | None:
        """Models and data."""
        return check_preference(config, problems)

    def run(self, config: PreferenceJob, inputs: PreferenceInputs, formats: NumberFormats) -> None:
        """Train. A reference whose log-probs are all on disk is not started."""
        cache = reference_cache(config)
        complete = cache is not None and all(map(cache.has, inputs.sets))
        with_reference = config.algorithm.needs_reference and not config.policy_is_reference and not complete
        without = () if with_reference else ("reference",)
        with RunFolder(config, inputs.steps, formats) as folder, Actors.of_job(config, folder.watch, without) as actors:
            roles = start_preference_roles(config, inputs.steps, actors, with_reference=with_reference)
            parts: dict[str, Checkpointed] = {"policy": roles.policy}
            if roles.reference is not None and config.role("reference").checkpointed:
                parts["reference"] = roles.reference
            checkpointing = Checkpointing(folder, parts, config.run.timeouts, roles.devices)
            PreferenceController(config, inputs, roles, cache, folder, checkpointing).train()

    def describe(self, config: PreferenceJob, inputs: PreferenceInputs | None) -> Iterator[Line]:
        """Steps, roles, losses, rows."""
        losses = (loss.type if loss.weight == 1 else f"{loss.weight:g} {loss.type}" for loss in config.algorithm.loss)
        beside = [("loss", " + ".join(losses))]
        if config.algorithm.needs_reference and config.policy_is_reference:
            beside.append(("reference", "the policy with its adapters off"))
        elif config.algorithm.needs_reference:
            kept = config.reference.cache
            cache = "" if kept is None else f" · log-probs kept in {kept}"
            beside.append(("reference", f"{role_text(config.role('reference'))}{cache}"))
        return self.lines(config, inputs, beside=beside)

    def results(self, config: PreferenceJob, rows: Sequence[Metrics]) -> Iterator[Line]:
        """The held-out accuracy, or loss of what was judged one by one."""
        yield held_out_line(rows, "loss" if config.algorithm.unpaired else "accuracy")

    def load_source(self, config: PreferenceJob, source: DataSource, report: SourceReport) -> None:
        """Judged answers."""
        found = load_comparisons(config.data, source.name, report.tokenizer, config.kind, report.findings)
        report.show_comparisons(found, source.limit, whole=False)


PREFERENCE = PreferenceDefinition()
