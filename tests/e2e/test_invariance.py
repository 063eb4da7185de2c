"""The same samples give the same loss and weights, however they are laid out, accumulated and spread over ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenvl.data.sampler import SampleOrder, ShardedBatchSampler, Sharding
from tests.e2e.runs import equal_bits, flags, history, largest_difference, read_annotations, run_on_two_ranks
from tests.e2e.runs import train as train_here

# Plain gradient descent: Adam divides by the gradient's size, and makes much of rounding where it is nearly zero.
DESCENT = {"optim": "sgd", "learning_rate": 0.05, "weight_decay": 0}
EVALUATION = {
    "eval_strategy": "steps",
    "eval_steps": 3,
    "eval_dataset_use": "held_out",
    "per_device_eval_batch_size": 3,
}


@pytest.mark.parametrize("trained", [{}, {"tune_mm_vision": False, "tune_mm_llm": False}], ids=["all", "merger only"])
def test_padded_and_flattened_batches_train_alike(
    trained: dict[str, Any], tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    padded, flattened = (
        train_here(tiny_checkpoint("qwen3_vl"), tmp_path / str(flat), registry, data_flatten=flat, **DESCENT, **trained)
        for flat in (False, True)
    )
    assert history(flattened) == pytest.approx(history(padded), rel=1e-5)
    assert largest_difference(padded, flattened) < 1e-5
    assert largest_difference(padded, tiny_checkpoint("qwen3_vl")) > 1e-3


@pytest.mark.parametrize("layout", [False, True], ids=["padded", "flattened"])
def test_loss_and_weights_do_not_depend_on_accumulation(
    layout: bool, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """Eleven samples: the last micro-batches and the last step of an epoch are not full. Five steps: two epochs."""
    settings = {**DESCENT, "data_flatten": layout, "max_steps": 5}
    runs = [
        train_here(
            tiny_checkpoint("qwen3_vl"),
            tmp_path / str(size),
            registry,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            **settings,
        )
        for size in (1, 2, 4)
    ]
    for run in runs[1:]:
        assert history(run) == pytest.approx(history(runs[0]), rel=1e-5)
        assert largest_difference(run, runs[0]) < 1e-5


# One process with these settings, and two ranks with half the accumulation.
SPLITS: dict[str, dict[str, Any]] = {
    "padded": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 5},
    "flattened": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "data_flatten": True,
        "device_peak_tflops": 1,
        "profile_steps": 1,
    },
    "packed": {"gradient_accumulation_steps": 2, "data_packing": True, "model_max_length": 128, "max_steps": 4},
    "grouped": {"gradient_accumulation_steps": 2, "group_by_cost": True, "max_steps": 4},
    "merger": {"gradient_accumulation_steps": 2, "tune_mm_vision": False, "tune_mm_llm": False, **EVALUATION},
    "checkpointing": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "epoch": {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 4,
        "max_steps": 2,
        "device_peak_tflops": 1,
    },
}


@pytest.mark.slow
def test_two_ranks_train_like_one_process(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """Real DDP over gloo, text on one rank while the other holds pictures or a video."""
    model = tiny_checkpoint("qwen3_vl")
    single = {
        name: train_here(model, tmp_path / "single" / name, registry, **DESCENT, **settings)
        for name, settings in SPLITS.items()
    }
    commands = {
        name: flags(
            model,
            tmp_path / name,
            registry,
            **{
                **DESCENT,
                **settings,
                "gradient_accumulation_steps": settings["gradient_accumulation_steps"] // 2,
                "dataloader_num_workers": 1 if name == "epoch" else 0,
            },
        )
        for name, settings in SPLITS.items()
    }
    experts = {**DESCENT, "router_aux_loss_coef": 0.5, "per_device_train_batch_size": 1}
    moe = tiny_checkpoint("qwen3_vl_moe")
    single["experts"] = train_here(
        moe, tmp_path / "single" / "experts", registry, gradient_accumulation_steps=4, data_flatten=True, **experts
    )
    commands["experts"] = flags(moe, tmp_path / "experts", registry, gradient_accumulation_steps=2, **experts)
    commands["packed"] += ["--data_cache_dir", str(tmp_path / "cache")]  # so that the ranks make a plan themselves
    commands["planned"] = [*commands["packed"], "--output_dir", str(tmp_path / "planned")]  # and read it
    saving = {**DESCENT, "per_device_train_batch_size": 1, "max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    commands["whole"] = flags(model, tmp_path / "whole", registry, **saving)
    resume = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-2"}
    commands["resumed"] = flags(model, tmp_path / "resumed", registry, **saving, **resume)
    _require_mixed_ranks(registry)
    split = run_on_two_ranks(tmp_path, commands, "DDP")
    for name, alone in single.items():
        assert history(split[name]) == pytest.approx(history(alone), rel=1e-5), name
        assert largest_difference(split[name], alone) < 1e-5, name
        assert _figures(split[name]) == pytest.approx(_figures(alone), rel=1e-3), name
    assert len(_figures(split["epoch"])) == 2 * 3 + 1
    assert len(history(split["epoch"], "data_wait_share_max")) == 2
    assert {path.name for path in (split["flattened"] / "profile").iterdir()} == {"table.txt", "trace.json.gz"}
    assert history(split["merger"], "eval_loss") == pytest.approx(history(single["merger"], "eval_loss"), rel=1e-5)
    assert history(split["merger"], "eval_loss")
    assert len(list((tmp_path / "cache" / "plans").iterdir())) == 1
    assert equal_bits(split["planned"], split["packed"])
    assert equal_bits(split["resumed"], split["whole"])
    assert history(split["resumed"]) == history(split["whole"])
    moved = train_here(model, tmp_path / "moved", registry, **{**saving, **resume, "gradient_accumulation_steps": 2})
    assert history(moved) == pytest.approx(history(split["whole"]), rel=1e-5)  # the same steps on one rank
    assert largest_difference(moved, split["whole"]) < 1e-5


def _figures(folder: Path) -> list[float]:
    """Logged figures of all ranks together that do not depend on how long they took."""
    tokens, device = history(folder, "tokens_per_second"), history(folder, "tokens_per_second_per_device")
    parts = [(name, tokens) for name in ("trained_tokens_per_second", "samples_per_second")] + [("mfu", device)]
    rates = [value / of for name, base in parts for value, of in zip(history(folder, name), base, strict=False)]
    return rates + history(folder, "total_flos")


def _require_mixed_ranks(registry: Path) -> None:
    """Check that there is a micro-step in which one rank holds text alone and the other does not."""
    has_media = ["image" in record or "video" in record for record in read_annotations(registry, "mixed")]
    order = SampleOrder(len(has_media), seed=42)
    ranks = [list(ShardedBatchSampler(order, Sharding(1, 2, rank))) for rank in (0, 1)]
    assert any(has_media[one[0]] != has_media[other[0]] for one, other in zip(*ranks, strict=True))
