"""What the README shows is run as it is printed, on tiny checkpoints and small data."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwenvl.cli.check_image.command import main as check_image
from qwenvl.cli.evaluate.command import main as evaluate
from qwenvl.cli.pack_data import main as pack_data
from qwenvl.cli.predict.command import main as predict
from qwenvl.cli.show_sample import main as show_sample
from qwenvl.cli.view_data.command import main as view_data
from qwenvl.config import parse_arguments
from qwenvl.data.conversation.messages import build_conversation
from qwenvl.data.sources.registry import load_registry, parse_dataset_use
from qwenvl.data.types import Sample
from qwenvl.utils.errors import Origin

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

TOOL_FLAGS = ("all", "base", "help", "decode", "format", "image", "prompt", "metric")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(start: str) -> list[str]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in text.splitlines()]
    found = [line for line in lines if start in line]
    assert found, f"the README has no command with {start!r}"
    return found


@pytest.fixture
def apples(tmp_path: Path) -> Path:
    """A registry with the README's own datasets and example row; returns its file."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (80, 60), "red").save(tmp_path / "images" / "001.jpg")
    (tmp_path / "train.jsonl").write_text(json.dumps(json.loads(blocks("json")[0])) + "\n")
    source = blocks("python")[0]
    for name in ("/data/apples/train.jsonl", "/data/charts/a.json", "/data/charts/b*.jsonl"):
        source = source.replace(name, str(tmp_path / "train.jsonl"))
    source = source.replace("/data/charts/images", str(tmp_path)).replace('"/data/apples"', repr(str(tmp_path)))
    registry = tmp_path / "my_registry.py"
    registry.write_text(source)
    return registry


def test_the_registry_and_the_example_row_are_read(apples: Path) -> None:
    registry = load_registry(str(apples))
    specs = parse_dataset_use(re.findall(r'--dataset_use "([^"]+)"', README)[0], registry)
    assert [(spec.name, spec.sampling_percent) for spec in specs] == [("apples", 100.0), ("charts", 12.5)]
    sample = Sample(Origin("apples", "README.md", 1), json.loads(blocks("json")[0]))
    assert len(build_conversation(sample, ()).messages) == 2


def test_inline_forms_of_records_are_read() -> None:
    flat = re.sub(r"\s+", " ", README)
    messages = re.search(r'`("messages": \[.*?\}\]\}\])`', flat)
    frames = re.search(r'`("video": \[\{"frames".*?\}\])`', flat)
    assert messages is not None
    assert frames is not None
    turn = json.loads("{" + messages[1] + "}")["messages"]
    record: dict[str, Any] = {"messages": [*turn, {"role": "assistant", "content": "Yes."}]}
    assert len(build_conversation(Sample(Origin("d", "f", 1), record), ()).media()) == 2
    record = json.loads("{" + frames[1] + "}")
    record["conversations"] = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "Yes."}]
    (video,) = build_conversation(Sample(Origin("d", "f", 1), record), ()).media()
    assert video.source == ("f1.jpg", "f2.jpg")


def test_show_sample(apples: Path, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = commands("show_sample.py")
    flags = shlex.split(command)[2:]
    flags[flags.index("--model_name_or_path") + 1] = str(tiny_checkpoint("qwen3_vl"))
    assert show_sample([*flags, "--dataset_registry", str(apples)]) == 0
    assert "A red apple on a wooden table" in capsys.readouterr().out


def test_view_data(apples: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (command,) = commands("view_data.py")
    flags = shlex.split(command)[2:]
    flags[flags.index("--model_name_or_path") + 1] = str(tiny_checkpoint("qwen3_vl"))
    flags[flags.index("--output") + 1] = str(tmp_path / "site")
    assert view_data([*flags, "--dataset_registry", str(apples), "--data_cache_dir", str(tmp_path / "cache")]) == 0
    assert "a red apple on a wooden table" in (tmp_path / "site" / "data" / "texts_0.js").read_text()


def test_predict_and_evaluate(
    apples: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (*commands("tools/predict.py"), *commands("tools/evaluate.py")):
        flags = shlex.split(command.partition(".py ")[2])
        if "--model_name_or_path" in flags:
            flags[flags.index("--model_name_or_path") + 1] = str(tiny_checkpoint("qwen3_vl"))
            flags += ["--dataset_registry", str(apples), "--max_pixels", "64*64", "--min_pixels", "32*32"]
        assert (predict if "predict.py" in command else evaluate)(flags) == 0
    assert (tmp_path / "answers.jsonl").exists() and (tmp_path / "evaluation" / "evaluation.html").exists()


def test_check_image_and_pack_data(
    apples: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where they write
    for name, tool in (("check_image.py", check_image), ("pack_data.py", pack_data)):
        flags = shlex.split(commands(name)[0])[2:]
        flags[flags.index("--model_name_or_path") + 1] = str(tiny_checkpoint("qwen3_vl"))
        assert tool([*flags, "--dataset_registry", str(apples)]) == 0
    for name in ("apples_problems.jsonl", "apples_valid.jsonl", "apples_plan.parquet", "apples_plan.json"):
        assert name in README and (tmp_path / name).exists()


@pytest.mark.parametrize("command", [*commands("scripts/sft_"), *commands("scripts/launch.sh")])
def test_launchers_give_valid_flags(command: str) -> None:
    environment = {**os.environ, "DRY_RUN": "1", "PYTHON": "python"}
    shown = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    words = shlex.split(shown.stdout)
    parsed = parse_arguments(
        _on_a_cpu(words[next(i for i, w in enumerate(words) if w.endswith("train_qwen.py")) + 1 :])
    )
    assert parsed.data.dataset_use == "apples"


def test_torchrun_line_has_valid_flags() -> None:
    (command,) = commands("torchrun --nproc_per_node=8 qwenvl")
    words = shlex.split(command)
    assert (REPOSITORY / words[2]).is_file()
    assert parse_arguments(_on_a_cpu(words[3:])).data.dataset_use == "apples"


def test_a_checkpoint_opens_as_shown(tiny_checkpoint: Callable[..., Path]) -> None:
    source = next(block for block in blocks("python") if "from_pretrained" in block)
    scope: dict[str, Any] = {}
    exec(source.replace("output/apples", str(tiny_checkpoint("qwen3_vl"))), scope)
    assert scope["model"].config.model_type == "qwen3_vl"
    assert scope["processor"].tokenizer is not None


def test_named_files_and_flags_exist() -> None:
    for path in re.findall(r"`((?:scripts|configs|tools|tests|qwenvl)/[\w./]+)`", README):
        assert (REPOSITORY / path).exists(), path
    known = set(parse_arguments.__globals__["all_settings"]())
    for flag in re.findall(r"`--(\w+)", README):
        assert flag in known or flag in TOOL_FLAGS, flag
    table = README.split("| flag | meaning |")[1].split("\n\n")[0]
    for row in re.findall(r"^\| (`\w+`.*?) \|", table, flags=re.MULTILINE):
        for flag in re.findall(r"`(\w+)`", row):
            assert flag in known, flag


def _on_a_cpu(flags: list[str]) -> list[str]:
    """DeepSpeed and bf16 flags are checked on a machine without a GPU like any other."""
    return [*flags, "--report_to", "none"]
