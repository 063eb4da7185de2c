"""The connector lab's tool: runs of a recipe, their results, and what it does when it is started again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qwenvl.cli.connector_lab.command import main
from qwenvl.cli.connector_lab.page import build_lab_page
from qwenvl.cli.connector_lab.recipe import read_experiments
from qwenvl.cli.connector_lab.runner import collapse_of, count_answers
from qwenvl.cli.make_demo_data.command import make_demo_data
from qwenvl.cli.make_tiny_checkpoint.parts import build_part
from qwenvl.config import parse_arguments
from qwenvl.config.parsing.recipes import read_recipe
from tests.cli.pages import Page
from tests.e2e.runs import REPOSITORY, changed, weights

TRAIN = {
    "dataset_use": "lab_captions",
    "eval_dataset_use": "lab_captions_heldout",
    "tune_mm_vision": False,
    "tune_mm_mlp": True,
    "tune_mm_llm": False,
    "num_train_epochs": 2,
    "eval_strategy": "epoch",
    "per_device_train_batch_size": 8,
    "learning_rate": 0.01,
    "data_flatten": True,
    "model_max_length": 512,
    "min_pixels": "32*32",
    "max_pixels": "32*32",
    "logging_steps": 1,
    "save_strategy": "no",
    "verify_export": False,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_num_workers": 0,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a recipe on tiny parts, two stages of one run and a run that trains nothing."""
    folder = tmp_path_factory.mktemp("lab")
    build_part("siglip", folder / "siglip")
    build_part("llama", folder / "llama")
    make_demo_data(folder / "data", kind="lab", limit=16)
    entries = {
        f"lab_{task}{suffix}": {
            "annotation_path": str(folder / "data" / f"{task}_{split}.jsonl"),
            "data_path": str(folder / "data"),
        }
        for task in ("captions", "chats")
        for split, suffix in (("train", ""), ("heldout", "_heldout"))
    }
    (folder / "registry.py").write_text(f"data_dict = {entries!r}\n")
    registry = {"dataset_registry": str(folder / "registry.py")}
    (folder / "second.yaml").write_text(yaml.safe_dump({"dataset_use": "lab_chats", "tune_mm_llm": True}))
    return {
        "encoder": str(folder / "siglip"),
        "language_model": str(folder / "llama"),
        "connector": {"num_queries": 4, "connector_heads": 2},
        "train": {**TRAIN, **registry},
        "evaluate": {"dataset_use": "lab_captions_heldout", "max_new_tokens": 4, **registry},
        "runs": {
            "stages": {"connector": "resampler", "stages": [{"learning_rate": 0.02}, str(folder / "second.yaml")]},
            "born": {"start": "stages", "connector": "mlp", "about": "Nothing is trained"},
        },
    }


