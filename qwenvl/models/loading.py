"""Load a checkpoint in the class that its config names, check every weight, and choose the attention."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from qwenvl.families import get_family, register_classes
from qwenvl.models.attention.linear_segments import import_obstacle
from qwenvl.models.attention.varlen import varlen_obstacle
from qwenvl.models.moe_checkpoint import experts_read_as_stored, save_experts_as_published, weight_files
from qwenvl.models.mtp import files as mtp_files
from qwenvl.models.mtp.layer import MTP, MultiTokenPrediction, is_mtp, mtp_of
from qwenvl.models.parts import language_model
from qwenvl.models.precision import read_dtype
from qwenvl.models.quantization import (
    dequantizing,
    finish_dequantizing,
    is_fp8,
    refuse_quantized,
    require_whole_blocks,
)
from qwenvl.models.task_module import add_unsaved, is_readout
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)

ATTENTION_PACKAGES = {
    "flash_attention_4": "flash_attn.cute",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_2": "flash_attn",
}
"""Flash attention implementations of transformers, newest first, and the module each needs."""

_BY_AUTO = ("flash_attention_3", "flash_attention_2", "varlen")
"""What ``auto`` takes, best first. Not version 4, which nobody has tried with heads of 72, as vision towers have."""

_ACCEPTED = {
    "flash_attention_4": is_flash_attn_4_available,
    "flash_attention_3": is_flash_attn_3_available,
    "flash_attention_2": is_flash_attn_2_available,
}

_INSTALL = {
    "flash_attention_4": "pip install flash-attn-4 (a Hopper or Blackwell GPU, compute capability 9.0 or higher)",
    "flash_attention_3": "pip install flash-attn-3 (a Hopper GPU, compute capability 9.0)",
    "flash_attention_2": "pip install flash-attn --no-build-isolation (a GPU of compute capability 8.0 or higher)",
}

_LISTED_KEYS = 8


def load_model(
    model_name_or_path: str,
    *,
    dtype: torch.dtype,
    attn_implementation: str,
    config: PreTrainedConfig | None = None,
    quantization: Any = None,
    on_meta: bool = False,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint in the class that its ``config.json`` names, whatever its folder's name. FP8 is dequantized.

    Args:
        model_name_or_path: Folder, or repository on the Hugging Face hub.
        dtype: Data type of the weights in memory.
        attn_implementation: Attention implementation of transformers, from :func:`choose_attention`.
        config: Config of this checkpoint to build the model from; None for its ``config.json`` unchanged.
        quantization: Quantization of frozen weights, from :func:`~qwenvl.models.quantization.quantization`, or None.
        on_meta: Whether to leave the weights on the meta device; shapes are the config's if the folder has no weights.
        cache_dir: Folder of downloads.
        trust_remote_code: Whether to run Python code that comes with the checkpoint.

    Returns:
        The model, in evaluation mode, with its config as saved.

    Raises:
        UserError: No checkpoint, an unknown model type, quantized weights, weights that are not safetensors, or
            weights that are missing, unexpected or of another shape.
    """
    origin = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    own = read_trainable(model_name_or_path, cache_dir=cache_dir, adapted=True)
    if on_meta and has_no_weights(model_name_or_path):
        return _shapes_of(config or AutoConfig.from_pretrained(model_name_or_path), dtype, attn_implementation)
    if is_fp8(own):
        config = _dequantizing(model_name_or_path, config, own, origin)
    try:
        with experts_read_as_stored(model_name_or_path, get_family(own["model_type"]).model_type, **origin):
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                model_name_or_path,
                config=config,
                quantization_config=quantization,
                device_map={"": "meta"} if on_meta else None,
                dtype=dtype,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # all of them are reported together below
                output_loading_info=True,
                **origin,
            )
    except (OSError, SafetensorError) as error:
        raise UserError(_explain_missing_weights(model_name_or_path, error)) from error
    model: PreTrainedModel = loaded[0]
    _refuse_incomplete(model_name_or_path, loaded[1])
    _set_saved_form(model, get_family(own["model_type"]).model_type)
    if is_fp8(own):
        _finish_fp8(model_name_or_path, model, dtype)
    if not on_meta and not is_deepspeed_zero3_enabled():
        keep_float32(model, model_name_or_path, origin)
    return model


