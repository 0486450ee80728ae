"""Copies of nested objects with tensors, which later changes of the tensors do not reach.

The copy of a checkpoint is taken between two steps and written beside the next ones. Its memory is taken once and used
for every checkpoint of the run.
"""

import io
import pickle
from typing import Any

import torch

_ALIGNMENT = 64
"""Of the tensors in the memory, in bytes."""


class HostMemory:
    """Host memory for the tensors of one checkpoint at a time.

    Args:
        num_bytes: its size. Tensors that exceed it get memory of their own.
        pinned: page-lock it, so that a GPU copies at the rate of its bus.

    Raises:
        RuntimeError: there is too little memory, or it could not be page-locked.
    """

    def __init__(self, num_bytes: int, *, pinned: bool = False) -> None:
        # The zeros make the kernel provide the pages now, instead of during the first save.
        self._memory = torch.empty(num_bytes, dtype=torch.uint8).zero_()
        self._view = self._memory.numpy().data
        self._used = 0
        if pinned and num_bytes:
            # torch.empty(pin_memory=True) would take the next power of two.
            error = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), num_bytes, 0)
            if int(error) != 0:
                raise RuntimeError(f"cudaHostRegister returned error {int(error)} for {num_bytes} bytes")

    def reset(self) -> None:
        """Makes all of the memory available again; earlier copies become invalid."""
        self._used = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a contiguous copy of a tensor. A copy from a GPU is complete when the device is synchronised."""
        copied = self._take(tensor).copy_(tensor.detach(), non_blocking=True)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(copied, requires_grad=tensor.requires_grad)
        return copied.requires_grad_(tensor.requires_grad)

    def _take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns an uninitialised tensor of that shape and data type.

        It has a storage of its own, because `torch.save` writes whole storages.
        """
        num_bytes = tensor.numel() * tensor.element_size()
        if num_bytes == 0 or self._used + num_bytes > len(self._view):
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        taken = torch.frombuffer(self._view[self._used : self._used + num_bytes], dtype=tensor.dtype)
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return taken.view(tensor.shape)


class HostCopy:
    """A copy of an object that `torch.save` could write: any nesting, other values as pickle copies them.

    A tensor that occurs twice is copied once. Of a view only its own elements are copied.

    Args:
        content: the object.
        memory: for its tensors.
    """

    def __init__(self, content: Any, memory: HostMemory) -> None:
        file = io.BytesIO()
        pickler = _TensorPickler(file, memory)
        pickler.dump(content)
        self._pickled, self._tensors = file.getvalue(), pickler.tensors

    def restore(self) -> Any:
        """Returns the copied object. Its tensors are those of the copy."""
        return _TensorUnpickler(io.BytesIO(self._pickled), self._tensors).load()


class _TensorPickler(pickle.Pickler):
    """Copies tensors to `tensors` and pickles their index."""

    def __init__(self, file: io.BytesIO, memory: HostMemory) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._memory, self._seen = memory, dict[Any, int]()
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        # An empty tensor has no address; ZeRO-3's partitioned parameters are empty.
        address = value.data_ptr() or id(value)
        key = (address, value.device, value.dtype, value.shape, value.stride(), value.requires_grad, type(value))
        if key not in self._seen:
            self._seen[key] = len(self.tensors)
            self.tensors.append(self._memory.copy(value))
        return self._seen[key]


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, index: int) -> torch.Tensor:  # type: ignore[override]
        return self._tensors[index]
