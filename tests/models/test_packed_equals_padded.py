from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_ray.models.heads import load_causal, load_scalar
from rlhf_ray.models.packed import PackedSequences

LENGTHS = [3, 17, 16, 1, 40, 18, 2]


def sequences(vocab: int = 512) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(3, vocab, length).astype(np.int32) for length in LENGTHS]


def padded(rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask `[sequences, longest]`, padded at the right."""
    ids, mask = torch.zeros(len(rows), max(LENGTHS), dtype=torch.int64), torch.zeros(len(rows), max(LENGTHS))
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_those_of_transformers_own_padded_forward(tiny_model_dir: Path, temperature: float) -> None:
    rows = sequences()
    ids, mask = padded(rows)
    model = load_causal(str(tiny_model_dir), dtype=torch.float32, vocab_chunk_tokens=16)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32, attn_implementation="eager")
    log_p = (theirs(ids, attention_mask=mask).logits.double() / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)

    packed = PackedSequences.of(rows, torch.device("cpu"))
    predicts = torch.ones(sum(LENGTHS), dtype=torch.bool)
    predicts[packed.cu_seqlens[1:].long() - 1] = False  # a sequence's last token predicts nothing
    positions = predicts.nonzero()[:, 0]
    mine, my_entropy = model(packed, positions, packed.input_ids[0][positions + 1], temperature)
    want = [
        log_p[row, : len(tokens) - 1].gather(-1, ids[row, 1 : len(tokens), None])[:, 0]
        for row, tokens in enumerate(rows)
    ]
    torch.testing.assert_close(mine, torch.cat(want).float(), rtol=1e-5, atol=1e-5)
    want_entropy = torch.cat([entropy[row, : len(tokens) - 1] for row, tokens in enumerate(rows)])
    torch.testing.assert_close(my_entropy, want_entropy.float(), rtol=1e-5, atol=1e-5)


def test_scores_equal_those_of_transformers_own_padded_forward(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = sequences()
    ids, mask = padded(rows)
    model = load_scalar(str(tiny_model_dir), dtype=torch.float32, seed=4)
    model.model.save_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    packed = PackedSequences.of(rows, torch.device("cpu"))
    values = model(packed, torch.arange(sum(LENGTHS)))
    ends = packed.cu_seqlens[1:].long() - 1
    # transformers scores the last token that is not padding, which here is 0.
    theirs.config.pad_token_id = 0
    torch.testing.assert_close(values[ends], theirs(ids, attention_mask=mask).logits[:, 0], rtol=1e-5, atol=1e-5)
    hidden = theirs.base_model(ids, attention_mask=mask).last_hidden_state
    want = torch.cat([theirs.score(hidden[row, : len(tokens)])[:, 0] for row, tokens in enumerate(rows)])
    torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_transformers_own_padded_forward(tiny_model_dir: Path) -> None:
    rows = sequences()
    ids, mask = padded(rows)
    model = load_causal(str(tiny_model_dir), dtype=torch.float32, vocab_chunk_tokens=16)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32, attn_implementation="eager")
    log_p = theirs(ids, attention_mask=mask).logits.log_softmax(-1)
    chosen = log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    (chosen * mask[:, 1:]).sum().backward()

    packed = PackedSequences.of(rows, torch.device("cpu"))
    predicts = torch.ones(sum(LENGTHS), dtype=torch.bool)
    predicts[packed.cu_seqlens[1:].long() - 1] = False
    positions = predicts.nonzero()[:, 0]
    model(packed, positions, packed.input_ids[0][positions + 1], 1.0)[0].sum().backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in model.model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-4)
