"""Evaluation during training, learning rates by part, frozen parts and gradient checkpointing, in whole runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from qwenvl.config import parse_arguments
from qwenvl.data.encoding.encoded import EncodedSample
from qwenvl.families import get_family
from qwenvl.models.loss.fused_lm_head import LossHead
from qwenvl.models.trainable.freezing import parameter_modules
from qwenvl.train.build.data import open_data
from tests.e2e.runs import equal_bits, flags, history, largest_difference, read_config, train, weights
from tests.patches import grids_of, patches_of

FAMILY = "qwen3_vl"


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Path:
    """The checkpoint that the runs here start from."""
    return tiny_checkpoint(FAMILY)


def stock_loss_sum(model: PreTrainedModel, sample: EncodedSample) -> tuple[float, int]:
    """Return (summed cross entropy, trained tokens) of one sample by the stock forward, all logits kept."""
    config: Any = model.config
    ids, labels = sample.tokens.input_ids[None], sample.tokens.labels[None]
    inputs: dict[str, Tensor] = {"input_ids": ids, "position_ids": sample.tokens.position_ids[1:, None]}
    if sample.media:
        # in this order the media's patches lie one after another; their kind shows at their tokens
        grid_thw = torch.tensor(grids_of(sample))
        kinds = _kinds(ids[0], config, grid_thw)
        patches = patches_of(sample, config._name_or_path).split(grid_thw.prod(-1).tolist())
        for kind, pixels, grids in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            chosen = [index for index, found in enumerate(kinds) if found == kind]
            if chosen:
                inputs[pixels] = torch.cat([patches[index] for index in chosen])
                inputs[grids] = grid_thw[chosen]
    with torch.no_grad():
        logits = model(**inputs).logits.float()
    loss = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
    return float(loss), int((labels[0, 1:] != -100).sum())


def _kinds(ids: Tensor, config: Any, grids: Tensor) -> list[str]:
    """Return what each of a sample's media is, from its tokens."""
    pads = ids[(ids == config.image_token_id) | (ids == config.video_token_id)].tolist()
    kinds = []
    for tokens in (grids.prod(-1) // config.vision_config.spatial_merge_size**2).tolist():
        kinds.append("image" if pads[0] == config.image_token_id else "video")
        del pads[:tokens]
    return kinds


def _samples(command: Sequence[str], checkpoint: Path) -> tuple[list[EncodedSample], list[EncodedSample]]:
    """Return the training and the evaluation samples of a command line."""
    data = open_data(parse_arguments(command), get_family(FAMILY), AutoConfig.from_pretrained(checkpoint))
    train_set = [sample for index in range(len(data.train)) for sample in data.train[index].samples]
    held_out = data.evaluation
    return train_set, [s for i in range(len(held_out)) for s in held_out[i].samples] if held_out else []


def _stock_loss(folder: Path, samples: Sequence[EncodedSample]) -> float:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    sums = [stock_loss_sum(model, sample) for sample in samples]
    return sum(loss for loss, _ in sums) / sum(tokens for _, tokens in sums)


@pytest.mark.parametrize(
    "choice", [{"eval_dataset_use": "held_out"}, {"eval_ratio": 0.4}], ids=["own dataset", "share of the training data"]
)
@pytest.mark.parametrize("layout", ["padded", "flattened"])
def test_loss_of_evaluation_is_that_of_all_its_trained_tokens(
    choice: dict[str, Any], layout: str, checkpoint: Path, registry: Path, tmp_path: Path
) -> None:
    settings = {
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "data_flatten": layout == "flattened",
        **choice,
    }
    runs = [
        train(checkpoint, tmp_path / str(size), registry, per_device_eval_batch_size=size, **settings)
        for size in (1, 3)
    ]
    _, held_out = _samples(flags(checkpoint, tmp_path, registry, **settings), checkpoint)
    assert len(held_out) == 4
    expected = _stock_loss(runs[0], held_out)
    for run in runs:
        assert history(run, "eval_loss") == [pytest.approx(expected, rel=1e-5)]
    counts = [int((sample.tokens.labels != -100).sum()) for sample in held_out]
    assert history(runs[0], "eval_trained_tokens") == [sum(counts)]
    assert max(counts) > 3 * min(counts)  # a mean of the batches' means would be another number


def test_evaluation_on_training_rows_is_said(
    checkpoint: Path, registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``a%50`` for both takes the same rows twice: its loss would be taken for that of unseen samples."""
    said = []
    for used, held_out in (("mixed%60", "mixed%40"), ("mixed", "held_out")):
        caplog.clear()
        command = flags(checkpoint, tmp_path, registry, dataset_use=used, eval_dataset_use=held_out)
        _samples(command, checkpoint)
        said.append([record.getMessage() for record in caplog.records if "training rows too" in record.getMessage()])
    assert [len(lines) for lines in said] == [1, 0]
    assert said[0][0].startswith("4 rows of the evaluation dataset 'mixed' are training rows too")


def test_logged_loss_is_that_of_the_trained_tokens_of_the_step(
    checkpoint: Path, registry: Path, tmp_path: Path
) -> None:
    """One step over all eleven samples, in four micro-batches of which the last is not full."""
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "max_steps": 1}
    folder = train(checkpoint, tmp_path, registry, **settings)
    samples, _ = _samples(flags(checkpoint, tmp_path, registry, **settings), checkpoint)
    assert len(samples) == 11
    assert history(folder) == [pytest.approx(_stock_loss(checkpoint, samples), rel=1e-5)]


def test_evaluation_projects_trained_tokens_alone_and_makes_no_logits(
    checkpoint: Path, registry: Path, tmp_path: Path
) -> None:
    rows: list[int] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(module, LossHead) and not torch.is_grad_enabled():
            assert output.dim() == 0
            rows.append(inputs[0].shape[:-1].numel())

    handle = nn.modules.module.register_module_forward_hook(watch)
    try:
        settings = {"max_steps": 1, "eval_strategy": "steps", "per_device_eval_batch_size": 1}
        folder = train(checkpoint, tmp_path, registry, eval_dataset_use="held_out", eval_steps=1, **settings)
    finally:
        handle.remove()
    assert len(rows) == 4
    assert [sum(rows)] == history(folder, "eval_trained_tokens")


def test_best_checkpoint_is_loaded_at_the_end(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """With the mixture of experts, whose files are laid out otherwise than memory."""
    folder = train(
        tiny_checkpoint("qwen3_vl_moe"),
        tmp_path,
        registry,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that an earlier checkpoint than the last one has to be loaded
        eval_dataset_use="held_out",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    losses = history(folder, "eval_loss")
    best = losses.index(max(losses)) + 1
    assert best < 3
    assert equal_bits(folder, folder / f"checkpoint-{best}")


def _groups(checkpoint: Path) -> dict[str, str]:
    """Return the part of the model that each saved tensor belongs to."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    return {name: group for name, group in parameter_modules(model).items() if name in weights(checkpoint)}


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"mm_projector_lr": 1e-4}, {"vision": 1e-3, "merger": 1e-4, "language": 1e-3}),
        ({"vision_tower_lr": 1e-5}, {"vision": 1e-5, "merger": 1e-3, "language": 1e-3}),
        ({"vision_tower_lr": 0.0001, "mm_projector_lr": 1e-5}, {"vision": 1e-4, "merger": 1e-5, "language": 1e-3}),
    ],
    ids=["merger", "vision", "both"],
)
def test_learning_rates_of_the_parts_reach_the_weights(
    rates: dict[str, float], expected: dict[str, float], checkpoint: Path, registry: Path, tmp_path: Path
) -> None:
    """Adam's first step moves a weight by the learning rate, whatever its gradient; here without weight decay."""
    folder = train(checkpoint, tmp_path, registry, max_steps=1, weight_decay=0, **rates)
    before, after = weights(checkpoint), weights(folder)
    groups = _groups(checkpoint)
    assert set(groups.values()) == set(expected)
    for part, rate in expected.items():
        moved = max(float((after[name] - before[name]).abs().max()) for name in groups if groups[name] == part)
        assert moved == pytest.approx(rate, rel=0.02), part
        assert history(folder, f"learning_rate_{part}") == [rate]
    assert history(folder, "learning_rate") == [1e-3]


