"""What these functions raise: every error names the argument, what was found and what is expected.

Exceptions leave their actor pickled, for which the default calls `__init__` with the message alone: hence `__reduce__`.
"""


class AlgorithmInputError(ValueError):
    """Base of all errors raised by `rlhf_ray.algorithms`."""


class OptionError(AlgorithmInputError):
    """A number or a name that the formula does not allow."""

    def __init__(self, name: str, value: object, expected: str) -> None:
        self.name = name
        self.value = value
        self.expected = expected
        super().__init__(f"{name} is {value!r}, but must be {expected}")

    def __reduce__(self) -> tuple[type["OptionError"], tuple[str, object, str]]:
        return type(self), (self.name, self.value, self.expected)


class TensorInputError(AlgorithmInputError):
    """A tensor of the wrong shape or dtype; checked because broadcasting would hide it."""

    def __init__(self, name: str, found: str, expected: str) -> None:
        self.name = name
        self.found = found
        self.expected = expected
        super().__init__(f"tensor {name} has {found}, but needs {expected}")

    def __reduce__(self) -> tuple[type["TensorInputError"], tuple[str, str, str]]:
        return type(self), (self.name, self.found, self.expected)


class SampleError(AlgorithmInputError):
    """Some samples of a batch cannot be used; `samples` are their positions in the batch."""

    def __init__(self, samples: list[int], problem: str, cure: str) -> None:
        self.samples = samples
        self.problem = problem
        self.cure = cure
        named = ", ".join(map(str, samples[:8])) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
        super().__init__(f"samples at batch positions {named} {problem}; {cure}")

    def __reduce__(self) -> tuple[type["SampleError"], tuple[list[int], str, str]]:
        return type(self), (self.samples, self.problem, self.cure)
