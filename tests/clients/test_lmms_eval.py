"""Saved folders in lmms-eval, by the line that ``check_serving`` prints, on a local task of 20 rows."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Value

from qwenvl.cli.check_serving import main as check_serving
from qwenvl.cli.predict.command import main as predict

pytestmark = [
    pytest.mark.slow,
    pytest.mark.client(
        "lmms-eval",
        kind="whole, 20 images of a local task, bfloat16",
        result="the same 20 answers",
        arguments="the line that `check_serving` prints, and `device_map=cpu`",
    ),
]

TASK = """\
task: local_rows
dataset_path: parquet
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: generate_until
doc_to_visual: !function functions.images
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 12
  until: []
process_results: !function functions.score
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """\
def images(row):
    return [row["image"].convert("RGB")]


def score(row, results):
    return {"right": float(results[0] == row["answer"])}
"""


@pytest.fixture(scope="module")
def task(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the task, whose rows are those of the dataset ``rows``."""
    folder = tmp_path_factory.mktemp("task")
    rows = json.loads(registry.with_name("rows.json").read_text())
    columns = {
        "image": [str(registry.with_name(row["image"])) for row in rows],
        "question": [row["messages"][1]["content"].removeprefix("<image>") for row in rows],
        "answer": [row["messages"][2]["content"] for row in rows],
    }
    kinds = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_dict(columns, features=kinds).to_parquet(str(folder / "rows.parquet"))
    (folder / "local_rows.yaml").write_text(TASK.format(file=folder / "rows.parquet"))
    (folder / "functions.py").write_text(FUNCTIONS)
    return folder


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_answers_are_those_of_the_trainer(
    family: str,
    lmms_eval: Path,
    trained: Callable[..., Path],
    task: Path,
    registry: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = trained(
        family, dataset_use="rows", max_steps=300 if family == "qwen3_5" else 100, learning_rate=2e-3
    )  # it knows images by heart
    model = ["--model_name_or_path", str(folder), "--dataset_registry", str(registry), "--dataset_use", "rows"]
    capsys.readouterr()
    assert check_serving(model) == 0
    (line,) = re.findall(r"^lmms-eval: (.*)", capsys.readouterr().out, re.MULTILINE)
    log = run_lmms_eval(lmms_eval, line, task, tmp_path)
    said = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, log.read_text().splitlines())}
    own = tmp_path / "own.jsonl"
    asked = ["--device", "cpu", "--dtype", "bfloat16", "--batch_size", "1", "--max_new_tokens", "12"]
    assert predict([*model, *asked, "--output", str(own)]) == 0
    answers = [json.loads(row)["prediction"].strip() for row in own.read_text().splitlines()]
    assert len(answers) == 20 and len(set(answers)) > 5
    assert [said[number] for number in range(20)] == answers


def run_lmms_eval(environment: Path, line: str, task: Path, folder: Path) -> Path:
    """Run the printed line on the CPU with the task; return its log of the samples."""
    words = shlex.split(line.replace("TASKS", "local_rows"))
    place = words.index("--model_args") + 1
    words[place] += ",device_map=cpu"
    command = [str(environment / "bin" / words[0]), *words[1:], "--include_path", str(task), "--device", "cpu"]
    command += ["--batch_size", "1", "--log_samples", "--output_path", str(folder / "out")]
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=folder)
    found = list(folder.glob("out/**/*samples*.jsonl"))
    assert len(found) == 1, (done.stdout + done.stderr)[-4000:]  # its exit code is 0 after any error
    return found[0]
