"""transformers models as the roles use them: packed in, numbers at chosen positions out."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.models.sequence_parallel import SequenceParallel
from rlhf_ray.models.stored_weights import StoredWeights
from rlhf_ray.models.token_logprobs import Beside, TokenLogProbs


class RoleModel(nn.Module):
    """A model as a role uses it.

    Attributes:
        model: the transformers model.
        stored: what its parameters that are on the meta device are to be read from, None when there are none.
        sequence_parallel: the ranks that share every pack, None for a rank on its own. They all get the same result.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.stored: StoredWeights | None = None
        self.sequence_parallel: SequenceParallel | None = None

    def _states(self, packed: PackedSequences, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | slice]:
        """Final hidden states of those of the `positions` that this rank computes, `[own positions, hidden]`, and which
        of them these are: bool `[positions]`, or a slice of all."""
        together = self.sequence_parallel
        if together is None:
            return _hidden_states(self.model, packed)[positions], slice(None)
        packed = together.padded(packed)
        mine = together.own_slice(packed)
        part = replace(packed, input_ids=packed.input_ids[:, mine], position_ids=packed.position_ids[:, mine])
        own = (positions >= mine.start) & (positions < mine.stop)
        return _hidden_states(self.model, part, together)[positions[own] - mine.start], own

    def _joined(self, values: torch.Tensor, own: torch.Tensor | slice) -> torch.Tensor:
        """What all ranks measured, `[positions]`, from what this one did of its own."""
        together = self.sequence_parallel
        return values if together is None or isinstance(own, slice) else together.join(values, own)


class CausalModel(RoleModel):
    """A language model that gives log-probs of chosen tokens."""

    def __init__(self, model: PreTrainedModel, vocab_chunk_tokens: int, token_ids: int | None = None) -> None:
        super().__init__(model)
        self.token_logprobs = TokenLogProbs(model.get_output_embeddings(), vocab_chunk_tokens, token_ids)

    def forward(
        self,
        packed: PackedSequences,
        positions: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        beside: Beside = "entropy",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of `targets` `[positions]` as predicted at `positions` of the pack, and what `TokenLogProbs`
        measures beside them."""
        hidden, own = self._states(packed, positions)
        logprobs, second = self.token_logprobs(hidden, targets[own], temperature, beside)
        return self._joined(logprobs, own), second if beside == "nothing" else self._joined(second, own)


class ScalarModel(RoleModel):
    """A decoder with one number per token: the critic's value, or at the last token the reward model's score."""

    def forward(self, packed: PackedSequences, positions: torch.Tensor) -> torch.Tensor:
        """Float32 `[positions]`."""
        hidden, own = self._states(packed, positions)
        return self._joined(self.model.score(hidden)[:, 0].float(), own)


def _hidden_states(
    model: PreTrainedModel, packed: PackedSequences, together: SequenceParallel | None = None
) -> torch.Tensor:
    """Final hidden states `[tokens, hidden]`; with ranks `together`, ids and positions in `packed` are of a slice."""
    # Only where there are some: not every architecture hands on what it does not know.
    more: dict[str, Any] = {} if packed.prefixes is None else {"shared_prefixes": packed.prefixes}
    if together is not None:
        more["sequence_parallel"] = together
    out = model.base_model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        use_cache=False,
        cu_seq_lens_q=packed.cu_seqlens,
        cu_seq_lens_k=packed.cu_seqlens,
        max_length_q=packed.max_length,
        max_length_k=packed.max_length,
        **more,
    )
    hidden: torch.Tensor = out.last_hidden_state[0]
    return hidden
