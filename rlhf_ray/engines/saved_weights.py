"""The weights in a checkpoint that a `TrainingEngine` wrote, read without an engine and with any number of ranks."""

import io
import logging
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_TAG = "state"


def saved_weights(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Whole tensors under their Hugging Face names, in `dtype` and host memory; tied ones under each of their names.

    ZeRO stages 0 to 2 save the whole model once. Stage 3 saves a shard of the float32 weights for each rank, which
    DeepSpeed puts together: it unpickles them, so a stage 3 checkpoint must come from somewhere trusted.

    Args:
        folder: what `TrainingEngine.save` was given.

    Raises:
        FileNotFoundError: no engine has written there.
        ValueError: shards are missing.
    """
    state = folder / _TAG
    if (whole := state / "mp_rank_00_model_states.pt").is_file():
        module = torch.load(whole, map_location="cpu", weights_only=True, mmap=True)["module"]
        weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in module.items()}
    else:
        weights = _from_shards(folder, dtype)
    # With optimizer state on a disk DeepSpeed saves parameters, elsewhere their data.
    return {name.removeprefix("model."): tensor.detach() for name, tensor in weights.items()}


def _from_shards(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint, to_torch_tensor

    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):  # it prints, and shows progress bars
        # Lazy, so that the whole model exists once, in `dtype`, while the shards stay on disk.
        shards = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=_TAG, lazy_mode=True)
        weights: dict[str, torch.Tensor] = to_torch_tensor(shards, dtype=dtype)
    logger.debug("DeepSpeed on %s: %s", folder, said.getvalue())
    return weights
