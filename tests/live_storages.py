"""Bytes of tensors that are alive in this process, each storage counted once: what a rank holds, not what it has freed.

The resident set of a process shows less and more: caches of allocators, mapped files, libraries.
"""

import gc

import torch


def storages(tensors) -> int:
    """Bytes of the tensors' storages; views of one count once. Storage on the meta device has none."""
    found = {}
    for tensor in tensors:
        if tensor.layout == torch.strided and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def live_storages() -> int:
    """Bytes of all tensors that Python can reach."""
    # type() and not isinstance(): some libraries' lazy objects come to life when their __class__ is asked for.
    return storages(found for found in gc.get_objects() if issubclass(type(found), torch.Tensor))
