"""What the trainer knows of a sample: the prompt that a server has to make of it, and log-probabilities behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from qwenvl.cli.check_serving import open_serving, read_arguments, select_samples
from qwenvl.data.encoding.encoded import EncodedSample, Plan
from qwenvl.data.types import Sample
from qwenvl.models.adapter_merging import open_adapted
from qwenvl.models.lora.files import find_base
from qwenvl.serving.inputs import ModelInputs, Serving, arguments_of, asked, training_inputs
from qwenvl.serving.server import as_request


@dataclass(frozen=True)
class Row:
    """One answer that was trained.

    Args:
        serving: Folder and training.
        sample: Its sample.
        plan: Its training row.
        encoded: The row's tokens and pixels.
    """

    serving: Serving
    sample: Sample
    plan: Plan
    encoded: EncodedSample

    @property
    def name(self) -> str:
        """Name of the sample."""
        return str(self.sample.record["id"])

    @property
    def target(self) -> list[int]:
        """Ids that are trained of the answer."""
        return list(self.plan.tokens.input_ids[self.plan.tokens.starts[-1] :].tolist())

    def messages(self) -> list[dict[str, Any]]:
        """Return the turns as a client of a server writes them."""
        locate = self.serving.sources(self.sample).locate
        return [as_request(message, locate) for message in asked(self.serving, self.plan)]

    def arguments(self) -> dict[str, Any]:
        """Return the template arguments of the request."""
        return arguments_of(self.serving, self.plan)

    def inputs(self) -> ModelInputs:
        """Return what training fed for the prompt."""
        return training_inputs(self.serving, self.plan, self.encoded)


def rows_of(folder: Path, *flags: str) -> Iterator[Row]:
    """Yield the training rows of a saved folder, by the data flags of ``check_serving``."""
    arguments = read_arguments(["--model_name_or_path", str(folder), *flags])
    serving, _ = open_serving(arguments)
    for sample in select_samples(arguments):
        assert isinstance(sample, Sample), sample
        plans = serving.encoder.plans(sample)
        for plan, encoded in zip(plans, serving.encoder.encode(plans, sample), strict=True):
            yield Row(serving, sample, plan, encoded)


def open_float32(folder: Path) -> Any:
    """Open a folder of a model or of adapters as it was trained."""
    if (folder / "adapter_config.json").is_file():
        return open_adapted(find_base(folder), str(folder), torch.float32)
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def log_probabilities(model: Any, row: Row, answer: Sequence[int]) -> list[float]:
    """Return the log-probability of each token of an answer behind the prompt of training."""
    found = _after_prompt(model, row, answer)
    return [float(line[token]) for line, token in zip(found, answer, strict=False)]


def next_token(model: Any, row: Row) -> torch.Tensor:
    """Return the log-probabilities float32 [V] of the token behind the prompt of training."""
    return _after_prompt(model, row, ())[0]


def _after_prompt(model: Any, row: Row, answer: Sequence[int]) -> torch.Tensor:
    """Return log-probabilities float32 [n + 1, V] of the tokens from the first one of an answer of n tokens on."""
    inputs, count = row.inputs(), len(answer)
    ids = torch.cat([inputs.input_ids, torch.tensor(answer, dtype=torch.int64)])
    after = inputs.positions[:, -1:] + 1 + torch.arange(count)
    positions = torch.cat([inputs.positions, after], dim=1)[:, None]
    with torch.no_grad():
        logits = model(
            input_ids=ids[None],
            position_ids=positions,
            attention_mask=torch.ones_like(ids)[None],
            use_cache=False,
            **_media(inputs),
        ).logits[0]
    return torch.log_softmax(logits[-count - 1 :].float(), dim=-1)


def _media(inputs: ModelInputs) -> Mapping[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        patches = inputs.patches[kind]
        if patches is not None:
            found |= {name: patches, f"{kind}_grid_thw": torch.tensor(inputs.grids[kind])}
    return found
