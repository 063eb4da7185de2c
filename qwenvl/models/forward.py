"""One call of the vision tower a micro-batch, on every rank, and hidden states of the trained positions only.

Stock transformers calls the tower once for the images and once for the videos of a batch, and not at all for text.
Ranks that hold different media then run different collectives, which crashes or hangs ZeRO-3 and FSDP. Here the tower
runs exactly once for every micro-batch: over all images and videos together, or over one blank picture whose features
are cut to no rows but stay in the graph, so that text alone gives every parameter of the tower a gradient of zero.

Nothing of transformers is replaced. Keyword arguments that a model does not know travel through its ``forward`` to its
language model; hooks there take ours out of the call before the stock code sees them:

    model(input_ids, position_ids, vision_inputs=VisionInputs(...), kept_positions=positions, targets=ids)
      language model <- before: inputs_embeds with the visual features in place (+ the family's deepstack arguments)
                     -> after:  hidden states [B, T, H] cut to the kept rows [1, n, H]
      lm_head        -> the loss of those rows in place of logits (qwenvl.models.loss.fused_lm_head)

or, for a task with a module of its own, ``readout_inputs`` in the place of the last two: the module
(:mod:`qwenvl.models.task_module`) runs after the language model, and ``lm_head`` returns what it found.

A call without them, such as ``generate``, is left as it is. No number is read from the device on the way: what the
host has to know, it is told (lengths, sizes, counts).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from qwenvl.models.attention.linear_segments import SegmentedLinearAttention, missing_kernels
from qwenvl.models.attention.segments import sample_index
from qwenvl.models.loss.fused_lm_head import LossHead, SummedLoss, linear_cross_entropy
from qwenvl.models.parts import decoder_layers, language_model, layout_of, output_head, vision_tower
from qwenvl.models.task_module import Readout, attach
from qwenvl.models.vision.grid_inputs import PatchProjection, describe_grids
from qwenvl.models.vision.inputs import VisionInputs
from qwenvl.models.vision.patchify import MediumShape, Patchify


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """What the tower returns, in the order of the tokens.

    Args:
        embeddings: [visual tokens, hidden size of the language model].
        deepstack: the same shape, one for each early language layer that gets features of a middle vision block;
            empty in families without deepstack.
    """

    embeddings: Tensor
    deepstack: tuple[Tensor, ...] = ()


def encode(visual: PreTrainedModel, patchify: Patchify, inputs: VisionInputs) -> VisionFeatures:
    """Run the vision tower once.

    Without media it runs on a blank picture of one merged token, and no row of the result is kept.

    Args:
        visual: the vision tower of a stock model.
        patchify: makes the patches it takes.
        inputs: the micro-batch's media.

    Returns:
        Features with a graph where a parameter of the tower trains and gradients are enabled, without one otherwise.

    Raises:
        ValueError: tokens, shapes and pixels do not belong together.
    """
    _check_counts(visual, patchify, inputs)
    device = inputs.mask.device
    if inputs.pixels is None:
        patches, grids = _blank_picture(visual.config, device)
    else:
        patches = patchify.to(device)(inputs.pixels.to(device), inputs.media)
        grids = [shape[1:] for shape in inputs.media]
    with _graph_if_trained(visual):
        output = visual(patches.to(visual.dtype), **describe_grids(visual, grids, device), return_dict=True)
    features = _read_output(output)
    if inputs.pixels is None:
        return VisionFeatures(features.embeddings[:0], tuple(layer[:0] for layer in features.deepstack))
    return features


def _read_output(output: Any) -> VisionFeatures:
    """Adapt the tower's output: an object in every supported transformers, with deepstack in some families."""
    return VisionFeatures(output.pooler_output, tuple(getattr(output, "deepstack_features", None) or ()))


def _check_counts(visual: Any, patchify: Patchify, inputs: VisionInputs) -> None:
    """Name tokens, features and pixels that do not match, before the device fails on an index."""
    values = 0 if inputs.pixels is None else inputs.pixels.numel()
    expected = patchify.count_values(inputs.media)
    if values != expected:
        raise ValueError(f"The batch's media have {expected} values, but pixels holds {values}.")
    features = _count_features(visual.config, patchify, inputs.media)
    if inputs.num_tokens != features:
        raise ValueError(
            f"The batch holds {inputs.num_tokens} image and video tokens, but its media give {features} features. "
            "Tokens were cut or added after the media's sizes were fixed."
        )


