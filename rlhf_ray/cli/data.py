"""`rlhf-ray data`: commands on the data of a job."""

import typer

from rlhf_ray.cli.arguments import Config, Overrides, problems_of
from rlhf_ray.cli.failures import BAD_INPUT, say

data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at the data of a job.")


@data.command(short_help="Show what a job learns from its data.")
def inspect(config: Config, overrides: Overrides = None) -> None:
    """Read the data of a job as `train` would, and show what it learns from it, without starting anything.

    For each source: rows read, kept, dropped, truncated and refused; lengths in tokens; problems by row, twenty at
    most, some of each kind; and three rows as text, special tokens included, in which ⟦…⟧ is what counts in the loss.
    Of the model only the tokenizer is loaded. The exit code is 2 when there are problems.

    \b
    Examples:
      rlhf-ray data inspect configs/tiny_sft.yaml
      rlhf-ray data inspect configs/tiny_reward.yaml data.max_tokens=64
      rlhf-ray data inspect my.yaml data.train=owner/name:train 'data.columns={prompt: question}'
    """
    from rlhf_ray.cli.inspection import inspect_sources, print_report
    from rlhf_ray.config.loading import load_config

    job = load_config(config, overrides or ())
    problems = 0
    with problems_of(config):
        for number, report in enumerate(inspect_sources(job)):
            print_report(report, first=number == 0)
            problems += report.count
    if problems:
        say("1 problem" if problems == 1 else f"{problems:,} problems", error=True)
        raise typer.Exit(BAD_INPUT)
