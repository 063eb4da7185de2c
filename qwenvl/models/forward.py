"""One call of the vision tower per micro-batch on every rank, and hidden states of the trained positions only.

Stock transformers calls the tower once for the images and once for the videos of a batch, and not at all for text.
Ranks that hold different media then run different collectives, which crashes or hangs ZeRO-3 and FSDP. Here the tower
runs exactly once for every micro-batch: over all images and videos together, or over one blank image whose features
are cut to zero rows but stay in the graph, so that a text-only batch gives each parameter of the tower a zero gradient.

Nothing in transformers is replaced. A model passes keyword arguments that it does not know on to its language model;
hooks there take ours out of the call before the stock code sees them:

    model(input_ids, position_ids, vision_inputs=VisionInputs(...), kept_positions=positions, targets=ids)
      language model <- before: inputs_embeds with the visual features in place (+ the family's deepstack arguments)
                     -> after:  hidden states [B, T, H] cut to the kept rows [1, n, H]
      lm_head        -> the loss of the kept rows in place of logits (qwenvl.models.loss.fused_lm_head)

A task with a module of its own passes ``readout_inputs`` in place of the last two: the module
(:mod:`qwenvl.models.task_module`) runs after the language model, and ``lm_head`` returns the module's output.

Training of the layer for multi-token prediction adds ``mtp_inputs`` (:mod:`qwenvl.tasks.multi_token`): the layer
(:mod:`qwenvl.models.mtp.layer`) runs after the language model, and ``lm_head`` returns its loss besides the model's.

Calls without these arguments, such as ``generate``, are not changed. Nothing is read back from the device: lengths,
sizes and counts that the host needs come with the batch.
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
from qwenvl.models.mtp.layer import MultiTokenPrediction, full_attention, mtp_of
from qwenvl.models.parts import decoder_layers, language_model, layout_of, output_head, vision_tower
from qwenvl.models.task_module import Readout, attach
from qwenvl.models.vision.grid_inputs import PatchProjection, grid_describer, place_grids, shown_grids
from qwenvl.models.vision.inputs import VisionInputs
from qwenvl.models.vision.patchify import MediumShape, Patchify


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """Output of the vision tower, in the order of the tokens.

    Args:
        embeddings: [visual tokens, hidden size of the language model].
        deepstack: Tensors of the same shape, one for each early language layer that gets features of a middle vision
            block; empty in families without deepstack.
    """

    embeddings: Tensor
    deepstack: tuple[Tensor, ...] = ()


def encode(visual: PreTrainedModel, patchify: Patchify, inputs: VisionInputs) -> VisionFeatures:
    """Run the vision tower once.

    Without media it runs on a blank image of one merged token, and no row of the result is kept.

    Args:
        visual: Vision tower of a stock model.
        patchify: Module that cuts frames into the tower's patches.
        inputs: Media of the micro-batch.

    Returns:
        Features, with a graph if gradients are enabled and a parameter of the tower is trainable.

    Raises:
        ValueError: Tokens, shapes and pixels do not match.
    """
    _check_counts(visual, patchify, inputs)
    device = inputs.rows.device
    if inputs.pixels is None:
        patches = _blank_image(visual.config, device)
    else:
        patches = patchify.to(device)(inputs.pixels, inputs.media)
    described = inputs.grids
    if described is None:
        described = grid_describer(visual).describe(shown_grids(inputs.media, visual.config.spatial_merge_size))
    with _graph_if_trained(visual):
        output = visual(patches.to(visual.dtype), **place_grids(described, device), return_dict=True)
    features = _read_output(output)
    if inputs.pixels is None:
        return VisionFeatures(features.embeddings[:0], tuple(layer[:0] for layer in features.deepstack))
    return features


def _read_output(output: Any) -> VisionFeatures:
    """Adapt the tower's output: an object in every supported transformers, with deepstack in some families."""
    return VisionFeatures(output.pooler_output, tuple(getattr(output, "deepstack_features", None) or ()))


def _check_counts(visual: Any, patchify: Patchify, inputs: VisionInputs) -> None:
    """Raise if tokens, features and pixels do not match, before the device fails on an index."""
    values = 0 if inputs.pixels is None else inputs.pixels.numel()
    expected = patchify.count_values(inputs.media)
    if values != expected:
        raise ValueError(f"The batch's media have {expected} values, but pixels holds {values}.")
    features = _count_features(visual.config, patchify, inputs.media)
    if len(inputs.rows) != features:
        raise ValueError(
            f"The batch holds {len(inputs.rows)} image and video tokens, but its media give {features} features. "
            "Tokens were cut or added after the media's sizes were fixed."
        )