def _count_features(config: Any, patchify: Patchify, media: Sequence[MediumShape]) -> int:
    """Return how many rows the tower gives: one a merged patch, or as many for each frame as its connector makes."""
    fixed = getattr(config, "tokens_per_frame", None)
    if fixed is not None:
        return int(fixed) * sum(shape[1] for shape in media)
    return patchify.count_patches(media) // int(config.spatial_merge_size) ** 2


def _blank_picture(config: Any, device: torch.device) -> tuple[Tensor, list[MediumShape]]:
    """Patches (zeros) and grid of the smallest picture the tower takes: one merged token."""
    merge = config.spatial_merge_size
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    return torch.zeros(merge * merge, width, device=device), [(1, merge, merge)]


def _graph_if_trained(visual: nn.Module) -> AbstractContextManager[None]:
    """No graph for a tower in which nothing trains; the caller's own ``no_grad`` stays in force."""
    trains = any(parameter.requires_grad for parameter in visual.parameters())
    return torch.set_grad_enabled(torch.is_grad_enabled() and trains)


def place(inputs_embeds: Tensor, mask: Tensor, features: VisionFeatures) -> dict[str, Any]:
    """Put visual features where their tokens stand.

    Args:
        inputs_embeds: [B, T, H] token embeddings.
        mask: bool [B, T], True at each visual token; its count equals the features' rows.
        features: from :func:`encode`.

    Returns:
        The language model's arguments that change: ``inputs_embeds``, and ``visual_pos_masks`` (numbers of the rows)
        with ``deepstack_visual_embeds`` ([B, T, H] each) where the family has deepstack.
    """
    embeddings = features.embeddings.to(inputs_embeds.device, inputs_embeds.dtype)
    # masked_scatter also keeps features of no rows in the graph, which is what makes text alone give zero gradients
    changed: dict[str, Any] = {"inputs_embeds": inputs_embeds.masked_scatter(mask.unsqueeze(-1), embeddings)}
    if features.deepstack:
        changed |= _deepstack(inputs_embeds, mask, features.deepstack)
    return changed


def _deepstack(inputs_embeds: Tensor, mask: Tensor, features: Sequence[Tensor]) -> dict[str, Any]:
    """Return the language model's deepstack arguments, spread over all tokens with zeros between.

    The stock code adds ``hidden_states[visual_pos_masks] + embeds``. Indexed by a mask, it would wait for the device
    to count it, twice a layer; indexed by the numbers of the rows, with features as wide as the rows, it adds the same.
    """
    nothing = inputs_embeds.new_zeros(inputs_embeds.shape)
    spread = [nothing.masked_scatter(mask.unsqueeze(-1), part.to(nothing.device, nothing.dtype)) for part in features]
    rows = torch.arange(len(inputs_embeds), device=inputs_embeds.device)
    return {"visual_pos_masks": rows, "deepstack_visual_embeds": spread}


