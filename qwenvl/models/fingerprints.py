"""Compare weights without holding two models: a checksum of each tensor's bytes, and the scale of each adapter.

Equal bytes need no tolerance, whatever the size of the model and the type that it computes in.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwenvl.models.lora.adapters import has_adapters
from qwenvl.models.lora.experts import has_expert_adapters
from qwenvl.models.lora.files import saved_names
from qwenvl.models.token_rows import row_layers
from qwenvl.models.trainable.sharded_params import full_tensor_cpu, is_sharded
from qwenvl.utils.distributed import is_main_process

Fingerprints = dict[str, dict[str, int]]
"""Name of a tensor -> name of a data type -> checksum of the tensor in that type."""

_LISTED = 4


def checksum(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """Return the CRC-32 of a tensor's bytes, after conversion to ``dtype`` if one is given."""
    data: Any = tensor.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy()
    return zlib.crc32(data)


def fingerprints(model: nn.Module, opened_dtype: torch.dtype) -> Fingerprints:
    """Return the fingerprints of a model's parameters in their own types and in ``opened_dtype``.

    Args:
        model: Model that is not sharded.
        opened_dtype: Data type in which transformers opens the saved folder.
    """
    return {
        name: {_name_of(dtype): checksum(value, dtype) for dtype in (value.dtype, opened_dtype)}
        for name, value in model.named_parameters()
    }


def trained_fingerprints(
    model: Any, saved_dtypes: Callable[[str, torch.dtype], Iterable[torch.dtype]], opened_dtype: torch.dtype
) -> Fingerprints:
    """Return the fingerprints of a model in training, by the names of :func:`opened_tensors`; every rank calls it.

    Args:
        model: Unwrapped model; its parameters may be sharded.
        saved_dtypes: Function of a parameter's name and data type that returns those it may have in the files.
        opened_dtype: Data type in which the folder is opened, or the modules beside adapters by PEFT.

    Returns:
        On the main process, fingerprints of every parameter in the types of its file and, where those are wider, in
        ``opened_dtype``; an empty dictionary on other processes.
    """
    renamed = {id(value): name for name, value in saved_names(model).items()} if has_adapters(model) else {}
    replaced: dict[int, Any] = {id(layer.weight): layer.row_ids for _, layer in row_layers(model)}
    found: Fingerprints = {}
    for own_name, parameter in model.named_parameters():
        if is_main_process() or is_sharded(parameter):
            tensor = _without_rows(full_tensor_cpu(parameter), replaced.get(id(parameter), ()))
            if is_main_process():
                saved = parameter.requires_grad or not renamed
                dtypes = set(saved_dtypes(own_name, tensor.dtype)) if saved else {tensor.dtype}
                dtypes |= {opened_dtype} if opened_dtype.itemsize < min(dtype.itemsize for dtype in dtypes) else set()
                name = renamed.get(id(parameter), own_name)
                found[name] = {_name_of(dtype): checksum(tensor, dtype) for dtype in dtypes}
    return found


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def opened_tensors(model: Any) -> dict[str, Tensor]:
    """Return every tensor of an opened model: adapters under the names in their file, the base under its own names."""
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return dict(model.named_parameters(remove_duplicate=False))
    from peft import get_peft_model_state_dict

    base = model.get_base_model()
    frozen = {
        re.sub(r"\.(token_adapter\.base_layer|base_layer\.base_layer)\.", ".", name): value  # layers of PEFT's own
        for name, value in base.named_parameters(remove_duplicate=False)
    }
    for name, module in base.named_modules():
        if hasattr(module, "token_adapter"):
            ids = module.token_adapter.token_indices["default"]
            frozen[f"{name}.weight"] = _without_rows(frozen[f"{name}.weight"], ids)
    return frozen | get_peft_model_state_dict(model, save_embedding_layers=False)


def _without_rows(weight: Tensor, ids: Sequence[int]) -> Tensor:
    """Return a vocabulary's weight with zeros for added tokens, whose rows are saved in tensors of their own."""
    return weight.detach().index_fill(0, torch.tensor(ids, device=weight.device), 0) if ids else weight


def differing(expected: Mapping[str, Mapping[str, int]], found: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the expected tensors that are missing or differ.

    A tensor opened in a wider type than it was saved in is converted back, which restores its bytes.
    """
    return [name for name, sums in expected.items() if name not in found or not _is_equal(sums, found[name])]


def _is_equal(sums: Mapping[str, int], tensor: Tensor) -> bool:
    own = _name_of(tensor.dtype)
    narrower = [name for name in sums if getattr(torch, name).itemsize < tensor.dtype.itemsize]
    name = own if own in sums else next(iter(narrower), None)
    return name is not None and checksum(tensor, getattr(torch, name)) == sums[name]


def adapter_scales(model: nn.Module) -> dict[str, list[Any]]:
    """Return [scaling factor, whether it is DoRA] of each adapter, by the layer's name."""
    base = getattr(model, "get_base_model", lambda: model)()
    experts = {
        f"{name}{wrapper}": [module.lora_scale, False]
        for name, module in base.named_modules()
        for wrapper in (".base_layer", "")  # of the two projections, as PEFT names them
        if has_expert_adapters(module)
    }
    return experts | {
        name: [module.scaling["default"], "default" in module.lora_magnitude_vector]
        for name, module in base.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    }


def listed(names: Sequence[str]) -> str:
    """Return the first names, sorted, and the number of the others, for a message."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(sorted(names)[:_LISTED]) + more
