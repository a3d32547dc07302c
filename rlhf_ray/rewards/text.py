"""Samples as text, for rewards that read text. Training itself never goes back from text to tokens."""

from typing import Any, Protocol

from rlhf_ray.data.trajectory import TrajectoryBatch

# Prompt tokens decoded in front of a response. Some tokenizers drop the space that begins a text; behind the end of
# its prompt a response keeps it.
_CONTEXT_TOKENS = 4


class Decoder(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False, **options: Any) -> Any: ...


def decode_responses(batch: TrajectoryBatch, tokenizer: Decoder) -> tuple[list[str], list[str]]:
    """Texts of the prompts and of the responses, `[samples]` each, without special tokens and otherwise as sampled."""

    def text_of(token_ids: list[int]) -> str:
        # The clean-up would change what was sampled ("do n't", spaces before punctuation).
        return str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    prompts: list[str] = []
    responses: list[str] = []
    for sample in range(len(batch)):
        prompt, response = batch.prompt(sample).tolist(), batch.response(sample).tolist()
        prompts.append(text_of(prompt))
        context = prompt[-_CONTEXT_TOKENS:]
        before, after = text_of(context), text_of(context + response)
        # They differ when a character's bytes are split between prompt and response.
        responses.append(after[len(before) :] if after.startswith(before) else text_of(response))
    return prompts, responses
