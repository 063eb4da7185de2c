"""Collate encoded samples to one model batch: rows padded on the right, or one flattened row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from qwenvl.data.encoding.encoded import EncodedSample, Item
from qwenvl.data.encoding.tokenization import IGNORE_INDEX, Tokens


@dataclass(frozen=True, slots=True)
class Collator:
    """Collates items to a batch.

    Keys of the batch: ``input_ids``, ``labels`` int64 [B, T]; ``position_ids`` int64 [4, B, T]; ``vision_rows`` int64
    [n], the index of each image and video token in the flattened rows [B x T]; ``num_samples``, an int, its usable
    samples; where it holds media, in token order, ``pixels`` uint8, the values of all frames one after another, and
    ``media``, (frames, temporal, height, width) of each in frames and patches, ints that stay on the host;
    ``sample_targets``, those of its usable samples, where there is a task; ``loss_weights`` float32 [B, T], factors of
    the tokens' loss, where one of its answers has a weight other than 1;
    ``attention_mask`` int64 [B, T] if padded; ``cu_seq_lens_q``, ``cu_seq_lens_k`` int32 [samples + 1],
    ``max_length_q`` and ``max_length_k`` if flattened; ``events``, ``error`` and ``origins`` of its samples, for the
    trainer.

    Args:
        pad_token_id: Id of the token that fills short rows; masked from attention, never trained.
        flatten: Whether samples become one row [1, sum of lengths], on which they cannot attend to each other.
    """

    pad_token_id: int
    flatten: bool

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Collate items; a batch without usable samples gets one of two untrained tokens, so that every rank steps."""
        usable = [sample for item in items for sample in item.samples]
        samples = usable or [self._empty_sample()]
        tokens = [sample.tokens for sample in samples]
        batch = self._flattened(tokens) if self.flatten else self._padded(tokens)
        if any(one.weights is not None for one in tokens):
            weights = [_weights(one) for one in tokens]
            batch["loss_weights"] = torch.cat(weights)[None] if self.flatten else pad_sequence(weights, True, 0.0)
        batch["num_samples"] = len(usable)
        media = [medium for sample in samples for medium in sample.media]
        if media:
            pixels = [medium.frames.flatten() for medium in media]
            batch["pixels"] = torch.cat(pixels) if len(pixels) > 1 else pixels[0]
            batch["media"] = tuple(medium.shape for medium in media)
        if not usable or usable[0].target is not None:
            batch["sample_targets"] = [sample.target for sample in usable]
        batch["events"] = [event for item in items for event in item.events]
        batch["origins"] = [sample.origin for sample in samples if sample.origin is not None]
        batch["error"] = next((item.error for item in items if item.error is not None), None)
        return batch

    def _padded(self, tokens: Sequence[Tokens]) -> dict[str, Any]:
        lengths = torch.tensor([len(one) for one in tokens])
        positions = [one.position_ids.T for one in tokens]
        return {
            "input_ids": pad_sequence([t.input_ids for t in tokens], True, self.pad_token_id),
            "labels": pad_sequence([t.labels for t in tokens], True, IGNORE_INDEX),
            "position_ids": pad_sequence(positions, True, 0).permute(2, 0, 1).contiguous(),
            "vision_rows": _true_places(pad_sequence([t.vision_mask for t in tokens], True, False)),
            "attention_mask": (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long(),
        }

    def _flattened(self, tokens: Sequence[Tokens]) -> dict[str, Any]:
        lengths = torch.tensor([0] + [len(one) for one in tokens])
        borders = torch.cumsum(lengths, 0, dtype=torch.int32)
        longest = int(lengths.max())
        return {
            "input_ids": torch.cat([t.input_ids for t in tokens])[None],
            "labels": torch.cat([t.labels for t in tokens])[None],
            "position_ids": torch.cat([t.position_ids for t in tokens], dim=1)[:, None],
            "vision_rows": _true_places(torch.cat([t.vision_mask for t in tokens])),
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def _empty_sample(self) -> EncodedSample:
        ids = torch.full((2,), self.pad_token_id)
        positions = torch.arange(2).expand(4, 2).clone()
        return EncodedSample(Tokens(ids, torch.full_like(ids, IGNORE_INDEX), positions, torch.zeros(2).bool()))


def _true_places(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten().nonzero().squeeze(1)


def _weights(tokens: Tokens) -> torch.Tensor:
    """Return the factor of each token's loss, 0 where it is not trained: float32 [T]."""
    return tokens.weights if tokens.weights is not None else (tokens.labels != IGNORE_INDEX).float()


def for_model(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the model inputs of a batch of :class:`Collator`, without its events, error and origins.

    Raises:
        UserError: a sample of the batch must stop the run.
    """
    if batch["error"] is not None:
        raise batch["error"]
    return {name: value for name, value in batch.items() if name not in ("events", "error", "origins")}
