"""Build the model of a run: load it, freeze what does not train, add adapters, and prepare it for the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel, ProcessorMixin, set_seed

from qwenvl.config import ParsedArguments, TrainingArguments
from qwenvl.config.rules.engines import reads_on_one_rank
from qwenvl.data.encoding.processor import AddedTokens
from qwenvl.families import get_family
from qwenvl.models.attention.packed import attend_by_segments, refuse_unknown_switches
from qwenvl.models.attention.varlen import torch_kernel
from qwenvl.models.forward import install
from qwenvl.models.loading import add_mtp, choose_attention, load_model, load_shapes
from qwenvl.models.lora.adapters import AdapterSettings, add_adapters, trained_in_float32
from qwenvl.models.lora.files import describe_base
from qwenvl.models.lora.new_tokens import make_room, train_rows
from qwenvl.models.loss.fused_lm_head import linear_cross_entropy
from qwenvl.models.loss.liger import open_liger_loss
from qwenvl.models.parts import decoder_layers, vision_tower
from qwenvl.models.precision import resolve_dtype
from qwenvl.models.quantization import quantization
from qwenvl.models.task_module import Readout
from qwenvl.models.trainable.freezing import configure_checkpointing, freeze_unused, refuse_unused, set_model
from qwenvl.models.vision.patchify import Patchify
from qwenvl.tasks.objective import Objective
from qwenvl.utils.distributed import is_main_process


def open_model(
    parsed: ParsedArguments,
    processor: ProcessorMixin,
    config: PretrainedConfig,
    tokens: AddedTokens,
    *,
    objective: Objective | None = None,
    on_meta: bool = False,
) -> PreTrainedModel:
    """Load the checkpoint, freeze what is not trained, install the vision call and a task's module, and add adapters.

    On the meta device only shapes are read, and all weights have the compute type.

    Raises:
        UserError: The checkpoint is incomplete, its processor normalises in an unsupported way, or nothing trains.
    """
    arguments, args = parsed.model, parsed.training
    patchify = Patchify.from_processor(processor)
    set_seed(args.seed)
    if args.deepspeed and not on_meta:
        _start_deepspeed()
    dtype, _ = weight_types(parsed)
    half_precision = compute_type(parsed) != torch.float32
    objective = objective or Objective()
    attention = choose_attention(objective.attention or arguments.attn_implementation, half_precision=half_precision)
    by_segments = attention in ("sdpa", "varlen")
    if by_segments:
        refuse_unknown_switches(config, shows_maps=objective.attention is not None)
    layout = get_family(config.model_type).layout
    options: dict[str, Any] = {
        "config": config,
        "dtype": compute_type(parsed) if on_meta else dtype,
        "attn_implementation": "sdpa" if by_segments else attention,
        **origin_options(parsed),
    }
    if reads_on_one_rank(args) and not on_meta and not is_main_process():
        model = load_shapes(arguments.model_name_or_path, **options)
    else:
        quantized = None if on_meta else quantization(parsed.adapters.quantization_bit, layout)
        model = load_model(arguments.model_name_or_path, quantization=quantized, on_meta=on_meta, **options)
    if by_segments:
        kernel = torch_kernel() if attention == "varlen" else None
        attend_by_segments(model, kernel, stock_tower=not hasattr(vision_tower(model), "grid_describer"))
    if arguments.train_mtp:
        add_mtp(model, arguments.model_name_or_path, weight_types(parsed)[1], **origin_options(parsed))
    return prepare_model(model, parsed, patchify, tokens, objective)


def model_of_shapes(parsed: ParsedArguments, config: PretrainedConfig) -> PreTrainedModel:
    """Return the model of a config on the meta device, in the compute type: a checkpoint without its files."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(
            config, dtype=compute_type(parsed), attn_implementation="sdpa"
        )
    return model


