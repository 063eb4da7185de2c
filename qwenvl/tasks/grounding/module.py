"""Masks from a frozen model's attention: the module that ``--task grounding`` trains.

    attention of a phrase's tokens over its picture, of all layers and heads   (qwenvl.models.attention.probe)
      -> a U-Net -> a coarse mask                                              (qwenvl.tasks.grounding.unet)
      -> SAM, prompted by it, its box and the phrase -> a finer mask           (qwenvl.tasks.grounding.sam; optional)

As in F-LMM (Wu et al., "F-LMM: Grounding Frozen Large Multimodal Models", arXiv 2406.05821). The model itself gets no
gradient: it answers as before.
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
    """How masks are found.

    Args:
        resolution: cells that the longer side of a coarse mask has at least; F-LMM: 64.
        refined_resolution: the same of a mask from SAM.
        merge: what becomes of the maps of a phrase's tokens; F-LMM: mean.
        channels: of the U-Net's first stage; F-LMM: 64.
        stages: of the U-Net; F-LMM: 4.
        learning_rate: of all that trains; None for the run's.
        seed: of new weights.
    """

    resolution: int = 64
    refined_resolution: int = 256
    merge: Merge = "mean"
    channels: int = 64
    stages: int = 4
    learning_rate: float | None = None
    seed: int = 0


def mapped_layers(config: PretrainedConfig) -> list[int]:
    """Return the numbers of the layers of a model that have maps, from 0: those of full attention."""
    text: Any = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return [number for number, kind in enumerate(kinds) if kind == "full_attention"]


def count_maps(config: PretrainedConfig) -> int:
    """Return the maps that a model of this config has: heads of its layers of full attention."""
    text: Any = config.get_text_config()
    return len(mapped_layers(config)) * int(text.num_attention_heads)


class GroundingReadout(Readout):
    """Reads masks off a model's attention.

    ``inputs`` of a batch: ``looks``, a :class:`~qwenvl.models.attention.probe.Look` for each phrase; ``sizes``, of each
    the (height, width) of its coarse mask, and of its finer one where there is SAM; for SAM, ``pictures``, uint8
    [height, width, 3] each, and ``picture_of``, which of them each phrase names a part of.

    Args:
        config: of the model.
        settings: see there.
        refiner: SAM; None for coarse masks alone.
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
        """Build one as ``task.json`` says, whose weights are loaded afterwards."""
        text: Any = config.get_text_config()
        refiner = None
        if record["sam"] is not None:
            refiner = MaskRefiner.from_record(record["sam"], text.num_hidden_layers, text.hidden_size)
        return cls(config, GroundingSettings(**record["settings"]), refiner)

    def watch(self, language_model: nn.Module) -> Sequence[RemovableHandle]:
        """Watch the layers' hidden states, for SAM's prompts."""
        if self.refiner is None:
            return ()
        model: Any = language_model
        watched = (*model.layers[:-1], model.norm)  # as transformers' output_hidden_states has them
        return [module.register_forward_hook(self._take) for module in watched]

    def start(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Have the attention of the batch's phrases collected."""
        self._probe = AttentionProbe(inputs["looks"], self.settings.merge)
        self._states = []
        return {"attention_probe": self._probe}

    def forward(self, output: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return the logits of all masks: the coarse ones of all phrases, then SAM's; float32 [cells of all]."""
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
        """Return logits of every look, those of one shape computed together."""
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
        embeddings = [self.refiner.encode(picture) for picture in inputs["pictures"]]
        words = self.refiner.words(states).split([len(look.tokens) for look in looks])
        found = []
        for mask, word, sizes, place in zip(coarse, words, inputs["sizes"], inputs["picture_of"], strict=True):
            shape = inputs["pictures"][place].shape
            found.append(self.refiner(embeddings[place], (shape[0], shape[1]), mask, word, sizes[1]))
        return found

    def _nothing(self, device: torch.device, states: Sequence[Tensor]) -> Tensor:
        """Return no logits, connected to all that trains."""
        coarse = self.unet(torch.zeros(1, self.maps, 1, 1, device=device), (8, 8))[0].float()
        if self.refiner is None:
            return coarse.flatten()[:0]
        side = 8
        blank = self.refiner.encode(torch.zeros(side, side, 3, device=device, dtype=torch.uint8))
        word = self.refiner.words([state.new_zeros(1, state.shape[-1]) for state in states])
        fine = self.refiner(blank, (side, side), coarse, word, (side, side))
        return torch.cat([coarse.flatten(), fine.flatten()])[:0]
