# ruff: noqa: E501
"""Whether the unit tests of the loops notice when something in them is changed. Run by hand:

    python tests/mutations.py [--list] [NAME ...]

Each mutation replaces a text, which must be there exactly once, in a copy of the tree, and runs the tests of the loops
on it. One that all tests pass on has survived: exit status 1.
"""

import io
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

# Imported once, for all processes that are forked; nothing of rlhf_ray, which each has of its own.
import deepspeed  # noqa: F401
import pytest
import ray  # noqa: F401
import transformers  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/controllers/test_step.py",
    "tests/controllers/test_epoch_step.py",
    "tests/controllers/test_early_stop.py",
    "tests/actors/test_training_shards.py",
)


@dataclass(frozen=True)
class Mutation:
    """A change to a file of `rlhf_ray`."""

    name: str
    path: str
    old: str
    new: str

    def apply(self, tree: Path) -> None:
        """Raises ValueError where the text is not there exactly once."""
        file = tree / "rlhf_ray" / self.path
        text = file.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} is in {self.path} {text.count(self.old)} times, not once")
        file.write_text(text.replace(self.old, self.new))


SHARDS, TRAINED, UPDATE, POLICY, CRITIC = (
    "actors/training_shards.py",
    "actors/trained.py",
    "actors/ppo_update.py",
    "actors/policy.py",
    "actors/critic.py",
)
COLUMNS, SOURCE, PPO, ROLES = (
    "actors/columns.py",
    "controllers/experience.py",
    "controllers/ppo.py",
    "controllers/ppo_roles.py",
)
EPOCHS, GROUP, ROWS = "controllers/epochs.py", "actors/group.py", "controllers/row_sources.py"