def prepare_model(
    model: PreTrainedModel, parsed: ParsedArguments, patchify: Patchify, tokens: AddedTokens, objective: Objective
) -> PreTrainedModel:
    """Make a stock model ready for training, all but its attention; see :func:`open_model`.

    Raises:
        UserError: Nothing trains.
    """
    args = parsed.training
    readout = objective.build_readout(model.config)
    make_room(model, tokens.new, may_grow=not parsed.adapters.lora_enable)
    _choose_trained_parts(model, parsed, readout)
    install(model, patchify, open_liger_loss() if args.use_liger_kernel else linear_cross_entropy, readout)
    args.use_liger_kernel = False  # or the Trainer would replace parts of the model by Liger's own
    if parsed.adapters.lora_enable:
        _adapt(model, parsed, tokens.ids)
        refuse_unused(model)
    _checkpoint_trained_parts(model, args)
    _compile_layers(model, args)
    objective.begin(model)
    return model


def _choose_trained_parts(model: PreTrainedModel, parsed: ParsedArguments, readout: Readout | None) -> None:
    arguments = parsed.model
    set_model(
        model,
        tune_mm_vision=arguments.tune_mm_vision,
        tune_mm_mlp=arguments.tune_mm_mlp,
        tune_mm_llm=arguments.tune_mm_llm,
        adapted=parsed.adapters.lora_enable or arguments.train_mtp or readout is not None,
    )
    if readout is not None:
        readout.to(weight_types(parsed)[1])
        freeze_unused(model, readout)


def weight_types(parsed: ParsedArguments) -> tuple[torch.dtype, torch.dtype]:
    """Return the data types of frozen weights and of trainable weights."""
    args, model = parsed.training, parsed.model
    frozen = not (model.tune_mm_llm or model.tune_mm_mlp or model.tune_mm_vision)
    adapted = parsed.adapters.lora_enable or (frozen and (parsed.tasks.task is not None or model.train_mtp))
    masters = bool(args.deepspeed) or (adapted and not args.fsdp)
    dtype = resolve_dtype(parsed.model.model_dtype, bf16=args.bf16, fp16=args.fp16, masters=masters)
    return dtype, torch.float32 if adapted and not args.deepspeed else dtype


def compute_type(parsed: ParsedArguments) -> torch.dtype:
    """Return the data type of matrix products and activations."""
    args = parsed.training
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else weight_types(parsed)[0]


def _adapt(model: PreTrainedModel, parsed: ParsedArguments, token_ids: Sequence[int]) -> None:
    """Add adapters, and make the rows of added tokens trainable."""
    chosen = parsed.adapters
    settings = AdapterSettings(
        target=chosen.lora_target,
        r=chosen.lora_r,
        alpha=chosen.lora_alpha,
        dropout=chosen.lora_dropout,
        use_dora=chosen.use_dora,
        use_rslora=chosen.use_rslora,
        expert_r=chosen.lora_expert_r,
    )
    add_adapters(model, settings)
    if token_ids:
        train_rows(model, token_ids)
    describe_base(model, parsed.model.model_name_or_path)
    if weight_types(parsed)[1] == torch.float32 and not next(model.parameters()).is_meta:
        trained_in_float32(model)


def _compile_layers(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Compile each layer of the language model in place.

    Blocks of the tower are not compiled: they split tensors by image, and would be compiled again for each number of
    images. The Trainer would wrap the whole model, which changes the names of saved weights.
    """
    if args.torch_compile:
        for layer in decoder_layers(model):
            layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)
        args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None


def _checkpoint_trained_parts(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Set gradient checkpointing, and unset it in the arguments: the Trainer would checkpoint frozen parts too."""
    configure_checkpointing(model, args.checkpointed_parts)
    args.gradient_checkpointing = False
    if hasattr(args, "activation_checkpointing"):  # its newer name
        args.activation_checkpointing = False


def _start_deepspeed() -> None:
    """Start DeepSpeed's process group before the weights load, or it would assume a single rank."""
    import deepspeed

    deepspeed.init_distributed()


def origin_options(parsed: ParsedArguments) -> dict[str, Any]:
    """Return what every opening of the checkpoint takes."""
    return {"cache_dir": parsed.training.cache_dir, "trust_remote_code": parsed.model.trust_remote_code}
