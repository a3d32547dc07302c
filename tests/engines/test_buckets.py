import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.distributed.weight_transfer.base import ParamMeta

from rlhf_ray.engines.weight_transfer.gloo import buckets_of

TENSORS = st.lists(
    st.tuples(
        st.sampled_from([torch.float32, torch.bfloat16]), st.lists(st.integers(1, 12), min_size=1, max_size=3)
    ).map(lambda drawn: ParamMeta("", drawn[0], tuple(drawn[1]))),
    max_size=30,
)


@settings(deadline=None)
@given(tensors=TENSORS, bucket_bytes=st.integers(1, 4000))
def test_every_tensor_has_one_place_in_order_and_none_overlap(tensors: list[ParamMeta], bucket_bytes: int) -> None:
    buckets = buckets_of(tensors, bucket_bytes)
    assert [slot.meta for _, slots in buckets for slot in slots] == tensors
    for size, slots in buckets:
        reached = 0
        for slot in slots:
            assert slot.start >= reached
            assert slot.start % 16 == 0, "a view as another dtype needs an aligned start"
            assert slot.size == math.prod(slot.meta.shape) * slot.meta.dtype.itemsize
            reached = slot.start + slot.size
        assert reached <= size


@settings(deadline=None)
@given(tensors=TENSORS, bucket_bytes=st.integers(1, 4000))
def test_a_bucket_is_above_its_bound_only_for_a_single_tensor(tensors: list[ParamMeta], bucket_bytes: int) -> None:
    for _, slots in buckets_of(tensors, bucket_bytes):
        assert len(slots) == 1 or slots[-1].start + slots[-1].size <= bucket_bytes


def test_both_sides_cut_alike_and_fill_buckets() -> None:
    tensors = [ParamMeta(name, torch.float32, (4,)) for name in "abcde"]  # 16 bytes each
    names = [[slot.meta.name for slot in slots] for _, slots in buckets_of(tensors, 32)]
    assert names == [["a", "b"], ["c", "d"], ["e"]]
    assert [size for size, _ in buckets_of(tensors, 32)] == [32, 32, 16]
    assert buckets_of([], 32) == []