MUTATIONS = tuple(
    Mutation(*each)
    for each in (
        (
            "old-and-reference-swapped",
            SHARDS,
            "kl_estimate(old[actions], reference[actions]",
            "kl_estimate(reference[actions], old[actions]",
        ),
        ("gamma-and-lambda-swapped", SHARDS, "values, ppo.gamma, ppo.gae_lambda", "values, ppo.gae_lambda, ppo.gamma"),
        ("sign-of-kl-in-rewards", SHARDS, "kl, offsets, kl_coef)", "kl, offsets, -kl_coef)"),
        ("reported-kl-negated", SHARDS, "_sums((old - reference)[actions]", "_sums((reference - old)[actions]"),
        (
            "penalty-is-the-plain-kl",
            SHARDS,
            "penalty=_sums(kl, offsets)",
            "penalty=_sums((old - reference)[actions], offsets)",
        ),
        (
            "context-is-learnt-from",
            SHARDS,
            "actions = torch.from_numpy(batch.loss_mask)",
            "actions = torch.ones(len(batch.loss_mask), dtype=torch.bool)",
        ),
        (
            "returns-are-advantages",
            SHARDS,
            "returns = _spread(found.returns, actions)",
            "returns = _spread(found.advantages, actions)",
        ),
        ("old-log-probs-are-the-reference's", SHARDS, "old_logprobs=old.numpy()", "old_logprobs=reference.numpy()"),
        ("mismatch-against-the-reference", SHARDS, "(engine - old)", "(engine - reference)"),
        ("no-whitening", POLICY, "if self._whitening is not None:", "if False:"),
        ("always-the-next-step", POLICY, "return total / max(1.0, tokens) <= self.ppo.kl_early_stop", "return True"),
        (
            "early-stop-by-the-first-rank",
            POLICY,
            "(sum_over_ranks(part, platform().device) for part in (kl.total, kl.weight))",
            "(kl.total, kl.weight)",
        ),
        (
            "upper-clip-is-the-lower",
            POLICY,
            "clip_high=ppo.clip if ppo.clip_high is None else ppo.clip_high",
            "clip_high=ppo.clip",
        ),
        ("no-dual-clip", POLICY, "dual_clip=ppo.dual_clip", "dual_clip=None"),
        ("no-entropy-bonus", POLICY, "entropy_coef=ppo.entropy_coef", "entropy_coef=0.0"),
        ("engine-log-probs-as-old", POLICY, "on_device(columns.old_logprobs)", "on_device(columns.engine_logprobs)"),
        ("policy-loss-unweighted", POLICY, "(out.loss * weights).sum()", "out.loss.sum()"),
        (
            "reference-with-adapters",
            POLICY,
            'self.recorder.span("reference log-probs"), adapters_off(self.engine.model)',
            'self.recorder.span("reference log-probs")',
        ),
        (
            "values-are-clipped-around-the-return",
            CRITIC,
            "on_device(columns.values), on_device(columns.returns)",
            "on_device(columns.returns), on_device(columns.returns)",
        ),
        ("value-clip-is-the-ratio's", CRITIC, "self.ppo.value_clip", "self.ppo.clip"),
        (
            "weights-of-the-micro-batch-alone",
            UPDATE,
            "step.step_tokens, step.step_samples, actions",
            "int(pack.lengths.sum()), len(samples), actions",
        ),
        ("weights-without-mask", UPDATE, "step.step_samples, actions)", "step.step_samples)"),
        ("every-micro-batch-is-the-last", TRAINED, "last=number == len(micro_batches) - 1", "last=True"),
        ("loss-is-not-checked", TRAINED, 'self.check_finite("loss", value, micro_batch, names_of)', "pass"),
        ("early-stop-is-ignored", UPDATE, "if not self.after_step(stats):", "if not self.after_step(stats) and False:"),
        (
            "early-stop-before-the-step-is-counted",
            UPDATE,
            "steps += 1",
            "steps += 0",
        ),
        (
            "advantages-of-other-samples",
            COLUMNS,
            "np.repeat(advantages[wanted],",
            "np.repeat(advantages[: len(wanted)],",
        ),
        (
            "starts-are-ignored",
            COLUMNS,
            "(wanted < start + len(shard.batch))] - start)",
            "(wanted < start + len(shard.batch))] - starts[0])",
        ),
        (
            "parts-of-a-column-misplaced",
            COLUMNS,
            "column[take_rows(batch.response_offsets, part.samples)] = part.values",
            "column[take_rows(batch.response_offsets, sorted(part.samples))] = part.values",
        ),
        (
            "columns-of-other-tokens",
            COLUMNS,
            "self.samples.columns.take(rows)",
            "self.samples.columns.take(np.sort(rows)[::-1].copy())",
        ),
        ("shards-in-order-of-completion", SOURCE, "scoring.sort(key=lambda each: each.shard.number)", "pass"),
        (
            "scores-shaped-twice",
            SOURCE,
            "shards, reports = self._training_shards(scoring, shaped, record.kl_coef)",
            "shaped = self._shaper.shape(torch.from_numpy(shaped), torch.from_numpy(truncated)).numpy()\n            shards, reports = self._training_shards(scoring, shaped, record.kl_coef)",
        ),
        (
            "scores-not-shaped",
            SOURCE,
            "self._training_shards(scoring, shaped, record.kl_coef)",
            "self._training_shards(scoring, scores, record.kl_coef)",
        ),
        (
            "truncation-is-ignored",
            SOURCE,
            "truncated = np.concatenate([each.truncated for each in facts])",
            "truncated = np.concatenate([each.truncated & False for each in facts])",
        ),
        (
            "group-advantages-without-kl",
            SOURCE,
            "torch.from_numpy(scores) - kl_coef * torch.from_numpy(penalty)",
            "torch.from_numpy(scores)",
        ),
        (
            "sign-of-kl-in-groups",
            SOURCE,
            "torch.from_numpy(scores) - kl_coef *",
            "torch.from_numpy(scores) + kl_coef *",
        ),
        (
            "moments-of-context-too",
            SOURCE,
            "[each.action_lengths for each in facts]",
            "[each.response_lengths for each in facts]",
        ),
        (
            "moments-of-the-first-shard",
            SOURCE,
            "moments = moments.merge(report.advantages)",
            "moments = moments if moments.count else report.advantages",
        ),
        ("scores-of-the-first-shards", SOURCE, "start += samples", "start += 0"),
        ("shaper-is-not-restored", SOURCE, 'self._shaper.load_state_dict(state["scores"])', "pass"),
        ("cursor-is-not-restored", SOURCE, 'self._cursor.load_state_dict(state["cursor"])', "pass"),
        (
            "weights-of-rewards-are-ignored",
            SOURCE,
            "combine(parts, {part.name: part.weight for",
            "combine(parts, {part.name: 1.0 for",
        ),
        (
            "one-rank-makes-all-shards",
            SOURCE,
            "makers.make_training_shard(rank, scored",
            "makers.make_training_shard(0, scored",
        ),
        ("scores-before-generation-ends", SOURCE, "generated = iter(list(generated))", "pass"),
        ("weights-lost-are-not-sent-again", SOURCE, 'if roles.devices.lacks_weights("rollout"):', "if False:"),
        ("beta-is-not-updated", PPO, "self.kl.update(float(batch.kl.mean()), len(batch.scores))", "pass"),
        ("beta-by-the-sum-of-kl", PPO, "float(batch.kl.mean())", "float(batch.kl.sum())"),
        ("version-is-not-bumped", PPO, "self.version += 1", "self.version += 0"),
        (
            "version-bumped-in-the-warm-up",
            PPO,
            "if policy:\n            self.version",
            "if critic:\n            self.version",
        ),
        (
            "warm-up-off-by-one",
            PPO,
            "if step > algorithm.critic_warmup_steps",
            "if step >= algorithm.critic_warmup_steps",
        ),
        ("sync-skipped", PPO, 'if policy or self.devices.lacks_weights("rollout"):', "if False:"),
        (
            "checkpoint-after-the-sync",
            PPO,
            "        # Before the sync: engines",
            "        if policy:\n            self._send_weights()\n        # Before the sync: engines",
        ),
        (
            "plan-seed-constant",
            PPO,
            'derive_seed(self.config.seed, "minibatches", step)',
            'derive_seed(self.config.seed, "minibatches", 0)',
        ),
        ("whitening-always", PPO, "batch.moments if algorithm.whiten_advantages else None", "batch.moments"),
        ("restore-without-beta", PPO, 'self.kl.load_state_dict(checkpoint.state["kl"])', "pass"),
        ("restore-without-version", PPO, 'checkpoint.step, checkpoint.state["version"]', "checkpoint.step, 0"),
        ("restore-without-source", PPO, 'self.source.load_state_dict(checkpoint.state["source"])', "pass"),
        (
            "restore-without-showcase",
            PPO,
            'self.report.before = [SampleRow(**row) for row in checkpoint.state["before"]]',
            "self.report.before = self._showcase()",
        ),
        ("restore-without-roles", PPO, "self.checkpointing.load(checkpoint)\n", "pass\n"),
        (
            "restore-without-sync",
            PPO,
            'checkpoint.state["before"]]\n        self._send_weights()',
            'checkpoint.state["before"]]',
        ),
        (
            "roles-on-shared-devices-train-at-once",
            PPO,
            "for turn in self.devices.turns(updates):",
            "for turn in [list(updates)]:",
        ),
        ("starts-shifted", PPO, "for report in batch.reports[:-1])]", "for report in batch.reports[1:])]"),
        ("one-epoch", PPO, "epochs=algorithm.epochs,", "epochs=1,"),
        (
            "samples-of-the-first-rows-again",
            PPO,
            "here = slice(len(rows), len(rows) + wanted)",
            "here = slice(0, wanted)",
        ),
        ("missing-samples-are-no-bug", PPO, "if trained != expected and not stopped_early:", "if False:"),
        ("critic-schedule-of-the-policy", ROLES, "steps = config.run.steps * updates", "steps = policy_steps"),
        ("log-probs-at-temperature-1", ROLES, "temperature = config.rollout.sampling.temperature", "temperature = 1.0"),
        (
            "slices-of-one-shard-overlap",
            GROUP,
            "(shard.trajectories, number % slices, slices)",
            "(shard.trajectories, 0, slices)",
        ),
        ("step-weight-is-rows", EPOCHS, "float(split.rows.weights[rows].sum())", "float(len(rows))"),
        ("evaluation-of-train-rows", EPOCHS, 'Split("eval", inputs.held_out)', 'Split("eval", inputs.train)'),
        ("evaluation-never-before-the-end", EPOCHS, "(every and step % every == 0)", "(every and False)"),
        (
            "early-stop-of-epochs-is-ignored",
            EPOCHS,
            "while self.step < self.total and not self._over:",
            "while self.step < self.total:",
        ),
        ("last-weights-for-the-best", EPOCHS, "self._go_back_to_the_best()\n        if", "pass\n        if"),
        ("epochs-restore-without-rows", EPOCHS, 'self.rows.load_state_dict(state["cursor"])', "pass"),
        ("epochs-restore-without-patience", EPOCHS, 'self.early_stop.load_state_dict(state["early_stop"])', "pass"),
        ("no-checkpoint-of-the-best", EPOCHS, "due = best or", "due ="),
        (
            "rows-of-the-first-again",
            ROWS,
            "[rows[micro].tolist() for micro in mine]",
            "[list(micro) for micro in mine]",
        ),
        (
            "last-step-of-an-epoch-is-full",
            ROWS,
            "count = min(self._per_step, len(self.split.rows) - before)",
            "count = self._per_step",
        ),
    )
)


