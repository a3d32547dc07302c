"""A model's safetensors files, read a part of a tensor at a time."""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a file.

    Attributes:
        key: its name there.
        format: safetensors' name of its number format.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    format: str

    def whole(self) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(self.key)
            return tensor

    def shape_alone(self) -> torch.Tensor:
        return torch.empty(self.shape, device="meta")

    def elements(self, start: int, stop: int) -> torch.Tensor:
        if not self.shape:
            return self.whole().reshape(1)[start:stop]
        width = math.prod(self.shape[1:])
        first, last = start // width, -(-stop // width)
        with safe_open(self.file, framework="pt") as opened:
            rows: torch.Tensor = opened.get_slice(self.key)[first:last]
            return rows.reshape(-1)[start - first * width : stop - first * width]


@dataclass(frozen=True)
class _Converted:
    """A tensor that transformers makes of others, such as the experts of a layer, which it stacks.

    Attributes:
        converter: what makes it; copied for each use, because it keeps what it is given.
        first: name in the model of the first tensor that it makes.
        sources: with the pattern that each of them matched.
    """

    converter: WeightConverter
    first: str
    sources: list[tuple[_Tensor, str]]

    def make(self, name: str, model: PreTrainedModel, *, of_headers: bool = False) -> torch.Tensor:
        """The tensor; with `of_headers` a shape without numbers, for which no file is read."""
        converter = deepcopy(self.converter)
        for source, pattern in self.sources:
            converter.add_tensor(self.first, source.key, pattern, source.shape_alone if of_headers else source.whole)
        made: Any = converter.convert(self.first, model=model, config=model.config)[name]
        tensor: torch.Tensor = made[0] if isinstance(made, list) else made
        return tensor


