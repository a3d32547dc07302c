"""Tensors that leave their device for host memory and come back."""

from collections.abc import Iterable, MutableMapping

import torch
from torch.utils.weak import WeakIdKeyDictionary

from rlhf_ray.platform import platform, synchronize


class HostCopies:
    """Host memory for tensors that leave their device.

    Each tensor has one buffer, made when it first leaves and kept: page-locked memory takes as long to get as a copy
    over the bus, and a copy to memory that is not page-locked goes through a buffer of the driver's. A tensor stays the
    same object; where its numbers are changes.

    Args:
        apart: whether the device has memory of its own. By default as it is: on CPU nothing moves.
    """

    def __init__(self, *, apart: bool | None = None) -> None:
        self._device = platform().device
        self._apart = self._device.type != "cpu" if apart is None else apart
        self._buffers: MutableMapping[torch.Tensor, torch.Tensor] = WeakIdKeyDictionary()

    def leave(self, tensors: Iterable[torch.Tensor], *, unchanged: bool = False) -> None:
        """Have tensors go to host memory; those that are there stay.

        Args:
            unchanged: those that have been there before are what they were then, so nothing is copied again.
        """
        if not self._apart:
            return
        for tensor in tensors:
            buffer = self._buffers.get(tensor)
            if buffer is not None and buffer.data_ptr() == tensor.data_ptr():
                continue
            if buffer is None:
                pinned = self._device.type == "cuda"
                buffer = self._buffers[tensor] = torch.empty_like(tensor.data, device="cpu", pin_memory=pinned)
                buffer.copy_(tensor.data, non_blocking=True)
            elif not unchanged:
                buffer.copy_(tensor.data, non_blocking=True)
            tensor.data = buffer
        synchronize()

    def come(self, tensors: Iterable[torch.Tensor]) -> None:
        """Have tensors come back that have left; others stay where they are."""
        if not self._apart:
            return
        for tensor in tensors:
            buffer = self._buffers.get(tensor)
            if buffer is not None and buffer.data_ptr() == tensor.data_ptr():
                tensor.data = buffer.to(self._device, non_blocking=True, copy=True)
        synchronize()
