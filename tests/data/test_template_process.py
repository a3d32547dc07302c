"""Chat templates give what transformers gives, and end within their limits whatever they do."""

import copy
import json
import os
import time
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.data import PromptData
from rlhf_ray.data import chat
from rlhf_ray.data.errors import DataErrors
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.data.template_process import TemplateError, TemplateLimitError, TemplateProcess

TALK = [{"role": "user", "content": "naïve 🙂"}, {"role": "assistant", "content": "Yes."}]
FOR_EVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HANGING = [FOR_EVER, "{{ 9 ** (9 ** 9) }}"]
HUGE = [
    ("{{ 'a' * 10**11 }}", "it takes more than 1 GiB for one conversation"),
    ("{% for a in range(99999) %}{{ 'a' * 10**6 }}{% endfor %}", "it takes more than 1 GiB for one conversation"),
    ("{{ 'a' * 10**8 }}", "it makes 100,000,000 characters of one conversation, more than 33,554,432"),
]


@pytest.fixture(scope="module")
def process() -> TemplateProcess:
    return TemplateProcess()


def render(process: TemplateProcess, template: str, limit_s: float = 30) -> str:
    return process.render(template, {}, TALK, add_generation_prompt=True, limit_s=limit_s)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_text_is_that_of_transformers(
    add_generation_prompt: bool, process: TemplateProcess, tokenizer: PreTrainedTokenizerFast
) -> None:
    for template in (str(tokenizer.chat_template), "{{ eos_token }}{{ messages | tojson }}{{ add_generation_prompt }}"):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        expected = changed.apply_chat_template(TALK, tokenize=False, add_generation_prompt=add_generation_prompt)
        tokens = changed.special_tokens_map
        found = process.render(template, tokens, TALK, add_generation_prompt=add_generation_prompt)
        assert found == expected


@pytest.mark.parametrize("template", HANGING)
def test_a_template_that_does_not_end_is_ended(template: str, process: TemplateProcess) -> None:
    render(process, "warm")
    start = time.monotonic()
    with pytest.raises(TemplateLimitError, match=r"^it does not come to an end within 0.5 s$"):
        render(process, template, limit_s=0.5)
    assert time.monotonic() - start < 15
    assert render(process, "as before") == "as before"


@pytest.mark.parametrize(("template", "reason"), HUGE)
def test_a_template_that_makes_gigabytes_is_ended(template: str, reason: str, process: TemplateProcess) -> None:
    with pytest.raises(TemplateLimitError, match=reason):
        render(process, template)
    assert render(process, "as before") == "as before"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('not this') }}", "^not this$"),
        ("{{ ", "unexpected 'end of template'"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "maximum recursion depth"),
        ("{{ raise_exception('a' * 10**6) }}", "^a{1000}$"),
    ],
)
def test_what_a_template_raises_is_told(template: str, reason: str, process: TemplateProcess) -> None:
    with pytest.raises(TemplateError, match=reason) as caught:
        render(process, template)
    assert not isinstance(caught.value, TemplateLimitError)


def test_the_process_ends_with_the_one_it_serves(process: TemplateProcess) -> None:
    other = TemplateProcess()
    render(other, "warm")
    assert other._child is not None
    pid = other._child.pid
    assert other._child.stdin is not None
    other._child.stdin.close()
    assert other._child.wait(timeout=30) == 0
    assert not os.path.exists(f"/proc/{pid}")


def test_a_template_that_hangs_is_told_once_and_not_asked_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Impatient(TemplateProcess):
        def render(self, *args: object, **options: object) -> str:  # type: ignore[override]
            asked.append(args)
            return super().render(*args, **options, limit_s=0.5)  # type: ignore[arg-type]

    monkeypatch.setattr(chat, "TEMPLATES", Impatient())
    hanging = copy.deepcopy(tokenizer)
    hanging.chat_template = FOR_EVER
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": TALK[:1]}) + "\n" for _ in range(100)))
    with pytest.raises(DataErrors) as caught:
        load_prompts(PromptData(prompts=str(path)), hanging, 100)
    [error] = caught.value.errors
    assert str(error) == (
        f"{path}:1: the chat template of {hanging.name_or_path!r} can't be used: it does not come to an end within "
        "0.5 s ('prompt' of this row; others were not tried): correct the template, which stands in the model's folder"
    )
    assert len(asked) == 1