def load_shapes(
    model_name_or_path: str, *, config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str, **origin: Any
) -> PreTrainedModel:
    """Return the model of a rank that reads no weights, which another one sends when the model is sharded.

    Parameters have addresses, by which accelerate tells them apart, and no content: as nothing is written to them, they
    take no memory. Buffers have their values. Arguments are those of :func:`load_model`.
    """
    with init_empty_weights():  # of parameters alone
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    buffers = dict(model.named_buffers())
    model.to_empty(device="cpu")
    for name, value in buffers.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, value)
    model.tie_weights()
    keep_float32(model, model_name_or_path, origin)
    return model.eval()


def has_no_weights(path: str) -> bool:
    """Return whether a path is a folder without any file of weights or index of such files."""
    folder, kinds = Path(path), ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json")
    return folder.is_dir() and not any(True for kind in kinds for _ in folder.glob(kind))


def _shapes_of(config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    return model.eval()


def add_mtp(model: Any, model_name_or_path: str, dtype: torch.dtype, **origin: Any) -> None:
    """Add the checkpoint's layer for multi-token prediction to a model, to be trained.

    Args:
        model: Stock model loaded from the checkpoint, on the meta device or not; its attention is set.
        model_name_or_path: Folder or repository of the checkpoint.
        dtype: Data type of the layer's weights.
        origin: Keyword arguments of ``from_pretrained`` for downloads.

    Raises:
        UserError: The checkpoint has no such layer, or one of another form.
    """
    with torch.device(next(model.parameters()).device):
        layer = MultiTokenPrediction(language_model(model)).to(dtype)
    if not has_no_weights(model_name_or_path):  # else a dry run, from shapes
        mtp_files.load(layer, weight_files(model_name_or_path, origin), model_name_or_path)
    add_unsaved(model, MTP, layer)


def keep_float32(model: PreTrainedModel, path: str, origin: Mapping[str, Any]) -> None:
    """Restore the tensors that a half-precision checkpoint stores in float32.

    Qwen3.5 stores ``A_log`` and the norms of linear attention in float32, and servers compute with them in float32;
    ``from_pretrained`` rounds them to the type of the other weights. DeepSpeed gives all parameters one type anyway.

    Args:
        model: Stock model loaded from the checkpoint; changed in place.
        path: Folder or repository of the checkpoint.
        origin: Keyword arguments of ``from_pretrained`` for downloads.
    """
    if model.dtype == torch.float32 or read_dtype(path, **origin) == torch.float32:
        return
    parameters = dict(model.named_parameters())
    for file in weight_files(path, dict(origin)):
        with safe_open(file, "pt") as tensors:
            for name in parameters.keys() & set(tensors.keys()):
                if tensors.get_slice(name).get_dtype() == "F32":
                    parameters[name].data = tensors.get_tensor(name).to(parameters[name].device)


def _dequantizing(
    path: str, config: PreTrainedConfig | None, own: Mapping[str, Any], origin: dict[str, Any]
) -> PreTrainedConfig:
    """Return the config with which the weights of an FP8 checkpoint load dequantized.

    Raises:
        UserError: Transformers would dequantize some of them wrongly.
    """
    block = own["quantization_config"]["weight_block_size"]
    require_whole_blocks(weight_files(path, origin), block, f"--model_name_or_path {path}")
    return dequantizing(config or AutoConfig.from_pretrained(path, **origin), own)


def _finish_fp8(path: str, model: PreTrainedModel, dtype: torch.dtype) -> None:
    finish_dequantizing(model, dtype)
    size = model.num_parameters() * dtype.itemsize / 2**30
    logger.info("%s: FP8 weights, dequantized: %.1f GiB as %s.", path, size, str(dtype).removeprefix("torch."))


def _set_saved_form(model: PreTrainedModel, model_type: str) -> None:
    """Make ``save_pretrained`` give weights the names of their files, and experts the published layout.

    transformers records on the model how names and layouts were converted on loading, and reverts that on saving.
    Under ZeRO-3 it records every conversion it knows, used or not, and would save names that no checkpoint has.
    """
    conversions = getattr(model, "_weight_conversions", None) or ()
    model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]
    save_experts_as_published(model, model_type)


