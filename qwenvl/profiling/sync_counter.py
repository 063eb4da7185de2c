"""Count the places of a training step at which the host waits for the device; on a CPU too.

A GPU works through a queue. The host has to stay ahead of it: where the host reads a number, or copies from memory that
is not pinned, it waits until the queue is empty, and the GPU is idle until the host has filled it again. Such places do
not show on a CPU, but can be found there: tensors that would be on the device are followed by their storage, from the
parameters and inputs through every operator, and operators that would wait are counted:

    reads of a value             item, tolist, numpy, bool, an if over a tensor
    results sized by values      nonzero, masked_select, unique, an index by a mask; masked_scatter's backward pass
    copies that block            cpu(), to(device) without non_blocking, torch.tensor(..., device=...)

Collective operations are seen too: NCCL refuses tensors of the host, which gloo takes.

With tensors on CUDA these count without being followed. ``torch.cuda.set_sync_debug_mode`` knows more operators, but
neither copies from memory that is not pinned nor a machine without a GPU.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = "_local_scalar_dense is_nonzero equal"
_SIZED = (
    "nonzero masked_select masked_scatter_backward _unique _unique2 unique_dim unique_consecutive "
    "unique_dim_consecutive bincount argwhere"
)
_WAITING = frozenset(f"aten::{name}" for name in (*_READS.split(), *_SIZED.split()))
_INDEXED = frozenset(
    f"aten::{name}" for name in ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")
)
_COPIES = frozenset({"aten::_to_copy", "aten::copy_"})
_PYTHON_READS = frozenset({"tolist", "numpy", "__array__", "cpu"})
"""Methods that read memory without an operator when the tensor is on the CPU."""

_COLLECTIVE = ("c10d::", "_c10d_functional::")
_FROM_DATA = (torch.tensor, torch.as_tensor)
_SHOWN_CALLERS = 3


class SyncCounter:
    """Counts waits between ``with`` and its end; of one thread, and of the backward passes that it starts.

    Args:
        on_device: Tensors that are, or would be, on the device: parameters, buffers, inputs. Nested containers are
            searched.

    Attributes:
        waits: Number of waits by a description of what waits and where.
        collectives: Number of collective operations by their name.
        of_host: Number of those with a tensor of the host, by name and place.
    """

    def __init__(self, on_device: Any = ()) -> None:
        self.waits: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.of_host: Counter[str] = Counter()
        self._storages: dict[int, StorageWeakRef] = {}  # weak references keep an address from being used again
        self._modes = ExitStack()
        self.follow(on_device)

    def follow(self, tensors: Any) -> None:
        """Take the tensors in a value as being on the device."""
        leaves = tree_leaves(tensors if isinstance(tensors, (dict, list, tuple, Tensor)) else list(tensors))
        for tensor in _tensors(leaves):
            if not tensor.is_meta:
                reference = StorageWeakRef(tensor.untyped_storage())
                self._storages[reference.cdata] = reference

    def is_followed(self, tensor: Tensor) -> bool:
        """Whether a tensor is, or would be, on the device."""
        return tensor.is_cuda or (not tensor.is_meta and tensor.untyped_storage()._cdata in self._storages)

    def note(self, what: str) -> None:
        """Count a wait at the place that runs now."""
        self.waits[f"{what} at {_place()}"] += 1

    def note_collective(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Count a collective operation on tensors."""
        self.collectives[name] += 1
        if not all(self.is_followed(tensor) for tensor in tensors):
            self.of_host[f"{name} at {_place()}"] += 1

    def __enter__(self) -> SyncCounter:
        self._modes.enter_context(_Operators(self))
        self._modes.enter_context(_Calls(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._modes.close()


def _tensors(leaves: Iterable[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _place() -> str:
    """Return the innermost callers outside of torch and of this file, innermost first."""
    frames = [
        f"{_short(frame.filename)}:{frame.lineno}"
        for frame in traceback.extract_stack()
        if "/torch/" not in frame.filename and frame.filename != __file__
    ]
    return " < ".join(reversed(frames[-_SHOWN_CALLERS:]))


def _short(filename: str) -> str:
    return "/".join(filename.split("/")[-3:])


class _Operators(TorchDispatchMode):
    """Sees every operator, also those of the backward pass."""

    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator; count it if it waits, and follow its results."""
        kwargs = kwargs or {}
        given = _tensors(tree_leaves((args, kwargs)))
        followed = any(self._counter.is_followed(tensor) for tensor in given)
        result = func(*args, **kwargs)
        name = func._schema.name
        if name.startswith(_COLLECTIVE):
            self._counter.note_collective(name, given)
        if followed:
            self._counter.follow(tree_leaves(result))
        if (followed and _waits(name, args, kwargs)) or _blocks(name, given, tree_leaves(result), args, kwargs):
            self._counter.note(str(func))
        return result


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    """Whether an operator on tensors of the device waits."""
    if name in _INDEXED:
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))
    if name == "aten::repeat_interleave":  # by a tensor of repeats, whose sum is the size of the result
        return len(args) == 1 and kwargs.get("output_size") is None
    return name in _WAITING


def _blocks(name: str, given: list[Tensor], results: list[Any], args: Any, kwargs: Any) -> bool:
    """Whether an operator copies between host and CUDA, and waits for it."""
    if name not in _COPIES:
        return False
    kinds = {tensor.device.type for tensor in (*given, *_tensors(results))}
    non_blocking = kwargs.get("non_blocking", args[2] if name == "aten::copy_" and len(args) > 2 else False)
    pinned = all(tensor.is_pinned() for tensor in (*given, *_tensors(results)) if tensor.device.type == "cpu")
    return kinds == {"cpu", "cuda"} and not (non_blocking and pinned)


class _Calls(TorchFunctionMode):
    """Sees calls of Python that run no operator while tensors are on the CPU."""

    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a call; count it if it would read from the device, or copy to it and wait."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        followed = tensor is not None and self._counter.is_followed(tensor)
        if followed and name in _PYTHON_READS and not (tensor is not None and tensor.is_cuda):
            self._counter.note(f"Tensor.{name}")
        result = func(*args, **kwargs)
        if tensor is not None and name == "to" and not followed and _names_a_device(args[1:], kwargs):
            if result.device.type == "cpu" and not _non_blocking(args[1:], kwargs):
                self._counter.note("Tensor.to without non_blocking")
            # the copy that a device would hold, so that reads of the host's own tensor are not counted
            result = result.clone() if result is tensor else result
            self._counter.follow(result)
        elif tensor is None and kwargs.get("device") is not None and isinstance(result, Tensor):
            if result.device.type == "cpu" and func in _FROM_DATA:
                self._counter.note("torch.tensor on the device")
            self._counter.follow(result)  # others, such as zeros, are filled on the device
        return result


def _names_a_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(value, (torch.device, str, Tensor)) for value in (*args, *kwargs.values()))


def _non_blocking(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return the argument ``non_blocking`` of ``Tensor.to``, the first bool among those by place."""
    return bool(kwargs.get("non_blocking", next((value for value in args if isinstance(value, bool)), False)))