def survives(mutation: Mutation | None) -> bool:
    """Whether all tests pass on it; None changes nothing. Runs in a process of its own, which is over after it."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder)
        for name in ("rlhf_ray", "tests"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "integration"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        if mutation is not None:
            mutation.apply(tree)
        os.chdir(tree)
        sys.path[:] = [
            str(tree),
            *(path for path in sys.path if not path.startswith(str(ROOT / "tests")) and path != str(ROOT)),
        ]
        signal.alarm(300)
        told = io.StringIO()
        with redirect_stdout(told), redirect_stderr(told):
            code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:warnings", *TESTS])
        used = Path(sys.modules["rlhf_ray"].__file__ or "")
        if code not in (0, 1) or tree not in used.parents:
            raise RuntimeError(f"{mutation}: pytest could not run the tests on {tree}:\n{told.getvalue()}")
        return code == 0


def main(arguments: list[str]) -> int:
    """Print what became of each mutation."""
    if "--list" in arguments:
        print(*(f"{each.name}: {each.path}" for each in MUTATIONS), sep="\n")
        return 0
    chosen = [each for each in MUTATIONS if not arguments or each.name in arguments]
    if missing := set(arguments) - {each.name for each in chosen}:
        raise SystemExit(f"there is no mutation {', '.join(sorted(missing))}; --list names them")
    survived = []
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        if not pool.apply(survives, (None,)):
            raise SystemExit("the tests fail without any mutation")
        for mutation, alive in zip(chosen, pool.imap(survives, chosen, chunksize=1), strict=True):
            print(f"{'SURVIVED' if alive else 'killed  '} {mutation.name} ({mutation.path})", flush=True)
            survived += [mutation.name] if alive else []
    print(f"{len(chosen)} mutations, {len(chosen) - len(survived)} killed, {len(survived)} survived")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