def load_weights(model: PreTrainedModel, folder: str) -> None:
    """Load the weights of a checkpoint into the model it was saved from.

    Uses :func:`load_model`, because names and layouts of some weights differ between files and memory.

    Args:
        model: Model to change in place, except for the module of a task; not sharded (DeepSpeed and FSDP load their own
            files).
        folder: Checkpoint with the same config.

    Raises:
        UserError: Weights are missing, unexpected or of another shape.
    """
    saved = load_model(folder, dtype=model.dtype, attn_implementation="sdpa")
    try:
        unknown = model.load_state_dict(saved.state_dict(), strict=False)
        missing = [name for name in unknown.missing_keys if not (is_readout(name) or is_mtp(name))]
        if missing or unknown.unexpected_keys:
            raise RuntimeError(f"missing {missing}, unexpected {unknown.unexpected_keys}")
    except RuntimeError as error:
        raise UserError(f"{folder} was saved from another model than the one in training: {error}") from error
    mtp = mtp_of(model)
    if mtp is not None:
        mtp_files.load(mtp, weight_files(folder, {}), folder)


def read_model_type(model_name_or_path: str, cache_dir: str | None = None) -> str:
    """Return ``model_type`` of the checkpoint's ``config.json``.

    Raises:
        UserError: The folder or its ``config.json`` is missing, or the file has no model type.
    """
    return str(_read_config(model_name_or_path, cache_dir)["model_type"])


def read_trainable(model_name_or_path: str, cache_dir: str | None = None, *, adapted: bool) -> dict[str, Any]:
    """Return the ``config.json`` of a checkpoint that is trained or merged into.

    Args:
        model_name_or_path: Folder, or repository on the Hugging Face hub.
        cache_dir: Folder of downloads.
        adapted: Whether adapters are trained or merged, rather than its own weights.

    Raises:
        UserError: As in :func:`read_model_type`, or its weights are quantized in a way that does not allow this.
    """
    config = _read_config(model_name_or_path, cache_dir)
    refuse_quantized(config, f"--model_name_or_path {model_name_or_path}", adapted=adapted)
    return config


def _read_config(model_name_or_path: str, cache_dir: str | None) -> dict[str, Any]:
    """Return the checkpoint's ``config.json``, after a check that it has a model type."""
    folder = Path(model_name_or_path)
    looks_local = folder.is_absolute() or model_name_or_path.startswith((".", "~")) or folder.exists()
    if looks_local and not folder.is_dir():
        raise UserError(f"--model_name_or_path {model_name_or_path}: there is no such folder.")
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"--model_name_or_path {model_name_or_path}: the folder holds adapters. Merge them first: python "
            f"tools/merge_lora.py --adapter {model_name_or_path} --output DIR (--base names their checkpoint, where it "
            "has moved); or resume their run by its own command."
        )
    if looks_local and not (folder / "config.json").is_file():
        raise UserError(
            f"--model_name_or_path {model_name_or_path}: the folder has no config.json, so it is no checkpoint. "
            "Point at the folder that holds config.json and model.safetensors."
        )
    try:
        config, _ = PreTrainedConfig.get_config_dict(model_name_or_path, cache_dir=cache_dir)
    except OSError as error:
        if looks_local:
            raise UserError(f"--model_name_or_path {model_name_or_path}: {_first_line(error)}") from error
        raise UserError(
            f"--model_name_or_path {model_name_or_path}: there is no such folder, and no checkpoint of that name could "
            f"be had from the Hugging Face hub ({_first_line(error)})."
        ) from error
    if "model_type" not in config:
        raise UserError(f"--model_name_or_path {model_name_or_path}: its config.json has no model_type.")
    register_classes(str(config["model_type"]))
    return dict(config)


