"""Questions to the model at every evaluation of a run: answers, and what blank and exchanged pictures cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenvl.cli.evaluate.command import main as evaluate
from qwenvl.data.sources.registry import load_registry, parse_dataset_use
from qwenvl.evaluate.answer_log import AnswerLog
from tests.e2e.runs import REPOSITORY, equal_bits, flags, history, run_on_two_ranks, train

ASKING = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_dataset_use": "mixed",
    "eval_generate": 11,
    "eval_generate_tokens": 4,
    "eval_blind": True,
    "max_steps": 3,
    "per_device_eval_batch_size": 2,
}
KEYS = ("eval_loss_shown", "eval_loss_blank", "eval_loss_swapped", "eval_chrf", "eval_answered_samples")


@pytest.fixture(scope="module")
def registry(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples of other tests, measured by a metric in which random answers differ."""
    path = str(registry.parent / "mixed.json")
    entries = {"mixed": {"annotation_path": path, "data_path": str(registry.parent), "metric": "chrf"}}
    file = tmp_path_factory.mktemp("asking") / "registry.py"
    file.write_text(f"data_dict = {entries!r}\n")
    return file


def figures(folder: Path) -> dict[str, list[float]]:
    return {key: history(folder, key) for key in ("eval_loss", *KEYS)}


