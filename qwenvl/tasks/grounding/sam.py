"""SAM, prompted by a coarse mask, its bounding box, and the words that refer to the object.

As in F-LMM (Wu et al., arXiv 2406.05821, section 3.4): the image encoder and prompt encoder of SAM (Kirillov et al.,
arXiv 2304.02643) are frozen, its mask decoder is trained. The words' hidden states of all layers are mixed with learned
softmax weights, and projected to additional prompts, one per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, SamConfig, SamImageProcessor, SamModel

from qwenvl.utils.errors import UserError

Size = tuple[int, int]


class WordPrompts(nn.Module):
    """Project hidden states of a phrase's tokens to prompts of SAM.

    This is a module of its own because ZeRO-3 gathers the weights of a module while its forward runs.

    Args:
        layers: Number of layers of the language model whose hidden states are mixed.
        hidden_size: Size of the hidden states.
        outputs: Size of SAM's prompts.
    """

    def __init__(self, layers: int, hidden_size: int, outputs: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.ones(layers))
        self.project = nn.Linear(hidden_size, outputs)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Return prompts [tokens, C] of hidden states by layer, [tokens, H] each."""
        mixed = torch.einsum("l,lth->th", self.mix.softmax(0), torch.stack(list(states)).to(self.mix.dtype))
        prompts: Tensor = self.project(mixed)
        return prompts


class MaskRefiner(nn.Module):
    """Refine coarse masks with SAM.

    Args:
        sam: Published SAM; everything but its mask decoder is frozen here.
        normalisation: ``image_mean`` and ``image_std`` of SAM's processor, for values from 0 to 1.
        layers: Number of layers of the language model whose hidden states are mixed.
        hidden_size: Size of the hidden states.
        seed: Seed of the new weights.
    """

    def __init__(
        self, sam: SamModel, normalisation: Mapping[str, Any], layers: int, hidden_size: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.sam = sam
        sam.requires_grad_(False)
        sam.mask_decoder.requires_grad_(True)
        # only one mask is predicted, so the scores that rank several masks are unused
        sam.mask_decoder.iou_prediction_head.requires_grad_(False)
        for unused in sam.mask_decoder.output_hypernetworks_mlps[1:]:
            unused.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.words = WordPrompts(layers, hidden_size, sam.config.prompt_encoder_config.hidden_size)
        self.normalisation = {name: list(normalisation[name]) for name in ("image_mean", "image_std")}
        self.record = {"config": sam.config.to_dict(), **self.normalisation}

    @classmethod
    def from_checkpoint(cls, path: str, layers: int, hidden_size: int, seed: int = 0) -> MaskRefiner:
        """Open a published SAM.

        Raises:
            UserError: the checkpoint cannot be opened as a SAM.
        """
        try:
            model_type = AutoConfig.from_pretrained(path).model_type
            if model_type != "sam":
                raise ValueError(f"it is a {model_type}")
            processor: Any = SamImageProcessor.from_pretrained(path)
            sam, report = SamModel.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            if report["missing_keys"]:
                raise ValueError(f"{len(report['missing_keys'])} of its weights are missing")
        except (OSError, ValueError) as error:
            raise UserError(
                f"--sam_model_name_or_path {path} holds no SAM that transformers opens: {error}. Give a folder or name "
                "such as facebook/sam-vit-base."
            ) from error
        return cls(sam, vars(processor), layers, hidden_size, seed)

    @classmethod
    def from_record(cls, record: Mapping[str, Any], layers: int, hidden_size: int) -> MaskRefiner:
        """Build a refiner of the same architecture; its weights are loaded afterwards."""
        return cls(SamModel(SamConfig.from_dict(dict(record["config"]))), record, layers, hidden_size)

    def train(self, mode: bool = True) -> MaskRefiner:
        """Set the training mode; the frozen parts stay in evaluation mode."""
        super().train(mode)
        self.sam.vision_encoder.eval()
        self.sam.prompt_encoder.eval()
        return self

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Return SAM's embedding [1, C, h, w] of an image: uint8 [height, width, 3]."""
        side = self.sam.config.vision_config.image_size
        size = self._fitted((image.shape[0], image.shape[1]))
        mean, std = (
            torch.tensor(self.normalisation[name], device=image.device).view(3, 1, 1) * 255
            for name in ("image_mean", "image_std")
        )
        values = image.permute(2, 0, 1)[None].float()
        values = functional.interpolate(values, size=size, mode="bilinear", antialias=True).round()
        values = functional.pad((values - mean) / std, (0, side - size[1], 0, side - size[0]))
        embedding: Tensor = self.sam.get_image_embeddings(values.to(self.words.mix.dtype))
        return embedding

    def forward(self, embedding: Tensor, image_size: Size, coarse: Tensor, words: Tensor, size: Size) -> Tensor:
        """Return the logits [height, width] of a fine mask.

        Args:
            embedding: Embedding of the image, from :meth:`encode`.
            image_size: (height, width) of the image in pixels.
            coarse: [h, w], logits of a mask over the whole image, of any size.
            words: [tokens, C], prompts of the phrase, from ``self.words``.
            size: (height, width) of the result, over the whole image.
        """
        side = self.sam.config.vision_config.image_size
        fitted = self._fitted(image_size)
        sparse, dense = self._prompts(coarse, fitted, side)
        dtype = self.words.mix.dtype
        low, _ = self.sam.mask_decoder(
            image_embeddings=embedding,
            image_positional_embeddings=self.sam.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=torch.cat([sparse.to(dtype), words[None, None].to(dtype)], dim=2),
            dense_prompt_embeddings=dense.to(dtype),
            multimask_output=False,
        )
        whole = functional.interpolate(low[0].float(), size=(side, side), mode="bilinear")
        cut = whole[..., : fitted[0], : fitted[1]]
        return functional.interpolate(cut, size=size, mode="bilinear", antialias=True)[0, 0]

    def _prompts(self, coarse: Tensor, fitted: Size, side: int) -> tuple[Tensor, Tensor]:
        """Return the prompts of a coarse mask: sparse [1, 1, 2, C] for its box, dense [1, C, h, w] for the mask."""
        mask = functional.interpolate(coarse[None, None].float(), size=fitted, mode="bilinear")
        box = box_around(mask[0, 0].detach() > 0)
        outside = -1.0 if mask.is_meta else min(-1.0, float(mask.detach().min()))
        padded = functional.pad(mask, (0, side - fitted[1], 0, side - fitted[0]), value=outside)
        shape = [4 * edge for edge in self.sam.prompt_encoder.image_embedding_size]
        shrunk = functional.interpolate(padded, size=shape, mode="bilinear").to(self.words.mix.dtype)
        sparse, dense = self.sam.prompt_encoder(None, None, box.to(shrunk)[None, None], shrunk)
        return sparse, dense

    def _fitted(self, size: Size) -> Size:
        """Return the (height, width) to which SAM resizes an image: the longer side is that of SAM's square."""
        scale = self.sam.config.vision_config.image_size / max(size)
        return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def box_around(mask: Tensor) -> Tensor:
    """Return the bounding box of a mask: (left, top, right, bottom), the last two exclusive; all of an empty mask.

    Args:
        mask: bool [height, width].
    """
    if mask.is_meta:  # a dry run computes shapes only
        return torch.empty(4, device=mask.device)
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if not len(rows):
        return torch.tensor([0, 0, mask.shape[1], mask.shape[0]], device=mask.device)
    return torch.cat([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
