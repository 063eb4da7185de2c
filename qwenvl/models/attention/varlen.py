"""Attention of packed samples, or of the images of a tower, in one call by torch's own varlen kernel.

    rows     [1, heads, T, D]   samples one after another
    borders  int32 [n + 1]      start of each sample, and T: ``cu_seq_lens_q`` of the batch, ``cu_seqlens`` of the tower
    kernel   one launch a layer; the loop of :mod:`qwenvl.models.attention.packed` makes one for each sample

torch has the kernel (``torch.nn.attention.varlen``, flash attention inside), so that no package is needed. It runs on
CUDA in bfloat16 and float16. transformers takes an implementation with "flash" in its name for one that gets all images
of a vision tower in one call, with their borders, and makes no mask for it.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qwenvl.utils.errors import UserError

NAME = "flash_varlen"
"""Name of the attention in transformers' registry."""

_OPTIONS = {"scale", "window_size"}


class VarlenKernel(Protocol):
    """Signature of ``torch.nn.attention.varlen.varlen_attn``, as far as it is used."""

    def __call__(  # noqa: PLR0913
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:
        """Attend within each sample.

        Args:
            query: [T, heads, D].
            key: [T, key heads, D].
            value: [T, key heads, D].
            cu_seq_q: int32 [n + 1], start of each sample's queries, and T.
            cu_seq_k: int32 [n + 1], start of each sample's keys, and T.
            max_q: Queries of the longest sample.
            max_k: Keys of the longest sample.
            scale: Factor of the products of queries and keys; None for 1 / sqrt(D).
            window_size: Number of tokens that a token sees before and after itself, -1 for all.
            enable_gqa: Whether several heads share a key head.

        Returns:
            [T, heads, D].
        """


def torch_kernel() -> VarlenKernel | None:
    """Return torch's kernel; None if the installed torch has none with the options that are needed."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return adapt_kernel(varlen_attn)


def adapt_kernel(kernel: Any) -> VarlenKernel | None:
    """Return torch's kernel with the options of :class:`VarlenKernel`; None if it lacks one.

    torch 2.11 has no ``enable_gqa``, and lets heads share a key head without it; later ones want to be told.
    """
    named = inspect.signature(kernel).parameters.keys()
    if not named >= _OPTIONS:
        return None
    if "enable_gqa" in named:
        found: VarlenKernel = kernel
        return found

    def grouped_unasked(*tensors: Any, enable_gqa: bool, **options: Any) -> Any:
        del enable_gqa
        return kernel(*tensors, **options)

    return grouped_unasked


def varlen_obstacle(*, half_precision: bool = True) -> str:
    """Return why torch's kernel cannot run here; empty if it can.

    Args:
        half_precision: Whether the model computes in bfloat16 or float16.
    """
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "nobody has tried it with ROCm"
    if not half_precision:
        return "it cannot compute in float32; --bf16 True lets it run"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU's compute capability is {major}.{minor}"
    if not torch.backends.cuda.is_flash_attention_available() or torch_kernel() is None:
        return f"torch {torch.__version__} has no varlen_attn with {', '.join(sorted(_OPTIONS))}"
    return ""


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: VarlenKernel,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each sample of a flattened row; an attention function of transformers.

    Args:
        module: Attention layer; ``is_causal`` tells language model and tower apart.
        query: [B, heads, T, D].
        key: [B, key heads, T, D]; heads are a multiple of key heads.
        value: [B, key heads, T, D].
        attention_mask: Ignored.
        kernel: Kernel, such as torch's.
        kwargs: Options of attention functions: ``cu_seq_lens_q`` int32 [n + 1] and ``max_length_q``, the borders and
            the longest sample of the rows laid end to end; without them, each row is a sample, padded on the right.
            ``scaling``, ``sliding_window``, ``is_causal``, ``dropout``; others are ignored.

    Returns:
        ([B, T, heads, D], None).

    Raises:
        UserError: The layer needs dropout of attention weights, or a feature that is not computed here.
    """
    del attention_mask
    unknown = [name for name in ("dropout", "s_aux", "softcap") if kwargs.get(name)]
    if unknown:
        raise UserError(
            f"{type(module).__name__} needs {', '.join(unknown)}, which the varlen kernel of torch does not compute. "
            "Train with --attn_implementation sdpa."
        )
    borders, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    rows, length = query.shape[0], query.shape[2]
    if borders is None or longest is None:
        borders = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=query.device)
        longest = length
    # norms of queries and keys return float32 under autocast with float32 weights
    queries, keys, values = (tensor.to(value.dtype).transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    attended = kernel(
        queries,
        keys,
        values,
        borders,
        borders,
        longest,
        longest,
        scale=kwargs.get("scaling"),
        window_size=_window(module, kwargs),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.unflatten(0, (rows, length)), None


def _window(module: nn.Module, options: dict[str, Any]) -> tuple[int, int]:
    """Return how many tokens a token sees before and after itself, -1 for all."""
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        return (-1, -1)
    sliding_window = options.get("sliding_window")
    return (-1 if sliding_window is None else sliding_window - 1, 0)