def written(recipe: dict[str, Any], folder: Path) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return str(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def finished(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the recipe's results."""
    folder = tmp_path_factory.mktemp("results")
    assert main([written(recipe, folder), "--output", str(folder / "lab")]) in (0, 1)
    return folder / "lab"


def test_each_stage_starts_from_the_last_and_frozen_parts_stay(finished: Path) -> None:
    start, one, two = (finished / "stages" / name for name in ("start", "stage1", "stage2"))
    assert all(name.startswith("model.visual.merger.") for name in changed(start, one))
    assert changed(start, one)
    settings = yaml.safe_load((finished / "stages" / "stage2.yaml").read_text())
    assert settings["model_name_or_path"] == str(one)
    assert settings["learning_rate"] == TRAIN["learning_rate"]  # of all runs, not of the stage before
    assert not any(".encoder." in name for name in changed(one, two))
    first, second = weights(one), weights(two)
    moved = max(float((first[name] - second[name]).abs().max()) for name in first)
    apart = float((weights(start)["model.visual.merger.query"] - second["model.visual.merger.query"]).abs().max())
    assert 0 < moved < 0.5
    assert apart > 0


def test_a_second_stage_forgets_nothing_of_the_first(finished: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    """A stage that hardly moves leaves what the last one learned."""
    still = dict(recipe)
    stages = [recipe["runs"]["stages"]["stages"][0], {"learning_rate": 1e-9}]
    still["runs"] = {"stages": {"connector": "resampler", "stages": stages}}
    assert main([written(still, tmp_path), "--output", str(tmp_path / "lab")]) in (0, 1)
    one, two = weights(finished / "stages" / "stage1"), weights(tmp_path / "lab" / "stages" / "stage2")
    start = weights(finished / "stages" / "start")
    query = "model.visual.merger.query"
    assert float((one[query] - two[query]).abs().max()) < 1e-6 < float((start[query] - two[query]).abs().max())


def test_a_run_takes_over_the_parts_of_another_but_not_its_connector(finished: Path) -> None:
    trained, born = weights(finished / "stages" / "stage2"), weights(finished / "born" / "start")
    shared = [name for name in born if ".merger." not in name]
    assert all(torch.equal(born[name], trained[name]) for name in shared)
    assert {name for name in born if ".merger." in name} != {name for name in trained if ".merger." in name}


def test_results_say_what_trained_and_whether_it_looks(finished: Path) -> None:
    stages, born = json.loads((finished / "results.json").read_text())
    merger = sum(one.numel() for name, one in weights(finished / "stages" / "start").items() if ".merger." in name)
    assert stages["stages"][0]["trained"] | {"all": 0} == {"vision": 0, "merger": merger, "language": 0, "all": 0}
    assert stages["stages"][1]["trained"]["language"] > 0
    assert [len(stage["held_out"]) for stage in stages["stages"]] == [2, 2]
    assert (stages["tokens"], born["tokens"]) == (4, 16)
    assert born["stages"] == []
    for result in (stages, born):
        assert result["answers"]["count"] == 16
        assert set(result["blind"][0]["scores"]) == {"shown", "blank", "swapped"}
    page = (finished / "connector_lab.html").read_text()
    assert Page(page).open == []
    assert "resampler" in page or "stages" in page
    assert not [link for link in Page(page).links if not link.startswith("data:")]


def test_a_finished_run_is_skipped_and_a_changed_one_is_made_anew(
    finished: Path, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "lab")
    before = (finished / "results.json").read_text()
    changed_recipe = json.loads(json.dumps(recipe))
    path = written(changed_recipe, tmp_path)
    assert main([path, "--output", str(tmp_path / "lab")]) in (0, 1)
    output = "".join(capsys.readouterr())
    assert output.count("skipped, as it is finished already") == 2
    assert (tmp_path / "lab" / "results.json").read_text() == before
    changed_recipe["runs"]["born"]["connector"] = "mean_pool"
    assert main([written(changed_recipe, tmp_path), "--output", str(tmp_path / "lab"), "--only", "born"]) in (0, 1)
    assert "".join(capsys.readouterr()).count("skipped, as it is finished already") == 1
    results = json.loads((tmp_path / "lab" / "results.json").read_text())
    assert [result["tokens"] for result in results] == [4, 1]


def result(empty: int, different: int) -> dict[str, int]:
    return {"count": 20, "empty": empty, "different": different, "expected_different": 5}


@pytest.mark.parametrize(
    ("answers", "flag"),
    [
        (result(0, 5), ""),
        (result(1, 5), ""),
        (result(2, 5), "end before their first word"),
        (result(0, 1), "every question gets the same answer"),
    ],
)
def test_collapsed_generation_is_flagged(answers: dict[str, int], flag: str, finished: Path) -> None:
    assert (flag in collapse_of(answers)) if flag else not collapse_of(answers)
    shown = json.loads((finished / "results.json").read_text())[0] | {"answers": answers}
    assert ("generation collapses" in build_lab_page([shown])) == bool(flag)
    assert count_answers([])["count"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoderr": "x"}, "'encoderr' is not one of encoder"),
        ({"encoder": None}, "encoder is missing"),
        ({"data": "mine"}, "data is 'mine'"),
        ({"runs": {"a": {"connector": "q_former"}}}, "connector 'q_former' is not one of qformer"),
        ({"runs": {"a": {"start": "b"}}}, "start is 'b', which is not a run above it"),
        ({"runs": {"a b": {}}}, "a name becomes a folder"),
        ({"runs": {"a": {"train": {"output_dir": "x"}}}}, "leave out output_dir"),
        ({"runs": {"a": {"trains": {}}}}, "'trains' is not one of"),
        ({"encoder": "tiny:clap"}, "the parts with random weights are tiny:clip"),
        ({"encoder": "/nowhere"}, "encoder /nowhere: its config cannot be opened"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_message(
    change: dict[str, Any], message: str, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([written({**recipe, **change}, tmp_path), "--output", str(tmp_path / "lab")]) == 2
    output = "".join(capsys.readouterr())
    assert message in output
    assert "Traceback" not in output


@pytest.mark.parametrize("name", ["connectors", "stages"])
def test_the_recipes_that_come_along_can_be_read(name: str) -> None:
    experiments = read_experiments(f"configs/lab/{name}.yaml")
    for run in experiments.runs:
        for stage in run.stages:
            flags = [f"--{key}={value}" for key, value in stage.items() if value is not None]
            parse_arguments([*flags, "--model_name_or_path", "x", "--output_dir", "y"])


def test_the_three_stages_freeze_what_qwen_vl_froze() -> None:
    """Bai et al., 2023, sections 3.1 to 3.3: the language model first, nothing, then the encoder."""
    files = sorted((REPOSITORY / "configs" / "lab").glob("stage?_*.yaml"))
    switches = [[read_recipe(str(file))[f"tune_mm_{part}"] for part in ("vision", "mlp", "llm")] for file in files]
    assert switches == [[True, True, False], [True, True, True], [False, True, True]]
