from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.engines.weight_transfer.gloo import _broadcasts

TENSORS = st.lists(
    st.tuples(st.sampled_from([torch.float32, torch.bfloat16]), st.lists(st.integers(1, 12), max_size=3)), max_size=20
)
Pair = tuple[dist.ProcessGroupGloo, dist.ProcessGroupGloo]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Two ranks in this process."""
    store, timeout = dist.HashStore(), timedelta(seconds=30)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda rank: dist.ProcessGroupGloo(store, rank, 2, timeout), range(2))
        yield first, second


@settings(deadline=None, max_examples=30)
@given(kinds=TENSORS, bucket_bytes=st.integers(1, 4000))
def test_every_tensor_arrives_in_order(pair: Pair, kinds: list, bucket_bytes: int) -> None:
    sent = [(str(n), torch.randn(shape).to(dtype)) for n, (dtype, shape) in enumerate(kinds)]
    empty = [(name, torch.zeros_like(tensor)) for name, tensor in sent]
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(lambda: list(_broadcasts(pair[0], sent, bucket_bytes)))
        arrived = list(_broadcasts(pair[1], empty, bucket_bytes))
        assert [name for name, _ in sending.result(30)] == [name for name, _ in sent]
    assert [name for name, _ in arrived] == [name for name, _ in sent]
    for (_, tensor), (_, original) in zip(arrived, sent, strict=True):
        assert torch.equal(tensor, original)


class _Recorder:
    """Stands where the group does and keeps account of what is under way."""

    def __init__(self) -> None:
        self.under_way: list[int] = []
        self.most: list[list[int]] = []

    def broadcast(self, tensors: list[torch.Tensor], options: object) -> "_Recorder":
        self.under_way.append(tensors[0].nbytes)
        self.most.append(list(self.under_way))
        return self

    def wait(self) -> None:
        self.under_way.pop(0)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 100), max_size=30), bucket_bytes=st.integers(1, 200))
def test_more_than_the_bound_is_under_way_only_for_a_single_tensor(sizes: list[int], bucket_bytes: int) -> None:
    group = _Recorder()
    for _ in _broadcasts(group, [("", torch.empty(size, dtype=torch.uint8)) for size in sizes], bucket_bytes):  # type: ignore[arg-type]
        pass
    assert group.under_way == []
    assert all(sum(held) <= bucket_bytes or len(held) == 1 for held in group.most)
