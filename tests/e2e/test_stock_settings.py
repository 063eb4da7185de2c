"""Settings of transformers that reach the run: seen in its results, not in the arguments."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenvl.config.rules.limits import LARGEST_COUNT, LARGEST_SEED, LONGEST_TIME
from qwenvl.train import dataloader as loader
from tests.e2e.runs import equal_bits, flags, history, largest_difference, train

EVALUATING: dict[str, Any] = {"eval_dataset_use": "held_out", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}


@pytest.mark.parametrize("layout", [{}, {"data_flatten": True}], ids=["padded", "flattened"])
def test_tokens_seen_are_those_of_samples_without_a_warning(
    layout: dict[str, Any],
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_checkpoint("qwen3_vl")
    settings = {"include_num_input_tokens_seen": "non_padding", "per_device_train_batch_size": 4, **layout}
    folder = train(model, tmp_path / "run", registry, **settings, max_steps=2)
    # flattened, a row is nothing but its samples' tokens
    every = {"include_num_input_tokens_seen": "all", "per_device_train_batch_size": 4, "data_flatten": True}
    right = train(model, tmp_path / "all", registry, **every, max_steps=2)
    assert history(folder, "num_input_tokens_seen") == history(right, "num_input_tokens_seen")
    assert "Could not determine" not in caplog.text


def test_bf16_evaluation_leaves_the_weights_and_changes_the_loss_a_little(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    model = tiny_checkpoint("qwen3_vl")
    whole = train(model, tmp_path / "float32", registry, **EVALUATING)
    half = train(model, tmp_path / "bf16", registry, **EVALUATING, bf16_full_eval=True)
    assert equal_bits(whole, half)
    assert history(half, "loss") == history(whole, "loss")
    (exact,), (rounded,) = history(whole, "eval_loss"), history(half, "eval_loss")
    assert 0 < abs(exact - rounded) < 0.02 * exact


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_are_started_as_asked_and_give_the_same_batches(
    method: str,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[Any] = []
    monkeypatch.setattr(loader.ShardedDataLoader, "set_epoch", lambda self, epoch: built.append(self))
    model = tiny_checkpoint("qwen3_vl")
    settings = {"max_steps": 1, "optim": "sgd"}
    here = train(model, tmp_path / "here", registry, **settings)
    workers = train(
        model,
        tmp_path / "workers",
        registry,
        **settings | {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": method},
    )
    assert isinstance(built[-1].multiprocessing_context, type(multiprocessing.get_context(method)))
    assert largest_difference(here, workers) == 0


def test_a_metric_that_the_answers_do_not_call_for_is_refused_before_loading(
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    fail: Callable[[list[str]], str],
) -> None:
    settings = {**EVALUATING, "eval_generate": 2, "metric_for_best_model": "box_accuracy"}
    message = fail(flags(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings))
    assert "--metric_for_best_model box_accuracy is not one that evaluations of this run compute: loss, " in message
    assert not list((tmp_path / "run").glob("*.safetensors"))
    chosen = {**settings, "metric_for_best_model": message.split("loss, ")[1].split(".")[0]}
    train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **chosen, eval_generate_tokens=2)


@pytest.mark.parametrize(
    ("metric", "words"),
    [("eval_exact_macth", "Did you mean 'exact_match'"), ("accuracy", "exact_match"), ("loss_blank", "exact_match")],
)
def test_a_metric_that_no_answers_have_is_refused_before_the_data_are_opened(
    metric: str, words: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, fail: Callable[[list[str]], str]
) -> None:
    (tmp_path / "broken.json").write_text("{")
    entry = {"annotation_path": str(tmp_path / "broken.json"), "data_path": ""}
    entries = {"mixed": entry, "held_out": entry}
    (tmp_path / "registry.py").write_text(f"data_dict = {entries!r}\n")
    settings = {**EVALUATING, "eval_generate": 2, "metric_for_best_model": metric}
    message = fail(flags(tiny_checkpoint("qwen3_vl"), tmp_path / "run", tmp_path / "registry.py", **settings))
    assert message.startswith(f"--metric_for_best_model {metric} is not one that") and words in message


def test_the_metric_that_a_dataset_names_chooses_the_best_checkpoint(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """No answer calls for it by its form."""
    entry = {"annotation_path": str(registry.parent / "held_out.json"), "data_path": str(registry.parent)}
    entries = dict.fromkeys(("mixed", "held_out"), entry | {"metric": "anls"})
    (tmp_path / "registry.py").write_text(f"data_dict = {entries!r}\n")
    settings = {**EVALUATING, "eval_generate": 2, "eval_generate_tokens": 2, "metric_for_best_model": "anls"}
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", tmp_path / "registry.py", **settings)
    assert history(folder, "eval_anls")


def test_settings_that_no_other_test_trains_with(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """With the largest numbers that are taken, too."""
    settings: dict[str, Any] = {
        "skip_memory_metrics": False,
        "torch_empty_cache_steps": 1,
        "neftune_noise_alpha": 5.0,
        "restore_callback_states_from_checkpoint": True,
        "max_grad_norm": 0,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": '{"min_lr": 1e-6}',
        "seed": LARGEST_SEED,
        "data_seed": LARGEST_SEED,
        "step_timeout": LONGEST_TIME,
        "video_timeout": LONGEST_TIME,
        "ddp_timeout": LONGEST_TIME,
        "gradient_accumulation_steps": LARGEST_COUNT,
    }
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **{**settings, "max_steps": 1})
    assert 0 < history(folder, "train_loss")[0] < 20
