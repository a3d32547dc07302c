import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.loading import ConfigError, dump_config, load_config, parse_config
from rlhf_ray.config.rewards import ModelReward

# The example of the design document.
EXAMPLE = """\
job: ppo
name: sentiment-smollm2
seed: 7
policy:
  model: models/smollm2-135m
  engine: {zero_stage: 2, dtype: bfloat16, micro_batch_tokens: 2048}
  optimizer: {lr: 2.0e-5}
critic:    {init_from: reward, optimizer: {lr: 5.0e-5}}
reference: {from: policy}
reward:
  - {model: runs/reward/export, weight: 1.0}
rollout:
  sampling: {temperature: 1.0, top_p: 1.0, max_new_tokens: 24}
  engine: {max_model_len: 128}
algorithm: {kl: {coef: 0.05, estimator: k1}, gamma: 1.0, gae_lambda: 0.95, clip: 0.2, value_clip: 0.2, epochs: 1}
data: {prompts: data/imdb_prompts.jsonl, prompts_per_step: 16, samples_per_prompt: 1}
placement:
  policy:    {ranks: 1, cpus: 1}
  critic:    {ranks: 1, cpus: 1}
  reference: {colocate: policy}
  reward:    {colocate: critic}
  rollout:   {engines: 1, cpus: 1}
run: {steps: 30, checkpoint_every: 10, dir: runs/quickstart}
"""

REWARD_MODEL = """\
job: reward_model
name: reward
reward: {model: m}
data: {train: t.jsonl}
run: {dir: runs/reward}
"""

KNOWN = "known: ppo, preference, reward_model, sft, or package.module:Class"


