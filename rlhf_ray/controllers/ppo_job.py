"""`job: ppo`: what runs it, and what people are told of it."""

from collections.abc import Iterator, Sequence

from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.number_formats import NumberFormats
from rlhf_ray.config.rewards import FunctionReward, HttpReward, ModelReward, part_name
from rlhf_ray.controllers.descriptions import Line, counts, role_text, several
from rlhf_ray.controllers.inputs import PPOInputs, check_ppo
from rlhf_ray.controllers.inspection import SourceReport
from rlhf_ray.controllers.job import DataSource, JobDefinition
from rlhf_ray.controllers.ppo import PPOController
from rlhf_ray.controllers.ppo_roles import start_ppo_roles
from rlhf_ray.controllers.roles import Actors
from rlhf_ray.controllers.run_folder import Checkpointed, Checkpointing, RunFolder
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.telemetry.metrics import Metrics
from rlhf_ray.telemetry.summary import reward_summary


class PPODefinition(JobDefinition[PPOJob, PPOInputs]):
    """Policy-gradient learning."""

    mark = "the policy goes on from the end of each"

    def check(self, config: PPOJob, problems: list[str]) -> PPOInputs | None:
        """Models, data and rewards."""
        return check_ppo(config, problems)

    def run(self, config: PPOJob, inputs: PPOInputs, formats: NumberFormats) -> None:
        """Train."""
        with RunFolder(config, inputs.steps, formats) as folder, Actors.of_job(config, folder.watch) as actors:
            roles = start_ppo_roles(config, inputs, actors)
            parts: dict[str, Checkpointed] = {"policy": roles.policy}
            if roles.critic is not None:
                parts["critic"] = roles.critic
            checkpointing = Checkpointing(folder, parts, config.run.timeouts, roles.devices)
            PPOController(config, inputs, roles, folder, checkpointing).train()

    def describe(self, config: PPOJob, inputs: PPOInputs | None) -> Iterator[Line]:
        """Steps, roles, parts of the reward, prompts."""
        data = config.data
        per_step = f"({data.prompts_per_step} prompts × {data.samples_per_prompt})"
        yield "steps", f"{config.run.steps}, {config.samples_per_step} samples a step {per_step}"
        yield "policy", role_text(config.role("policy"))
        if config.critic is not None:
            yield "critic", f"from {role_text(config.role('critic'))}"
        yield (
            "reference",
            "the policy with its adapters off" if config.policy_is_reference else role_text(config.role("reference")),
        )
        for part in config.reward:
            yield f"reward/{part_name(part)}", f"{_part_text(config, part)} · weight {part.weight:g}"
        yield "rollout", role_text(config.role("rollout"))
        if inputs is not None:
            yield "prompts", counts(inputs.prompts)

    def results(self, config: PPOJob, rows: Sequence[Metrics]) -> Iterator[Line]:
        """The reward at the beginning and at the end."""
        yield "reward", str(reward_summary(rows))
        if len(config.reward) > 1:
            for part in config.reward:
                name = f"reward/{part_name(part)}"
                found = reward_summary(rows, name)
                note = " (never trained on)" if part.weight == 0 else ""
                yield name, f"{found.first:.3f} → {found.last:.3f} ({found.last - found.first:+.3f}){note}"

    def load_source(self, config: PPOJob, source: DataSource, report: SourceReport) -> None:
        """The prompts."""
        report.show_prompts(load_prompts(config.data, report.tokenizer, config.max_prompt_tokens, report.findings))


def _part_text(config: PPOJob, part: ModelReward | FunctionReward | HttpReward) -> str:
    if isinstance(part, ModelReward):
        return role_text(config.role(f"reward-{part_name(part)}"))
    if isinstance(part, FunctionReward):
        return f"{part.function} · {several(part.workers, 'worker')}"
    return part.url


PPO = PPODefinition()
