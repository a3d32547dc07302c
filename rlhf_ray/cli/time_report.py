"""Predicted step times and proposed placements, as tables or for JSON."""

from collections.abc import Iterable, Iterator, Sequence
from shlex import quote
from typing import Any

from rich.table import Table
from rich.text import Text

from rlhf_ray.planner.calibration import Calibration
from rlhf_ray.planner.search import Proposal
from rlhf_ray.planner.step_time import StepTime
from rlhf_ray.planner.work import Lengths
from rlhf_ray.telemetry.progress import QuietConsole

_PHASES = {
    "generate": "generation",
    "score": "scoring, from the first responses on",
    "update": "update",
    "critic_update": "update of the critic",
    "policy_update": "update of the policy",
    "weight_sync": "weight sync",
    "switch": "roles leaving devices to each other",
}

_NONE_FITS = (
    "None of the placements that were tried fits: take more or larger machines, or give roles fewer labels and custom "
    "resources in placement, which all that is tried keeps."
)


def print_time(step: StepTime, lengths: Lengths, known: Sequence[Calibration]) -> None:
    """What a step takes, and who idles meanwhile."""
    console = QuietConsole()
    console.print(Text(f"One step, in seconds: {_seconds(step.seconds)}", "bold"))
    table = plain_table(["phase"], ["seconds"])
    for phase, seconds in step.phases.items():
        table.add_row(_PHASES[phase], _seconds(seconds))
    console.print(table)
    console.print()
    roles = plain_table(["role"], ["busy", "idle"])
    for role, idle in step.idle.items():
        roles.add_row(role, f"{1 - idle:.0%}", f"{idle:.0%}")
    console.print(roles)
    console.print()
    for line in _assumed(step, lengths, known):
        console.print(Text(line), soft_wrap=True)


def print_proposals(found: Sequence[Proposal], lengths: Lengths, known: Sequence[Calibration]) -> None:
    """The fastest placements that fit, as overrides to give."""
    console = QuietConsole()
    if not found:
        console.print(Text(_NONE_FITS, "bold red"))
        return
    for number, proposal in enumerate(found, start=1):
        step = proposal.time
        idle = ", ".join(f"{role} {share:.0%}" for role, share in step.idle.items())
        console.print(Text(f"{number}. {_seconds(step.seconds)} s a step; idle: {idle}", "bold"), soft_wrap=True)
        console.print(Text("   " + (" ".join(map(quote, proposal.arguments)) or "as it is")), soft_wrap=True)
    console.print()
    for line in _assumed(found[0].time, lengths, known):
        console.print(Text(line), soft_wrap=True)


def time_json(step: StepTime, lengths: Lengths) -> dict[str, Any]:
    """A step for programs, in seconds and tokens."""
    return {
        "seconds": step.seconds,
        "phases": step.phases,
        "idle": step.idle,
        "prompt_tokens": lengths.prompt,
        "response_tokens": lengths.response,
    }


def proposals_json(found: Sequence[Proposal], lengths: Lengths) -> list[dict[str, Any]]:
    """Proposals for programs."""
    return [{"overrides": proposal.arguments, "time": time_json(proposal.time, lengths)} for proposal in found]


def _assumed(step: StepTime, lengths: Lengths, known: Sequence[Calibration]) -> Iterator[str]:
    """What the prediction rests on."""
    if step.response_tokens:
        yield (
            f"for prompts of {lengths.prompt:g} and responses of {lengths.response:g} tokens in the mean, at most "
            f"{lengths.longest:,} (--prompt-tokens, --response-tokens): {step.response_tokens_per_s:,.0f} tokens/s"
        )
    else:
        yield (
            f"for {lengths.prompt:g} tokens of a row that are not learnt and {lengths.response:g} that are, by answer "
            "(--prompt-tokens, --response-tokens)"
        )
    for calibration in known:
        measured = f"measured on {calibration.machine}" if calibration.machine else "defaults, not measured"
        yield f"constants of {calibration.device.upper()}s: {measured}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.2f}"


def plain_table(left: Iterable[str], right: Iterable[str]) -> Table:
    """Without lines, with columns of text on the left and of numbers on the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table
