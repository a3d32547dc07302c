"""What the tests of models share."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class TensorRecorder(TorchDispatchMode):
    """Records how many elements the largest tensor has that any operation makes, forward and backward.

    Attributes:
        largest: elements.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return made


@pytest.fixture
def recorder() -> TensorRecorder:
    """A context that records the largest tensor."""
    return TensorRecorder()
