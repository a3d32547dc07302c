"""Tensors that leave their device, on CPU with copies made as on a GPU."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from rlhf_ray.engines.host_copies import HostCopies


def test_a_tensor_comes_back_as_it_left_and_its_place_is_freed() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    before, host = StorageWeakRef(parameter.untyped_storage()), HostCopies(apart=True)
    host.leave([parameter])
    assert before.expired()
    away = StorageWeakRef(parameter.untyped_storage())
    host.come([parameter])
    assert parameter.tolist() == [[0, 1, 2], [3, 4, 5]]
    host.leave([parameter])
    assert StorageWeakRef(parameter.untyped_storage()) == away, "its buffer is kept"


def test_what_changed_on_the_device_is_copied_and_what_did_not_is_not() -> None:
    changed, frozen, host = torch.zeros(3), torch.zeros(3), HostCopies(apart=True)
    for tensor, unchanged in ((changed, False), (frozen, True)):
        host.leave([tensor], unchanged=unchanged)
        host.come([tensor])
        tensor.fill_(7)
        host.leave([tensor], unchanged=unchanged)
        host.come([tensor])
    assert changed.tolist() == [7, 7, 7]
    assert frozen.tolist() == [0, 0, 0]


def test_going_twice_or_coming_twice_changes_nothing() -> None:
    tensor, host = torch.ones(2), HostCopies(apart=True)
    host.come([tensor])
    host.leave([tensor])
    tensor.add_(1)  # as when a checkpoint is read into it there
    host.leave([tensor])
    host.come([tensor])
    place = tensor.data_ptr()
    host.come([tensor])
    assert tensor.data_ptr() == place
    assert tensor.tolist() == [2, 2]


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.ones(2)
    place, host = tensor.data_ptr(), HostCopies()
    host.leave([tensor])
    host.come([tensor])
    assert tensor.data_ptr() == place