def _count_features(config: Any, patchify: Patchify, media: Sequence[MediumShape]) -> int:
    """Return the rows of the tower's output: one per merged patch, or the connector's fixed number per frame."""
    fixed = getattr(config, "tokens_per_frame", None)
    if fixed is not None:
        return int(fixed) * sum(shape[1] for shape in media)
    return patchify.count_patches(media) // int(config.spatial_merge_size) ** 2


def _blank_image(config: Any, device: torch.device) -> Tensor:
    """Return the patches (zeros) of the smallest image the tower accepts: one merged token."""
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    return torch.zeros(config.spatial_merge_size**2, width, device=device)


def _graph_if_trained(visual: nn.Module) -> AbstractContextManager[None]:
    """Build no graph for a frozen tower; the caller's own ``no_grad`` stays in force."""
    trains = any(parameter.requires_grad for parameter in visual.parameters())
    return torch.set_grad_enabled(torch.is_grad_enabled() and trains)


def place(inputs_embeds: Tensor, rows: Tensor, features: VisionFeatures) -> dict[str, Any]:
    """Put visual features at the positions of their tokens.

    By row numbers rather than by a mask: the backward pass of ``masked_scatter`` waits until the device has counted the
    mask, and needs 24 bytes of indices per element.

    Args:
        inputs_embeds: [B, T, H] token embeddings.
        rows: int64 [visual tokens], index of each in the flattened rows [B x T]; as many as rows of features.
        features: Result of :func:`encode`.

    Returns:
        The language model's arguments that change: ``inputs_embeds``, and ``visual_pos_masks`` (indices of the rows)
        with ``deepstack_visual_embeds`` ([B, T, H] each) where the family has deepstack.
    """
    changed: dict[str, Any] = {"inputs_embeds": _with_rows(inputs_embeds, rows, features.embeddings)}
    if features.deepstack:
        changed |= _deepstack(inputs_embeds, rows, features.deepstack)
    return changed