def load(tmp_path: Path, text: str, *overrides: str) -> Any:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def problems_of(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return caught.value.problems


def test_the_example_of_the_design_is_valid(tmp_path: Path) -> None:
    config = load(tmp_path, EXAMPLE)
    assert isinstance(config, PPOJob)
    assert config.policy.optimizer.lr == 2e-5
    assert config.reference.from_model == "policy"
    assert isinstance(config.reward[0], ModelReward)
    assert config.samples_per_step == 16


@pytest.mark.parametrize("text", [EXAMPLE, REWARD_MODEL, REWARD_MODEL + "loss: {type: plackett_luce}\n"])
def test_a_dumped_config_loads_to_the_same_config(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, text)
    assert load(tmp_path, dump_config(config)) == config
    assert "from_model" not in dump_config(config)


@settings(deadline=None, max_examples=60)
@given(
    name=st.one_of(
        st.sampled_from(["1e5", "1.5", "null", "yes", "2024-01-01", "-", "1e-3"]), st.from_regex(r"\A[A-Za-z0-9_.-]+\Z")
    ),
    env=st.dictionaries(
        st.text(st.characters(exclude_categories=["C"]), max_size=5),
        st.one_of(
            st.sampled_from(["1e5", "", "0", " x", "#", "- a", "a: b", "5.e3"]),
            st.text(st.characters(exclude_categories=["C"])),
        ),
        max_size=3,
    ),
    lr=st.floats(1e-300, 1e18),
)
def test_any_words_and_numbers_survive_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, name: str, env: dict[str, str], lr: float
) -> None:
    raw = {
        "job": "reward_model",
        "name": name,
        "reward": {"model": name, "optimizer": {"lr": lr}},
        "data": {"train": name},
        "placement": {"reward": {"env": env}},
        "run": {"dir": name},
    }
    config = parse_config(raw)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("polcy.model=x", "polcy: unknown key; did you mean 'policy'?"),
        ("run.step=5", "run.step: unknown key; did you mean 'steps'?"),
        ("policy.engine.zero_stag=1", "policy.engine.zero_stag: unknown key; did you mean 'zero_stage'?"),
        ("reward.0.wieght=1", "reward.0.wieght: unknown key; did you mean 'weight'?"),
        ("reward.0.engine.dtipe=float32", "reward.0.engine.dtipe: unknown key; did you mean 'dtype'?"),
        ("reference.fro=x", "reference.fro: unknown key; did you mean 'from'?"),
        ("reference={from_model: x}", "reference.from_model: unknown key; known keys: from, engine"),
        ("run.keep_best.metrik=x", "run.keep_best.metrik: unknown key; did you mean 'metric'?"),
        ("algorithm.kl.xyz=1", "algorithm.kl.xyz: unknown key; known keys: coef, estimator, target, horizon"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(tmp_path: Path, override: str, problem: str) -> None:
    assert problems_of(tmp_path, EXAMPLE, override) == [problem]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("run.steps=0", "run.steps: input should be greater than 0 (got 0)"),
        (
            "run.steps=many",
            "run.steps: should be a whole number, in digits (got 'many')",
        ),
        (
            "policy.engine.dtype=bf16",
            "policy.engine.dtype: input should be 'auto', 'bfloat16' or 'float32' (got 'bf16')",
        ),
        ("algorithm.kl.coef=.inf", "algorithm.kl.coef: input should be a finite number (got inf)"),
        ("reward.0.model=5", "reward.0.model: should be text, in quotes where it looks like something else (got 5)"),
        (
            "reward.0={weight: 1}",
            "reward.0: a reward part needs one of the keys model, function or url (got {'weight': 1})",
        ),
        ("reward.0=x", "reward.0: a reward part needs one of the keys model, function or url (got 'x')"),
        ("reward=x", "reward: should be a list (got 'x')"),
        ("rollout=x", "rollout: should be a section (got 'x')"),
        ("placement.policy.env=x", "placement.policy.env: should be a section (got 'x')"),
        ("policy.model=", "policy.model: should be text, in quotes where it looks like something else (got None)"),
        ("policy={}", "policy.model: is required"),
        (
            "job=pppo",
            f"job: 'pppo' is not a job type; did you mean 'ppo'? ({KNOWN})",
        ),
        (
            "job=sleep",
            f"job: 'sleep' is not a job type ({KNOWN})",
        ),
        ("job=", f"job: is missing ({KNOWN})"),
    ],
)
def test_a_wrong_value_names_its_path_and_itself(tmp_path: Path, override: str, problem: str) -> None:
    assert problems_of(tmp_path, EXAMPLE, override) == [problem]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("loss.type=softmx", "loss.type: 'softmx' is not known; did you mean 'softmax'?"),
        (
            "loss.type=hinge",
            "loss.type: 'hinge' is not known; known: bradley_terry, softmax, plackett_luce, all_pairs",
        ),
        ("loss.centering=0.01", "loss: needs the key type"),
        ("loss=x", "loss: should be a section (got 'x')"),
        ("loss={type: softmax, margin: 1}", "loss.margin: unknown key; known keys: type"),
        ("loss={type: bradley_terry, margn: 1}", "loss.margn: unknown key; did you mean 'margin'?"),
        (
            "loss={type: bradley_terry, margin: -1}",
            "loss.margin: input should be greater than or equal to 0 (got -1)",
        ),
    ],
)
def test_a_section_of_several_kinds_is_told_apart_by_its_type(tmp_path: Path, override: str, problem: str) -> None:
    assert problems_of(tmp_path, REWARD_MODEL, override) == [problem]


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    found = problems_of(tmp_path, EXAMPLE, "run.step=5", "policy.engine.zero_stage=7", "reward.0.weight=x")
    assert [problem.split(":")[0] for problem in found] == ["policy.engine.zero_stage", "reward.0.weight", "run.step"]


def test_an_entry_of_no_kind_is_told_beside_a_wrong_key_of_another(tmp_path: Path) -> None:
    found = problems_of(tmp_path, EXAMPLE, "reward=[{weight: 1}, {model: m, weigth: 2}]")
    assert [problem.split(":")[0] for problem in found] == ["reward.0", "reward.1.weigth"]


