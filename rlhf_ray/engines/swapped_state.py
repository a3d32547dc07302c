"""Checkpoints of an engine that keeps weights or optimizer state on a disk: the same files as any other engine's.

So a run may go on with another `offload_optimizer` than it began with, and `rlhf-ray export` reads them all. What
DeepSpeed 0.19 does by itself is less: it copies its swap files into the checkpoint, and a new process that reads them
back gets neither Adam's moments nor its step counter; with the weights on a disk, reading fails. None of this has a
public way around, so this file knows the insides of DeepSpeed's stage 3.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def swap_files_mapped(engine: Any) -> Iterator[None]:
    """Within it, `engine.save_checkpoint` writes optimizer state as if it were in memory; pages come from the files."""
    optimizer = engine.optimizer
    swapper = getattr(optimizer, "optimizer_swapper", None)  # of stage 3 alone, and None in it without nvme
    if swapper is None:
        yield
        return
    swapped = list(swapper.swap_params_info.values())
    for info in swapped:
        # The first step, which has not been yet, would make the others.
        for tensor in info.tensors:
            tensor.compute_tensor.data = torch.from_file(
                tensor.swap_path, shared=False, size=info.numel(), dtype=info.dtype()
            )
    optimizer.swap_optimizer = False  # or the files would be copied too
    try:
        yield
    finally:
        optimizer.swap_optimizer = True
        for info in swapped:
            info.release_memory()


def load_into_swap_files(engine: Any, folder: Path, tag: str) -> None:
    """`engine.load_checkpoint`, with optimizer state that goes to the disk a part at a time."""
    optimizer = engine.optimizer
    swaps = optimizer.swap_optimizer

    def restore(load_dir: str, tag: str, **_: Any) -> bool:
        # DeepSpeed's own pickle, as in its `load_checkpoint`: a checkpoint must come from somewhere trusted.
        saved = torch.load(engine._get_zero_ckpt_name(load_dir, tag), map_location="cpu", mmap=True, weights_only=False)
        optimizer.swap_optimizer = swaps
        _restore(optimizer, saved["optimizer_state_dict"])
        optimizer.swap_optimizer = False
        return True

    optimizer.swap_optimizer = False  # or it would look for copies of swap files, before and after
    engine._load_zero_checkpoint = restore
    try:
        engine.load_checkpoint(str(folder), tag=tag)
    finally:
        del engine._load_zero_checkpoint
        optimizer.swap_optimizer = swaps


@torch.no_grad()
def _restore(optimizer: Any, saved: dict[str, Any]) -> None:
    adam, base = optimizer.optimizer, saved["optimizer_state_dict"]
    for mine, theirs in zip(adam.param_groups, base["param_groups"], strict=True):
        mine.update({name: value for name, value in theirs.items() if name != "params"})
    for number, parameter in enumerate(optimizer.fp32_partitioned_groups_flat):
        on_disk = optimizer._swappable_optimizer_subgroup(number)
        if on_disk:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        parameter.data.copy_(saved["fp32_flat_groups"][number])
        state = adam.state[parameter]
        for name, value in base["state"].get(number, {}).items():
            if name in state and torch.is_tensor(value):
                state[name].copy_(value)
            else:
                state[name] = value.to(parameter.device, copy=True) if torch.is_tensor(value) else value
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if on_disk:
            optimizer._optimizer_states_and_gradient_swap_out(number)