class StoredWeights:
    """Where the tensors of a model are read from, by their names in the model.

    Args:
        source: folder or hub name. Files of a hub are downloaded if they are not there yet.
        model: what the files are for; its parameters may be on the meta device.
        headers_only: read no tensor. Of two that the config ties it is then not known whether they are the same.
        any_format: also take tensors in formats that can only be read whole, by transformers.

    Raises:
        OSError: the files can't be found or read.
        ValueError: the model can't be made of what they hold.
    """

    def __init__(
        self, source: str, model: PreTrainedModel, *, headers_only: bool = False, any_format: bool = False
    ) -> None:
        self._model = model
        self._compare = not headers_only
        self._tensors = _by_name(model, {tensor.key: tensor for tensor in _stored(source)})
        tied: dict[nn.Parameter, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tied.setdefault(parameter, []).append(name)
            stored = self._tensors.get(name)
            if isinstance(stored, _Tensor):
                _check_fits(name, stored, parameter, any_format)
            elif stored is not None:
                _check_comes_out(name, stored, parameter, model)
        for names in tied.values():
            self._tie(names)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def _tie(self, names: list[str]) -> None:
        """Have all names of a parameter stand for the one that is stored."""
        stored = [name for name in names if name in self._tensors]
        for other in stored[1:] if self._compare else ():
            if not _same(self._tensors[stored[0]], self._tensors[other]):
                raise ValueError(
                    f"{stored[0]} and {other} differ in its files, but its config ties them: set tie_word_embeddings: "
                    "false in its config.json"
                )
        if stored:
            self._tensors |= dict.fromkeys(names, self._tensors[stored[0]])

    def files(self, name: str) -> str:
        """Where a tensor is stored, for errors."""
        tensor = self._tensors[name]
        sources = [tensor] if isinstance(tensor, _Tensor) else [source for source, _ in tensor.sources]
        return ", ".join(sorted({str(source.file) for source in sources}))

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of a flattened tensor, `[stop - start]`, in the number format of the file.

        Only the rows that they are in are read; for a tensor that transformers makes of others, all of these.
        """
        tensor = self._tensors[name]
        if isinstance(tensor, _Tensor):
            return tensor.elements(start, stop)
        return tensor.make(name, self._model).reshape(-1)[start:stop]


def _stored(source: str) -> Iterator[_Tensor]:
    """All tensors of a folder or hub. A later file's tensor replaces one of the same name, as in transformers."""
    find = partial(cached_file, source, _raise_exceptions_for_missing_entries=False)
    if single := find(SAFE_WEIGHTS_NAME):
        files = [single]
    elif index := find(SAFE_WEIGHTS_INDEX_NAME):
        try:
            files, _ = get_checkpoint_shard_files(source, index)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of weights ({type(error).__name__}: {error})") from error
    elif pickled := find(WEIGHTS_NAME) or find(WEIGHTS_INDEX_NAME):
        raise ValueError(
            f"its weights are pickles ({Path(pickled).name}), which are not loaded: where you trust them, convert them "
            "with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    else:
        raise ValueError(f"it has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 `opened` is no mapping
                    tensor = opened.get_slice(key)
                    yield _Tensor(Path(file), key, tuple(tensor.get_shape()), tensor.get_dtype())
        except SafetensorError as error:
            raise OSError(f"{file} is no whole safetensors file: {error}") from error


def check_finite_files(source: str) -> None:
    """No tensor in the files of a folder or hub may hold NaN or infinity; all are read, one after the other.

    Raises:
        OSError: the files can't be found or read.
        ValueError: naming tensor and file.
    """
    for tensor in _stored(source):
        if not is_finite(tensor.whole()):
            raise ValueError(not_finite(tensor.key, str(tensor.file)))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; formats that can hold none do."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    ends = tensor.detach().aminmax()  # NaN goes into both: one pass, and no second tensor
    return bool(torch.isfinite(ends.min) and torch.isfinite(ends.max))


def not_finite(name: str, files: str) -> str:
    """What to say of a tensor that holds NaN or infinity."""
    return (
        f"{name} in {files} holds NaN or infinity: the copy is damaged or the run that wrote it had diverged; copy the "
        "folder again, or take an earlier checkpoint"
    )


def _check_fits(name: str, stored: _Tensor, parameter: nn.Parameter, any_format: bool) -> None:
    if stored.shape != tuple(parameter.shape):
        raise ValueError(f"{name} is {list(stored.shape)} in its files, but {list(parameter.shape)} by its config")
    if not any_format and stored.format not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(f"{name} is stored as {stored.format}, which zero_stage: 3 does not load")


def _check_comes_out(name: str, stored: _Converted, parameter: nn.Parameter, model: PreTrainedModel) -> None:
    """A tensor that is made of others, one of which may be missing."""
    made_of = f"{name} is made of {len(stored.sources)} tensors in its files, such as {stored.sources[0][0].key}"
    try:
        shape = list(stored.make(name, model, of_headers=True).shape)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{made_of}, which don't go together ({error})") from error
    if shape != list(parameter.shape):
        raise ValueError(f"{made_of}, and comes out as {shape}, but is {list(parameter.shape)} by its config")


def _same(one: "_Tensor | _Converted", other: "_Tensor | _Converted") -> bool:
    """Whether two tensors of one shape hold the same; some megabytes of them are looked at at a time."""
    if not (isinstance(one, _Tensor) and isinstance(other, _Tensor)):
        return one is other
    size, step = math.prod(one.shape), 2**22
    return all(
        torch.equal(one.elements(start, end), other.elements(start, end))
        for start in range(0, size, step)
        for end in (min(start + step, size),)
    )


def _by_name(model: PreTrainedModel, stored: dict[str, _Tensor]) -> dict[str, _Tensor | _Converted]:
    """What each tensor of the model is made of, by the rules that `from_pretrained` follows."""
    wanted = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    found: dict[str, _Tensor | _Converted] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            continue
        if pattern is None:
            found[name] = stored[key]
            continue
        converter = by_pattern[pattern]
        converted = found.setdefault(name, _Converted(converter, name, []))
        assert isinstance(converted, _Converted)
        converted.sources.append((stored[key], pattern))
        for target in converter.target_patterns[1:]:
            found[name.replace(converter.target_patterns[0], target)] = converted
    return found