def _with_rows(states: Tensor, rows: Tensor, features: Tensor) -> Tensor:
    """Return states [B, T, H] with some of their flattened rows replaced by features [n, H].

    ``index_put`` also keeps features of zero rows in the graph, so that text-only batches give zero gradients. Its
    result is no view: compiled layers would need another graph for one.
    """
    places = (rows // states.shape[1], rows % states.shape[1])
    return states.index_put(places, features.to(states.device, states.dtype))


def _deepstack(inputs_embeds: Tensor, rows: Tensor, features: Sequence[Tensor]) -> dict[str, Any]:
    """Return the language model's deepstack arguments, spread over all tokens with zeros at the others.

    The stock code computes ``hidden_states[visual_pos_masks] + embeds``. Indexing by a mask waits for the device to
    count its elements, twice per layer. Indexing by all row numbers, with features spread over whole rows, does not
    wait and gives the same sum.
    """
    nothing = inputs_embeds.new_zeros(inputs_embeds.shape)
    spread = [_with_rows(nothing, rows, part) for part in features]
    sequences = torch.arange(len(inputs_embeds), device=inputs_embeds.device)
    return {"visual_pos_masks": sequences, "deepstack_visual_embeds": spread}


def _separate_linear_attention(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Replace the linear attention layers; yield owner, name and stock layer of each."""
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

    A class rather than closures, so that a deep copy or a pickle of the model refers to its own tower.
    """

    tower: PreTrainedModel
    head: LossHead
    patchify: Patchify
    readout: Readout | None = None
    mtp: MultiTokenPrediction | None = None
    # set at the start of every call, so that nothing is left over from a call that failed
    kept_positions: Tensor | None = field(default=None, init=False)
    readout_inputs: Mapping[str, Any] | None = field(default=None, init=False)
    mtp_inputs: Mapping[str, Tensor] | None = field(default=None, init=False)
    layer_options: dict[str, Any] = field(default_factory=dict, init=False)

    def before(
        self, language_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take our arguments out of the call and put the visual features in."""
        kwargs = dict(kwargs)
        self.kept_positions = kwargs.pop("kept_positions", None)
        self.head.targets = kwargs.pop("targets", None)
        self.head.target_weights = kwargs.pop("target_weights", None)
        self.head.row_losses = kwargs.pop("row_losses", None)
        self.head.passed = None
        self.head.mtp_inputs = self.mtp_inputs = kwargs.pop("mtp_inputs", None)
        self.readout_inputs = kwargs.pop("readout_inputs", None)
        if self.readout_inputs is not None:
            assert self.readout is not None, "a batch of a task, for a model without its module"
            kwargs |= self.readout.start(self.readout_inputs)
        inputs: VisionInputs | None = kwargs.pop("vision_inputs", None)
        if inputs is not None:
            kwargs |= place(kwargs["inputs_embeds"], inputs.rows, encode(self.tower, self.patchify, inputs))
        if kwargs.get("cu_seq_lens_q") is not None and _has_linear_attention(language_model):
            kwargs.setdefault("seq_idx", sample_index(kwargs["cu_seq_lens_q"], kwargs["inputs_embeds"].shape[1]))
        return args, kwargs

    def note_options(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note how the language model calls a layer with full attention: rotary positions, mask, sample borders."""
        if self.mtp_inputs is not None:
            self.layer_options = kwargs

    def after(self, language_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Keep the hidden states of the kept positions, those of all sequences in one row [1, n, H].

        Those of the MTP layer follow them in the same row.
        """
        kept, self.kept_positions = self.kept_positions, None
        inputs, self.readout_inputs = self.readout_inputs, None
        if inputs is not None:
            assert self.readout is not None
            self.head.passed = self.readout(output, inputs)
            output.last_hidden_state = output.last_hidden_state[:, :0]
        elif kept is not None:
            rows = _rows(output.last_hidden_state, kept)
            if self.mtp_inputs is not None:
                self.head.model_trains = rows.requires_grad
                rows = torch.cat([rows, self._draft(kwargs["inputs_embeds"], output.last_hidden_state)])
            output.last_hidden_state = rows.unsqueeze(0)
        return output

    def _draft(self, inputs_embeds: Tensor, hidden_states: Tensor) -> Tensor:
        """Return the kept rows [m, H] of the MTP layer.

        The last position of a sample gets the first embedding of the next one. No other position attends to it, and it
        is never kept.
        """
        inputs, self.mtp_inputs = self.mtp_inputs, None
        options, self.layer_options = self.layer_options, {}
        assert self.mtp is not None and inputs is not None, "a batch for the MTP layer, for a model without it"
        return _rows(self.mtp(inputs_embeds.roll(-1, dims=1), hidden_states, **options), inputs["positions"])


def _rows(states: Tensor, positions: Tensor) -> Tensor:
    """Return [n, H], the rows of [B, T, H] at indices [n] into the B x T rows."""
    return states.flatten(0, 1).index_select(0, positions.to(states.device))


@dataclass(frozen=True)
class Installed:
    """Changes that :func:`install` made to a model, which can be undone together.

    Args:
        handles: Handles of the hooks.
        layers: (owner, name, stock layer) of each layer that was replaced.
    """

    handles: tuple[RemovableHandle, ...]
    layers: tuple[tuple[nn.Module, str, nn.Module], ...]

    def remove(self) -> None:
        """Remove the hooks and put the stock layers back; calling it twice is harmless."""
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
    """Make a stock model accept ``vision_inputs``, ``kept_positions``, ``targets`` and further arguments.

    Install once, before the model is wrapped (DDP, DeepSpeed, PEFT). Saved files and ``generate`` are not affected:
    the replacement layers hold the same parameters under the same names.

    Args:
        model: Stock ``...ForConditionalGeneration`` of a supported family.
        patchify: Module that cuts frames into the same patches as the checkpoint's processor.
        summed_loss: Loss function of the vocabulary projection.
        readout: Module of a task, which becomes a part of the model.

    Returns:
        A handle that undoes the changes, except that a readout stays part of the model.
    """
    layout, text = layout_of(model), language_model(model)
    head = LossHead(output_head(model), summed_loss)
    stock = [_replace(model, layout.head, head)]
    if layout.patches is not None:
        stock.append(_replace(model, layout.patches, PatchProjection(model.get_submodule(layout.patches))))
    if missing_kernels():
        stock += _separate_linear_attention(model)
    hooks = _Hooks(vision_tower(model), head, patchify, readout, mtp_of(model))
    if readout is not None:
        attach(model, readout)
    handles = (
        text.register_forward_pre_hook(hooks.before, with_kwargs=True),
        text.register_forward_hook(hooks.after, with_kwargs=True),
        *(() if readout is None else readout.watch(text)),
        *_watch_layer(text, hooks),
    )
    return Installed(handles, tuple(stock))


def _watch_layer(language_model: Any, hooks: _Hooks) -> Iterator[RemovableHandle]:
    """Note the options of a layer for the MTP layer, which is of the same kind; nothing for a model without it."""
    if hooks.mtp is not None:
        layer = language_model.layers[full_attention(language_model)]
        yield layer.register_forward_pre_hook(hooks.note_options, with_kwargs=True)


def _replace(model: nn.Module, path: str, layer: nn.Module) -> tuple[nn.Module, str, nn.Module]:
    """Replace a layer; return the owner, the name and the former layer."""
    above, _, name = path.rpartition(".")
    owner, before = model.get_submodule(above), model.get_submodule(path)
    setattr(owner, name, layer)
    return owner, name, before
