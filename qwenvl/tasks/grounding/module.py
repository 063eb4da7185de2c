"""The module that ``--task grounding`` trains: masks from a frozen model's attention.

    attention of a phrase's tokens to its image, of all layers and heads       (qwenvl.models.attention.probe)
      -> U-Net -> coarse mask                                                  (qwenvl.tasks.grounding.unet)
      -> SAM, prompted by the coarse mask, its box and the phrase -> fine mask (qwenvl.tasks.grounding.sam; optional)

As in F-LMM (Wu et al., "F-LMM: Grounding Frozen Large Multimodal Models", arXiv 2406.05821). The model itself is
frozen, so that its answers do not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig

from qwenvl.models.attention.probe import AttentionProbe, Look, Merge
from qwenvl.models.task_module import Readout
from qwenvl.tasks.grounding.sam import MaskRefiner
from qwenvl.tasks.grounding.unet import MaskUNet

Size = tuple[int, int]


@dataclass(frozen=True)
class GroundingSettings:
    """Hyperparameters of the grounding module.

    Args:
        resolution: Minimum cells of the longer side of a coarse mask; F-LMM: 64.
        refined_resolution: Minimum cells of the longer side of a mask from SAM.
        merge: Reduction over the attention maps of a phrase's tokens; F-LMM: mean.
        channels: Channels of the U-Net's first stage; F-LMM: 64.
        stages: Number of stages of the U-Net; F-LMM: 4.
        learning_rate: Learning rate of the module; None for the run's.
        seed: Seed of new weights.
    """

    resolution: int = 64
    refined_resolution: int = 256
    merge: Merge = "mean"
    channels: int = 64
    stages: int = 4
    learning_rate: float | None = None
    seed: int = 0


def mapped_layers(config: PretrainedConfig) -> list[int]:
    """Return the indices of the layers that have attention maps: the layers of full attention."""
    text: Any = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return [number for number, kind in enumerate(kinds) if kind == "full_attention"]


def count_maps(config: PretrainedConfig) -> int:
    """Return the number of attention maps of a model: the heads of its layers of full attention."""
    text: Any = config.get_text_config()
    return len(mapped_layers(config)) * int(text.num_attention_heads)


class GroundingReadout(Readout):
    """Predict masks from a model's attention.

    The ``inputs`` of a batch are: ``looks``, a :class:`~qwenvl.models.attention.probe.Look` for each phrase; ``sizes``,
    for each phrase the (height, width) of its coarse mask and, with SAM, of its fine mask; with SAM also ``images``,
    uint8 [height, width, 3] each, and ``image_of``, for each phrase the index of its image.

    Args:
        config: Config of the model.
        settings: Hyperparameters.
        refiner: Module with SAM; None for coarse masks only.
    """

    def __init__(self, config: PretrainedConfig, settings: GroundingSettings, refiner: MaskRefiner | None) -> None:
        super().__init__()
        self.settings = settings
        self.learning_rate = settings.learning_rate
        self.maps = count_maps(config)
        self.unet = MaskUNet(self.maps, settings.channels, settings.stages, settings.seed)
        self.refiner = refiner
        sam = None if refiner is None else refiner.record
        self.record = {"task": "grounding", "settings": asdict(settings), "maps": self.maps, "sam": sam}
        self._probe: AttentionProbe | None = None
        self._states: list[Tensor] = []

    @classmethod
    def from_record(cls, config: PretrainedConfig, record: Mapping[str, Any]) -> GroundingReadout:
        """Build the module that ``task.json`` describes; its weights are loaded afterwards."""
        text: Any = config.get_text_config()
        refiner = None
        if record["sam"] is not None:
            refiner = MaskRefiner.from_record(record["sam"], text.num_hidden_layers, text.hidden_size)
        return cls(config, GroundingSettings(**record["settings"]), refiner)

    def watch(self, language_model: nn.Module) -> Sequence[RemovableHandle]:
        """Hook the hidden states of all layers, for SAM's prompts."""
        if self.refiner is None:
            return ()
        model: Any = language_model
        watched = (*model.layers[:-1], model.norm)  # the states of transformers' output_hidden_states
        return [module.register_forward_hook(self._take) for module in watched]

    def start(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Prepare to collect the attention of the batch's phrases."""
        self._probe = AttentionProbe(inputs["looks"], self.settings.merge)
        self._states = []
        return {"attention_probe": self._probe}

    def forward(self, output: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return the logits of all masks, float32 [total cells]: all coarse masks, then all masks of SAM."""
        probe, self._probe = self._probe, None
        states, self._states = self._states, []
        assert probe is not None
        if not probe.looks:
            return self._nothing(output.last_hidden_state.device, states)
        coarse = self._coarse(probe.maps(), [sizes[0] for sizes in inputs["sizes"]])
        if self.refiner is None:
            return torch.cat([mask.flatten() for mask in coarse])
        return torch.cat([mask.flatten() for mask in (*coarse, *self._refined(coarse, states, probe.looks, inputs))])

    def _take(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the hidden states of the phrases' tokens after a layer."""
        del module, args
        if self._probe is not None:
            states = output[0] if isinstance(output, tuple) else output
            self._states.append(states[self._probe.places(states.device)].detach())

    def _coarse(self, maps: Sequence[Tensor], sizes: Sequence[Size]) -> list[Tensor]:
        """Return the coarse logits of every look, batched by shape."""
        shapes = [(one.shape, size) for one, size in zip(maps, sizes, strict=True)]
        found: dict[int, Tensor] = {}
        for shape in dict.fromkeys(shapes):
            members = [place for place, other in enumerate(shapes) if other == shape]
            stack = torch.stack([maps[place] for place in members]).to(self.unet.classify.weight.dtype)
            found |= zip(members, self.unet(stack, shape[1]).float(), strict=True)
        return [found[place] for place in range(len(maps))]

    def _refined(
        self, coarse: Sequence[Tensor], states: Sequence[Tensor], looks: Sequence[Look], inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        assert self.refiner is not None
        embeddings = [self.refiner.encode(image) for image in inputs["images"]]
        words = self.refiner.words(states).split([len(look.tokens) for look in looks])
        found = []
        for mask, word, sizes, place in zip(coarse, words, inputs["sizes"], inputs["image_of"], strict=True):
            shape = inputs["images"][place].shape
            found.append(self.refiner(embeddings[place], (shape[0], shape[1]), mask, word, sizes[1]))
        return found

    def _nothing(self, device: torch.device, states: Sequence[Tensor]) -> Tensor:
        """Return empty logits that are connected to all trainable parameters."""
        coarse = self.unet(torch.zeros(1, self.maps, 1, 1, device=device), (8, 8))[0].float()
        if self.refiner is None:
            return coarse.flatten()[:0]
        side = 8
        blank = self.refiner.encode(torch.zeros(side, side, 3, device=device, dtype=torch.uint8))
        word = self.refiner.words([state.new_zeros(1, state.shape[-1]) for state in states])
        fine = self.refiner(blank, (side, side), coarse, word, (side, side))
        return torch.cat([coarse.flatten(), fine.flatten()])[:0]