def _separate_linear_attention(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Exchange the linear attention layers; yield owner, name and stock layer of each."""
    name = layout_of(model).linear_attention
    for layer in decoder_layers(model):
        stock = getattr(layer, name, None)
        if stock is not None:
            setattr(layer, name, SegmentedLinearAttention(stock))
            yield layer, name, stock


def _has_linear_attention(language_model: Any) -> bool:
    return "linear_attention" in (getattr(language_model.config, "layer_types", None) or ())


@dataclass
class _Hooks:
    """The two hooks around one call of the language model.

    A class rather than closures: a deep copy or a pickle of the model then refers to its own tower.
    """

    tower: PreTrainedModel
    head: LossHead
    patchify: Patchify
    readout: Readout | None = None
    # set before each call and used after it, so that they never outlive a call, not even one that fails
    kept_positions: Tensor | None = field(default=None, init=False)
    readout_inputs: Mapping[str, Any] | None = field(default=None, init=False)

    def before(
        self, language_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take our arguments out of the call and put the visual features in."""
        kwargs = dict(kwargs)
        self.kept_positions = kwargs.pop("kept_positions", None)
        self.head.targets = kwargs.pop("targets", None)
        self.head.target_weights = kwargs.pop("target_weights", None)
        self.head.passed = None
        self.readout_inputs = kwargs.pop("readout_inputs", None)
        if self.readout_inputs is not None:
            assert self.readout is not None, "a batch of a task, for a model without its module"
            kwargs |= self.readout.start(self.readout_inputs)
        inputs: VisionInputs | None = kwargs.pop("vision_inputs", None)
        if inputs is not None:
            kwargs |= place(kwargs["inputs_embeds"], inputs.mask, encode(self.tower, self.patchify, inputs))
        if kwargs.get("cu_seq_lens_q") is not None and _has_linear_attention(language_model):
            kwargs.setdefault("seq_idx", sample_index(kwargs["cu_seq_lens_q"], kwargs["inputs_embeds"].shape[1]))
        return args, kwargs

    def after(self, language_model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Keep the rows of the kept positions, of all sequences in one row [1, n, H]."""
        kept, self.kept_positions = self.kept_positions, None
        inputs, self.readout_inputs = self.readout_inputs, None
        if inputs is not None:
            assert self.readout is not None
            self.head.passed = self.readout(output, inputs)
            output.last_hidden_state = output.last_hidden_state[:, :0]
        elif kept is not None:
            rows = output.last_hidden_state.flatten(0, 1)
            output.last_hidden_state = rows.index_select(0, kept.to(rows.device)).unsqueeze(0)
        return output


@dataclass(frozen=True)
class Installed:
    """What :func:`install` changed in a model, to be undone together.

    Args:
        handles: of the hooks.
        layers: owner, name and stock layer of each layer that was exchanged.
    """

    handles: tuple[RemovableHandle, ...]
    layers: tuple[tuple[nn.Module, str, nn.Module], ...]

    def remove(self) -> None:
        """Give the model back its own layers, without hooks; removing twice does nothing."""
        for handle in self.handles:
            handle.remove()
        for owner, name, layer in self.layers:
            setattr(owner, name, layer)


def install(
    model: PreTrainedModel,
    patchify: Patchify,
    summed_loss: SummedLoss = linear_cross_entropy,
    readout: Readout | None = None,
) -> Installed:
    """Teach a stock model the arguments ``vision_inputs``, ``kept_positions``, ``targets`` and others.

    Install once, before the model is wrapped (DDP, DeepSpeed, PEFT). Saved files and ``generate`` are not affected:
    the layers that are exchanged hold the same parameters under the same names.

    Args:
        model: a stock ``...ForConditionalGeneration`` of a family this trainer knows.
        patchify: makes patches as the checkpoint's processor does.
        summed_loss: of the vocabulary projection.
        readout: module of a task, which becomes a part of the model.

    Returns:
        A handle that undoes it; a readout stays where it is.
    """
    layout, text = layout_of(model), language_model(model)
    head = LossHead(output_head(model), summed_loss)
    stock = [_exchange(model, layout.head, head)]
    if layout.patches is not None:
        stock.append(_exchange(model, layout.patches, PatchProjection(model.get_submodule(layout.patches))))
    if missing_kernels():
        stock += _separate_linear_attention(model)
    hooks = _Hooks(vision_tower(model), head, patchify, readout)
    if readout is not None:
        attach(model, readout)
    handles = (
        text.register_forward_pre_hook(hooks.before, with_kwargs=True),
        text.register_forward_hook(hooks.after),
        *(() if readout is None else readout.watch(text)),
    )
    return Installed(handles, tuple(stock))


def _exchange(model: nn.Module, path: str, layer: nn.Module) -> tuple[nn.Module, str, nn.Module]:
    """Put a layer in the place of another; return the owner, the name and the layer that was there."""
    above, _, name = path.rpartition(".")
    owner, before = model.get_submodule(above), model.get_submodule(path)
    setattr(owner, name, layer)
    return owner, name, before