def test_a_run_that_asks_trains_the_same_bits(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """Over more than an epoch: random numbers, and so the order of samples, go on as if nothing had been asked."""
    model = tiny_checkpoint("qwen3_vl")
    plain = {**ASKING, "eval_generate": 0, "eval_blind": False, "max_steps": 7}
    quiet = train(model, tmp_path / "quiet", registry, **plain)
    asking = train(model, tmp_path / "asking", registry, **{**ASKING, "max_steps": 7, "eval_generate": 8})
    assert equal_bits(quiet, asking)
    assert history(quiet) == history(asking)
    assert history(quiet, "eval_loss") == history(asking, "eval_loss")
    assert history(quiet, "eval_loss_blank") == []
    found = figures(asking)
    assert {len(values) for values in found.values()} == {4}  # after steps 2, 4, 6 and the last
    assert set(found["eval_answered_samples"]) == {8}
    assert len({tuple(found[key]) for key in KEYS}) == len(KEYS)


def with_weights(registry: Path, folder: Path) -> Path:
    """Return a registry of the same samples, whose answers have weights."""
    (spec,) = parse_dataset_use("mixed", load_registry(str(registry)))
    records = json.loads(Path(spec.annotation_paths[0]).read_text())
    for number, record in enumerate(records):
        record["conversations"][1]["weight"] = (0.25, 1, 4)[number % 3]
    (folder / "weighted.json").write_text(json.dumps(records))
    entry = {"annotation_path": str(folder / "weighted.json"), "data_path": spec.data_path, "metric": "chrf"}
    (folder / "registry.py").write_text(f"data_dict = {{'mixed': {entry!r}}}\n")
    return folder / "registry.py"


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_evaluation_of_the_folder_says_the_same_as_training(
    weighted: bool,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stock model of the saved folder, asked by the tool, against the model in training; all eleven samples."""
    registry = with_weights(registry, tmp_path) if weighted else registry
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **{**ASKING, "max_steps": 2})
    monkeypatch.chdir(tmp_path)
    asked = ["--model_name_or_path", str(folder), "--dataset_registry", str(registry), "--dataset_use", "mixed"]
    assert evaluate([*asked, "--blind", "--max_new_tokens", "4", "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    (scores,), (blind,) = found["datasets"], found["blind"]
    trained = figures(folder)
    assert trained["eval_answered_samples"] == [11] and scores["count"] == 11
    answers = [json.loads(line) for line in (folder / "eval_answers.jsonl").read_text().splitlines()]
    assert history(folder, "eval_cut_answers") == [sum(one["finish_reason"] == "length" for one in answers)]
    assert history(folder, "eval_cut_answers") == [scores["cut"]] and scores["cut"] > 0
    assert trained["eval_chrf"] == [pytest.approx(scores["score"]["value"])]
    assert trained["eval_chrf"] > [0]
    lines = [json.loads(line) for line in (tmp_path / "evaluation" / "predictions.jsonl").read_text().splitlines()]
    losses, tokens = sum(line["loss"] for line in lines), sum(line["trained_tokens"] for line in lines)
    assert trained["eval_loss"] == [pytest.approx(losses / tokens, rel=1e-4)]
    assert history(folder, "eval_trained_tokens")[0] != tokens or not weighted
    for view in ("shown", "blank", "swapped"):
        assert trained[f"eval_loss_{view}"] == [pytest.approx(blind["losses"][view]["value"], rel=1e-4)], view


def test_losses_by_image_shown_are_by_dataset_too_and_can_choose_the_best(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the tool finds them for each dataset of the saved folder."""
    (spec,) = parse_dataset_use("mixed", load_registry(str(registry)))
    entries = {
        name: {"annotation_path": str(Path(spec.data_path) / f"{name}.json"), "data_path": spec.data_path}
        for name in ("mixed", "pictures", "text")
    }
    (tmp_path / "registry.py").write_text(f"data_dict = {entries!r}\n")
    best = "eval_loss_blank/pictures"
    settings = {**ASKING, "eval_dataset_use": "mixed,pictures,text", "eval_generate": 50, "max_steps": 4}
    settings |= {"metric_for_best_model": best, "save_strategy": "best", "per_device_eval_batch_size": 5}
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", tmp_path / "registry.py", **settings)
    monkeypatch.chdir(tmp_path)
    asked = ["--model_name_or_path", str(folder), "--dataset_registry", str(tmp_path / "registry.py")]
    asked += ["--dataset_use", "mixed,pictures,text", "--blind", "--max_new_tokens", "4", "--device", "cpu"]
    assert evaluate(asked) == 0
    blind = {one["name"]: one for one in json.loads(Path("evaluation/evaluation.json").read_text())["blind"]}
    for name in ("mixed", "pictures"):
        for view in ("shown", "blank", "swapped"):
            found = history(folder, f"eval_loss_{view}/{name}")
            assert len(found) == 2 and found[-1] == pytest.approx(blind[name]["losses"][view]["value"], rel=1e-4)
    assert history(folder, "eval_loss_blank/text") == []
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["best_metric"] == min(history(folder, best)) and len(set(history(folder, best))) == 2
    page = (folder / "report.html").read_text()
    assert "Loss by image shown: mixed" in page and "Loss by image shown: pictures" in page


@pytest.mark.parametrize(
    ("changes", "metric", "known"),
    [
        ({"eval_generate": 0, "eval_blind": False}, "loss/mixd", "compute: loss/mixed. Did you mean 'loss/mixed'"),
        ({"eval_blind": False}, "chrf/text", "compute: chrf/mixed, loss/mixed."),
        ({}, "eval_loss_blank/text", "chrf/mixed, loss_shown/mixed, loss_blank/mixed, loss_swapped/mixed, loss/mixed."),
        ({"eval_generate": 0, "eval_blind": False}, "chrf/mixed", "compute: loss. Metrics of answers need"),
    ],
)
def test_a_best_metric_of_a_dataset_that_is_not_evaluated_is_refused(
    changes: dict[str, Any],
    metric: str,
    known: str,
    fail: Callable[[list[str]], str],
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
) -> None:
    settings = {**ASKING, **changes, "metric_for_best_model": metric}
    message = fail(flags(tiny_checkpoint("qwen3_vl"), tmp_path, registry, **settings))
    assert message.startswith(f"--metric_for_best_model {metric} is not one that") and known in message


def test_rows_that_cannot_be_asked_are_passed_over(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    (spec,) = parse_dataset_use("mixed", load_registry(str(registry)))
    records = json.loads(Path(spec.annotation_paths[0]).read_text())
    broken = [{**records[1], "image": ["gone.png"]}, *records[:4]]
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    entries = {
        name: {"annotation_path": str(path), "data_path": spec.data_path}
        for name, path in (("mixed", spec.annotation_paths[0]), ("broken", tmp_path / "broken.json"))
    }
    (tmp_path / "registry.py").write_text(f"data_dict = {entries!r}\n")
    settings = {**ASKING, "eval_dataset_use": "broken", "on_bad_sample": "skip", "eval_blind": False}
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", tmp_path / "registry.py", **settings)
    assert set(history(folder, "eval_answered_samples")) == {4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_generate": 3, "eval_strategy": "no"}, "add --eval_strategy steps"),
        ({"eval_generate": 0, "eval_blind": True}, "add --eval_generate"),
        ({"eval_generate": -1, "eval_blind": False}, "0 or more"),
    ],
)
def test_flags_without_effect_are_refused(
    settings: dict[str, Any],
    message: str,
    fail: Callable[[list[str]], str],
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
) -> None:
    assert message in fail(flags(tiny_checkpoint("qwen3_vl"), tmp_path, registry, **{**ASKING, **settings}))


@pytest.mark.slow
@pytest.mark.parametrize("engines", [("DDP", "ZeRO-3"), ("FSDP2",)], ids=["DDP and ZeRO-3", "FSDP2"])
def test_two_ranks_ask_like_one_process(
    engines: tuple[str, ...], tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """Text, pictures and videos, as many as leave a rank without a sample in some round; and the same bits as quiet."""
    model = tiny_checkpoint("qwen3_vl")
    zero = json.loads((REPOSITORY / "configs" / "zero3.json").read_text())
    zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or a tiny model is never sharded
    (tmp_path / "zero3.json").write_text(json.dumps(zero))
    options: dict[str, dict[str, Any]] = {
        "DDP": {},
        "ZeRO-3": {"deepspeed": tmp_path / "zero3.json"},
        "FSDP2": {"fsdp": True, "fsdp_config": "configs/fsdp2.json"},
    }
    settings = {**ASKING, "per_device_train_batch_size": 1, "ddp_timeout": 600}
    alone = train(model, tmp_path / "alone", registry, **{**settings, "gradient_accumulation_steps": 2})
    commands, wanted = {}, {}
    for engine in engines:
        for name, changes in (("asking", {}), ("quiet", {"eval_generate": 0, "eval_blind": False})):
            key = f"{engine}-{name}"
            commands[key] = flags(model, tmp_path / key, registry, **{**settings, **options[engine], **changes})
            wanted[key] = engine
    runs = run_on_two_ranks(tmp_path, commands, wanted)
    for engine in engines:
        assert equal_bits(runs[f"{engine}-asking"], runs[f"{engine}-quiet"]), engine
        found, expected = figures(runs[f"{engine}-asking"]), figures(alone)
        for key in KEYS:
            assert found[key] == pytest.approx(expected[key], rel=1e-3), (engine, key)
        of_dataset = history(runs[f"{engine}-asking"], "eval_loss_swapped/mixed")
        assert of_dataset == pytest.approx(expected["eval_loss_swapped"], rel=1e-3), engine
        asked, asked_alone = (AnswerLog(folder).read() for folder in (runs[f"{engine}-asking"], alone))
        assert [(one.step, one.line.index) for one in asked] == [(one.step, one.line.index) for one in asked_alone]
        assert (runs[f"{engine}-asking"] / "report.html").exists()


def test_adapters_are_asked_in_training_and_as_they_are_saved(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a part that trains whole."""
    adapters = {"lora_enable": True, "lora_target": "language,vision", "tune_mm_vision": False, "tune_mm_llm": False}
    settings = {**ASKING, **adapters, "max_steps": 2, "learning_rate": 1e-2}
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings)
    monkeypatch.chdir(tmp_path)
    asked = ["--model_name_or_path", str(folder), "--dataset_registry", str(registry), "--dataset_use", "mixed"]
    assert evaluate([*asked, "--blind", "--max_new_tokens", "4", "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    (scores,), (blind,), trained = found["datasets"], found["blind"], figures(folder)
    assert trained["eval_chrf"] == [pytest.approx(scores["score"]["value"])]
    for view in ("shown", "blank", "swapped"):
        assert trained[f"eval_loss_{view}"] == [pytest.approx(blind["losses"][view]["value"], rel=1e-4)], view