def _explain_missing_weights(path: str, error: Exception) -> str:
    """Return a message that says whether a folder has weights of the wrong kind, or none."""
    pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in Path(path).glob(kind))
    if pickled:
        return (
            f"--model_name_or_path {path}: its weights are pickle files ({', '.join(pickled[:3])}), which can run code "
            "when opened and are not loaded. Save the checkpoint as safetensors and use that."
        )
    reason = _first_line(error).rstrip(".")
    return f"--model_name_or_path {path}: its weights could not be loaded: {reason}. Download the checkpoint anew."


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _refuse_incomplete(path: str, report: Mapping[str, Any]) -> None:
    """Raise if weights do not match the model exactly; transformers would leave random values and go on."""
    mismatched = [
        f"{name} (file {tuple(found)}, model {tuple(want)})" for name, found, want in report["mismatched_keys"]
    ]
    problems = {
        "missing in the files": sorted(report["missing_keys"]),
        "unexpected in the files": sorted(report["unexpected_keys"]),
        "of another shape": sorted(mismatched),
        "other errors": [str(message) for message in report.get("error_msgs") or ()],
    }
    found = [f"  {len(names)} {what}: {_shorten(names)}" for what, names in problems.items() if names]
    if found:
        raise UserError(
            f"--model_name_or_path {path}: the weights are not those of the model that config.json describes.\n"
            + "\n".join(found)
            + "\nUse a complete checkpoint whose config.json belongs to its weights; nothing is filled in at random."
        )


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED_KEYS} more" if len(names) > _LISTED_KEYS else ""
    return ", ".join(names[:_LISTED_KEYS]) + more


def choose_attention(requested: str = "auto", *, half_precision: bool = True) -> str:
    """Choose the attention implementation.

    Args:
        requested: Name of an implementation, or ``auto``: flash attention 3, else 2, if it is installed and the GPU can
            run it, else torch's varlen kernel, else SDPA.
        half_precision: Whether the model computes in bfloat16 or float16, the only types that flash attention supports.

    Returns:
        The implementation's name in transformers, or ``varlen`` for :mod:`qwenvl.models.attention.varlen`.

    Raises:
        UserError: Flash attention or ``varlen`` is requested by name and cannot run here.
    """
    if requested == "varlen" and (obstacle := varlen_obstacle(half_precision=half_precision)):
        raise UserError(
            f"--attn_implementation varlen: {obstacle}. Leave it at auto, which takes SDPA where varlen cannot run."
        )
    if requested in ATTENTION_PACKAGES:
        obstacle = _flash_obstacle(requested, half_precision)
        if obstacle:
            raise UserError(
                f"--attn_implementation {requested}: {obstacle}. It needs {_INSTALL[requested]}; "
                "or leave it at auto, which takes SDPA where flash attention cannot run."
            )
    elif requested not in ("auto", "sdpa", "eager", "varlen"):
        names = ", ".join(["auto", "sdpa", "eager", "varlen", *ATTENTION_PACKAGES])
        raise UserError(f"--attn_implementation {requested!r} is not one of {names}.")
    if requested != "auto":
        return requested
    obstacles = flash_obstacles(half_precision=half_precision)
    obstacles["varlen"] = varlen_obstacle(half_precision=half_precision)
    return next((name for name in _BY_AUTO if not obstacles[name]), "sdpa")


def flash_obstacles(*, half_precision: bool = True) -> dict[str, str]:
    """Return why each kind of flash attention, newest first, cannot run here; empty for one that can.

    Args:
        half_precision: Whether the model computes in bfloat16 or float16.
    """
    return {name: _flash_obstacle(name, half_precision) for name in ATTENTION_PACKAGES}


def _flash_obstacle(name: str, half_precision: bool) -> str:
    """Return why a flash attention implementation cannot run here; empty if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not half_precision:
        return "it cannot compute in float32; --bf16 True lets it run"
    major, minor = torch.cuda.get_device_capability()
    if not _has_kernels(name, major):
        return f"the GPU's compute capability is {major}.{minor}"
    return import_obstacle(ATTENTION_PACKAGES[name]) or _refusal(name)


def _refusal(name: str) -> str:
    """Return why transformers would not use an importable package; empty if it would.

    Versions 2 and 4 share the module ``flash_attn``: a machine with only version 4 can import version 2's name.
    """
    if _ACCEPTED[name]():
        return ""
    return f"transformers does not take the installed {ATTENTION_PACKAGES[name]} for {name.replace('_', ' ')}"


def _has_kernels(name: str, major: int) -> bool:
    """Whether a flash attention implementation supports GPUs of a compute capability.

    Version 3 uses Hopper's instructions and has no kernels for later GPUs.
    """
    return {"flash_attention_4": major >= 9, "flash_attention_3": major == 9}.get(name, major >= 8)
