"""What is saved of heads, what opens it, what reaches them, and what is said of labels that cannot be used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from qwenvl.cli.check_image.command import main as check_image
from qwenvl.cli.evaluate.command import main as evaluate
from qwenvl.cli.predict.command import main as predict
from qwenvl.tasks import files as task_files
from qwenvl.tasks.heads.head import HeadSpec, TaskHead
from qwenvl.tasks.heads.predict import open_task_model
from qwenvl.train import verify_export as exporting
from qwenvl.train.export import verify_process as export_check
from tests.e2e.labelled import CLASSES, FROZEN, SETTINGS, TASKS
from tests.e2e.runs import (
    LORA,
    equal_bits,
    flags,
    history,
    train,
)

FRONT = {**SETTINGS, "optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 2}


def _predict(folder: Path, registry: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    data = ["--dataset_use", "held_out", "--dataset_registry", str(registry), "--output", str(output)]
    assert predict(["--model_name_or_path", str(folder), *data, "--batch_size", "3", *more]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_the_saved_folder_predicts_what_the_evaluation_of_training_did(
    task: str,
    tiny_checkpoint: Callable[[str], Path],
    labelled: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Padded on the left by the stock processor, where training flattens; without an evaluation but that at the end."""
    registry = labelled(task)
    settings = {**FRONT, "task": task, **TASKS[task], "eval_dataset_use": "held_out", "data_flatten": True}
    settings |= LORA if task == "regression" else {}
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings)
    (loss,) = history(folder, "eval_loss")
    assert loss > 0 and history(folder, "eval_labelled_samples") == [7]
    capsys.readouterr()
    lines = _predict(folder, registry, tmp_path / "labels.jsonl")
    assert len(lines) == 7 and all(line["prediction"] and line["expected"] for line in lines)
    printed = capsys.readouterr().out
    found = {line.split(":")[0]: float(line.split(":")[1]) for line in printed.splitlines() if ": " in line[:24]}
    state = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logged = next(line for line in state if "eval_loss" in line)
    names = [
        name for name in logged if name.startswith("eval_") and name.removeprefix("eval_").replace("_", " ") in found
    ]
    assert len(names) >= 2
    for name in names:
        wanted = logged[name]
        shown = found[name.removeprefix("eval_").replace("_", " ")]
        assert shown == pytest.approx(wanted, rel=1e-3, nan_ok=True), name
    assert evaluate(["--predictions", str(tmp_path / "labels.jsonl"), "--output", str(tmp_path / "evaluation")]) == 0
    report = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert set(report["labels"]["held_out"]) == {name.removeprefix("eval_") for name in names}