def test_overrides_set_single_values_read_as_yaml(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        EXAMPLE,
        "run.steps=5",
        "policy.optimizer.lr=1e-6",
        "reward.0.weight=0.5",
        "placement.rollout.env.OMP_NUM_THREADS='2'",
        "run.keep_best={metric: kl/mean, mode: min}",
        "rollout.sampling.stop=[a, b]",
        "algorithm.value_clip=null",
        "run.dir=runs/a=b",
    )
    assert config.run.steps == 5
    assert config.policy.optimizer.lr == 1e-6
    assert config.reward[0].weight == 0.5
    assert config.reward[0].model == "runs/reward/export"
    assert config.placement.rollout.env == {"OMP_NUM_THREADS": "2"}
    assert (config.run.keep_best.metric, config.run.keep_best.mode) == ("kl/mean", "min")
    assert config.rollout.sampling.stop == ("a", "b")
    assert config.algorithm.value_clip is None
    assert config.run.dir == "runs/a=b"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("run.steps", "'run.steps' is not of the form section.key=value"),
        ("=5", "'=5' is not of the form section.key=value"),
        ("run..steps=5", "'run..steps=5' is not of the form section.key=value"),
        (
            "run.steps=[",
            "'run.steps=[': the value is not YAML: while parsing a flow node expected the node content, "
            "but found '<stream end>' (line 1, column 2)",
        ),
        ("run.steps.x=5", "run.steps.x: run.steps is a value, not a section"),
        ("reward.1.weight=5", "reward.1: the list has entries 0 to 0"),
        ("reward.x.weight=5", "reward.x: the list has entries 0 to 0"),
    ],
)
def test_an_override_that_cannot_be_applied_says_why(tmp_path: Path, override: str, problem: str) -> None:
    assert problems_of(tmp_path, EXAMPLE, override) == [problem]


def test_an_override_of_an_empty_list_says_so(tmp_path: Path) -> None:
    assert problems_of(tmp_path, "job: ppo\nreward: []", "reward.0.weight=1") == ["reward.0: the list has no entries"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("job: ppo\njob: ppo", "key 'job' stands twice"),
        ("job: ppo\nrun: {steps: 1, dir: x, steps: 2}", "key 'steps' stands twice"),
        ("job: ppo\nreward:\n- {model: a, model: b}", "key 'model' stands twice"),
        ("job: [", "is not YAML: while parsing"),
        ("job: ppo\n? [a]\n: b", "has a key that is no word"),
        ("job: !!python/object:os.system {}", "has the tag '!!python/object:os.system', which means nothing here"),
        ("job: ppo\nrun: &a {b: *a}", "an anchor contains itself"),
        ("", "must be a mapping of sections"),
        ("- job", "must be a mapping of sections"),
    ],
)
def test_a_file_that_is_no_config_says_where_and_why(tmp_path: Path, text: str, problem: str) -> None:
    (found,) = problems_of(tmp_path, text)
    assert problem in found


def test_the_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: it is a folder"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match=r"latin.yaml: is not UTF-8 text \(byte 7\)"):
        load_config(tmp_path / "latin.yaml")


def test_exponents_without_a_point_are_numbers_and_quoted_ones_are_words(tmp_path: Path) -> None:
    text = REWARD_MODEL.replace("reward: {model: m}", "reward: {model: '1e5', optimizer: {lr: 1e-5}}")
    config = load(tmp_path, text)
    assert (config.reward.model, config.reward.optimizer.lr) == ("1e5", 1e-5)


def test_anchors_and_merge_keys_work_and_an_override_changes_one_place(tmp_path: Path) -> None:
    text = EXAMPLE.replace("optimizer: {lr: 2.0e-5}", "optimizer: &adam {lr: 2.0e-5, eps: 1.0e-6}")
    text = text.replace("optimizer: {lr: 5.0e-5}", "optimizer: *adam")
    config = load(tmp_path, text, "policy.optimizer.lr=1e-7")
    assert (config.policy.optimizer.lr, config.critic.optimizer.lr) == (1e-7, 2e-5)
    config = load(tmp_path, text.replace("optimizer: *adam", "optimizer: {<<: *adam, lr: 3.0e-5}"))
    assert (config.critic.optimizer.lr, config.critic.optimizer.eps) == (3e-5, 1e-6)


def test_a_loaded_config_cannot_change(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path, EXAMPLE).run.steps = 4


def test_the_error_crosses_processes_whole() -> None:
    error = ConfigError("my.yaml", ["policy.model: is missing"])
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.source, copy.problems) == (str(error), error.source, error.problems)