@pytest.mark.parametrize("trained", ["vision", "merger", "language"])
def test_frozen_parts_stay_as_they_are_bit_for_bit(
    trained: str, checkpoint: Path, registry: Path, tmp_path: Path
) -> None:
    switches = {"tune_mm_vision": "vision", "tune_mm_mlp": "merger", "tune_mm_llm": "language"}
    chosen = {switch: part == trained for switch, part in switches.items()}
    folder = train(checkpoint, tmp_path, registry, gradient_checkpointing=True, **chosen)
    before, after = weights(checkpoint), weights(folder)
    groups = _groups(checkpoint)
    moved = {groups[name] for name in groups if not torch.equal(before[name], after[name])}
    assert moved == {trained}


@pytest.mark.parametrize("switches", [{}, {"tune_mm_vision": False, "tune_mm_llm": False}], ids=["all", "merger only"])
def test_gradient_checkpointing_changes_nothing(
    switches: dict[str, Any], checkpoint: Path, registry: Path, tmp_path: Path
) -> None:
    runs = [
        train(checkpoint, tmp_path / str(on), registry, max_steps=2, gradient_checkpointing=on, **switches, **offload)
        for on, offload in ((True, {}), (False, {}), ("vision", {}), ("language", {"activation_offload": True}))
    ]
    assert all(largest_difference(run, runs[1]) < 1e-6 for run in runs)
    assert read_config(runs[0]) == read_config(checkpoint)