@pytest.fixture
def fresh_process_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Verify folders in this process: importing everything anew takes seconds."""

    def check(arguments: Sequence[str]) -> dict[str, Any]:
        capsys.readouterr()
        assert export_check.main(arguments) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    monkeypatch.setattr(exporting, "_run_fresh", check)


@pytest.mark.usefixtures("fresh_process_here")
def test_one_call_opens_a_verified_folder_and_labels_pictures(
    tiny_checkpoint: Callable[[str], Path],
    labelled: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {**FRONT, "task": "classification", "verify_export": True}
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", labelled("classification"), **settings)
    assert "Verified:" in caplog.text
    model = open_task_model(str(folder), device="cpu")
    pictures = [Image.new("RGB", size, "grey") for size in ((64, 64), (64, 32))]
    questions = [
        [{"role": "user", "content": [{"type": "image", "image": one}, {"type": "text", "text": "How bright?" * n}]}]
        for n, one in enumerate(pictures, start=1)
    ]
    together = model.predict(questions)
    for one, question in zip(together, questions, strict=True):
        (alone,) = model.predict([question])
        assert one["label"] in CLASSES and sum(one["probabilities"].values()) == pytest.approx(1)
        assert one["probabilities"] == pytest.approx(alone["probabilities"], rel=1e-5)


@pytest.mark.usefixtures("fresh_process_here")
def test_a_saved_head_that_is_not_that_of_training_ends_the_run(
    tiny_checkpoint: Callable[[str], Path],
    labelled: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[list[str]], str],
) -> None:
    def spoiled(model: Any) -> dict[str, Any]:
        return {name: tensor + 0.1 for name, tensor in collect(model).items()}

    collect = task_files.collect
    monkeypatch.setattr(task_files, "collect", spoiled)
    settings = {**FRONT, "task": "classification", "verify_export": True}
    arguments = flags(tiny_checkpoint("qwen3_vl"), tmp_path / "run", labelled("classification"), **settings)
    assert re.search(r"tensors are not those of training: task_head\.", fail(arguments))


def test_the_answer_does_not_reach_the_head_unless_it_is_to_be_rated(
    tiny_checkpoint: Callable[[str], Path], labelled: Callable[[str], Path], tmp_path: Path
) -> None:
    """Samples whose answers say the label train to the same bits as samples without answers."""
    registry, model = labelled("classification"), tiny_checkpoint("qwen3_vl")
    rows = json.loads((registry.parent / "classification-samples.json").read_text())
    for answer in (None, "dark", "light"):
        changed = [
            {
                **row,
                "conversations": row["conversations"][:1] + [{"from": "gpt", "value": answer}] * (answer is not None),
            }
            for row in rows
        ]
        (registry.parent / f"{answer}.json").write_text(json.dumps(changed))
    names = {
        str(answer): {"annotation_path": str(registry.parent / f"{answer}.json"), "data_path": str(registry.parent)}
        for answer in (None, "dark", "light")
    }
    (tmp_path / "r.py").write_text(f"data_dict = {names!r}\n")
    settings = {**FRONT, "task": "classification", **FROZEN}
    del settings["dataset_use"]
    plain = {name: train(model, tmp_path / name, tmp_path / "r.py", **settings, dataset_use=name) for name in names}
    assert equal_bits(plain["None"], plain["dark"]) and equal_bits(plain["dark"], plain["light"])
    rated = [
        train(model, tmp_path / f"rated {name}", tmp_path / "r.py", **settings, dataset_use=name, keep_answer=True)
        for name in ("dark", "light")
    ]
    assert not equal_bits(*rated)


@pytest.mark.parametrize("task", TASKS)
def test_a_dry_run_counts_what_a_head_takes(
    task: str,
    tiny_checkpoint: Callable[[str], Path],
    labelled: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {**FRONT, **FROZEN, "task": task, **TASKS[task], "dry_run": True}
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", labelled(task), **settings)
    assert "Dry run; nothing was trained" in caplog.text and not list(folder.iterdir())


def test_hidden_states_are_those_that_transformers_numbers(tiny_checkpoint: Callable[[str], Path]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint("qwen2_5_vl")).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    language = model.model.language_model
    with torch.no_grad():
        stock = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        for layer in range(-len(stock), len(stock)):
            head = TaskHead(HeadSpec("regression", stock[0].shape[-1], 1, "last_non_pad", hidden_layer=layer))
            handles = head.watch(language)
            head.start({})
            found = head(language(ids, use_cache=False), {"rows": torch.tensor([3]), "lengths": (1,)})
            torch.testing.assert_close(found, head.scores(stock[layer][0, 3:]))
            for handle in handles:
                handle.remove()


MISTAKES: dict[str, tuple[str, Any, str]] = {
    "missing": ("classification", None, "has no 'label', which --task classification needs"),
    "a list": ("classification", ["dark"], "a class is a name or a whole number"),
    "no list": ("multilabel", "dark", "takes a list of names"),
    "no number": ("regression", "7", "a finite number is needed"),
    "of another length": ("regression", [1.0], "it has 1 numbers, and earlier ones have 2"),
    "all equal": ("ranking", [1, 1], "not all equal"),
    "too few": ("ranking", [1, 2, 3, 4], "4 relevances for "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_label_that_cannot_be_used_is_one_message_with_its_line(
    name: str,
    tiny_checkpoint: Callable[[str], Path],
    labelled: Callable[[str], Path],
    tmp_path: Path,
    fail: Callable[[list[str]], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    task, label, message = MISTAKES[name]
    registry = labelled(task)
    rows = json.loads((registry.parent / f"{task}-samples.json").read_text())
    rows[4]["label"] = label
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(rows))
    (tmp_path / "r.py").write_text(
        f"data_dict = {{'bad': {{'annotation_path': {str(bad)!r}, 'data_path': {str(registry.parent)!r}}}}}"
    )
    settings = {**FRONT, "task": task, "dataset_use": "bad", "max_steps": 6}
    run = tmp_path / "run"
    for more in ({}, {"dry_run": True}):
        said = fail(flags(tiny_checkpoint("qwen3_vl"), run, tmp_path / "r.py", **settings, **more))
        assert message in said and f"dataset 'bad', {bad}:5 (id '4')" in said and "--on_bad_sample skip" in said
    folder = train(tiny_checkpoint("qwen3_vl"), run, tmp_path / "r.py", **settings, on_bad_sample="skip")
    (line,) = set((folder / "bad_samples.jsonl").read_text().splitlines())
    assert json.loads(line)["line"] == 5
    check = [
        "--dataset_use",
        "bad",
        "--dataset_registry",
        str(tmp_path / "r.py"),
        "--output",
        str(tmp_path),
        "--workers",
        "0",
    ]
    capsys.readouterr()
    wrong = check_image([*check, "--task", task, "--workers", "0"])
    if name != "of another length":  # which is wrong beside others alone
        assert wrong == 1 and "bad_problems.jsonl" in capsys.readouterr().out


def test_settings_that_do_not_fit_are_refused(
    tiny_checkpoint: Callable[[str], Path],
    labelled: Callable[[str], Path],
    tmp_path: Path,
    fail: Callable[[list[str]], str],
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("dark\ngrey\n")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"task": "classification", "class_names": names}, "'light' is not one of the classes (dark, grey)"),
        ({"task": "classification", "class_weights": "drak=2"}, "Did you mean 'dark'"),
        ({"task": "classification", "class_weights": "dark"}, "write balanced, or name=weight"),
        ({"task": "classification", "hidden_layer": 9}, "the model has"),
        ({"task": "regression", "task_loss": "bce"}, "which has mse or huber"),
        ({"task": "ranking", "class_names": names}, "has no classes"),
        ({"task": "classification", "overlength": "truncate_turns"}, "Use drop or error"),
        ({"task": "classification", **LORA, "hidden_layer": 1}, "whose adapters would never train"),
    ]
    for settings, message in cases:
        registry = labelled(settings["task"])
        said = fail(flags(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **{**FRONT, **settings}))
        assert message in said, settings
