"""What README and docs show is run as it is printed, on tiny checkpoints and small data; what they name exists."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoConfig

from qwenvl.cli.check_image.command import main as check_image
from qwenvl.cli.check_serving import main as check_serving
from qwenvl.cli.evaluate.command import main as evaluate
from qwenvl.cli.pack_data import main as pack_data
from qwenvl.cli.predict.command import main as predict
from qwenvl.cli.show_sample import main as show_sample
from qwenvl.cli.view_data.command import main as view_data
from qwenvl.config import DataArguments, parse_arguments
from qwenvl.config.parsing.parser import all_settings
from qwenvl.data.conversation.messages import build_conversation
from qwenvl.data.encoding.processor import build_encoder, open_processor, with_training_limits
from qwenvl.data.encoding.tokenization import IGNORE_INDEX
from qwenvl.data.sources.registry import load_registry, parse_dataset_use
from qwenvl.data.types import Sample
from qwenvl.families import get_family
from qwenvl.utils.errors import Origin
from scripts.flags_page import page as flags_page
from tests.serving.chat_server import StockModel, listening

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")))
PAGES = {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
TOOL_FLAGS = (
    *("all", "base", "bind", "blind", "decode", "duplicates", "format", "help", "image", "json"),
    *("max_difference", "metric", "nproc_per_node", "prompt", "requests", "samples", "server", "write_clean"),
    *("gpus", "host_memory", "machine", "mfu", "model", "processor", "reserve", "step_tokens", "tokens"),  # advise.py
    *("gguf_type", "llama_cpp", "llama_python"),  # export.py
    *("minutes", "output", "part", "rehearse"),  # benchmarks/gpu.py
    *("data", "decisions", "drop", "limit", "percent", "sample_losses"),  # rank_samples.py
)
DATA = PAGES["docs/data.md"]
EVERYTHING = "\n".join(PAGES.values())


def blocks(language: str, text: str = EVERYTHING) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def all_commands() -> list[str]:
    """Commands of all pages, each once, without comments."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [re.sub(r"\s+", " ", line.split("  #")[0]).strip() for line in text.splitlines()]
    return [line for line in dict.fromkeys(lines) if line]


def commands(start: str) -> list[str]:
    found = [line for line in all_commands() if start in line]
    assert found, f"no page has a command with {start!r}"
    return found


@pytest.fixture
def apples(tmp_path: Path) -> Path:
    """A registry with the pages' own datasets and example row; returns its file."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (80, 60), "red").save(tmp_path / "images" / "001.jpg")
    (tmp_path / "train.jsonl").write_text(json.dumps(json.loads(blocks("json", DATA)[0])) + "\n")
    source = blocks("python", DATA)[0]
    for name in ("/data/apples/train.jsonl", "/data/charts/a.json", "/data/charts/b*.jsonl"):
        source = source.replace(name, str(tmp_path / "train.jsonl"))
    source = source.replace("/data/charts/images", str(tmp_path)).replace('"/data/apples"', repr(str(tmp_path)))
    registry = tmp_path / "my_registry.py"
    registry.write_text(source)
    return registry


def test_the_registry_and_the_example_row_are_read(apples: Path) -> None:
    registry = load_registry(str(apples))
    specs = parse_dataset_use(re.findall(r'--dataset_use "([^"]+)"', DATA)[0], registry)
    assert [(spec.name, spec.sampling_percent) for spec in specs] == [("apples", 100.0), ("charts", 12.5)]
    sample = Sample(Origin("apples", "README.md", 1), json.loads(blocks("json", DATA)[0]))
    assert len(build_conversation(sample, ()).messages) == 2


def test_the_readme_shows_the_row_of_the_data_page_and_a_registry_that_is_read(tmp_path: Path) -> None:
    assert blocks("json", PAGES["README.md"]) == blocks("json", DATA)[:1]
    source = blocks("python", PAGES["README.md"])[0].replace("/data/apples", str(tmp_path))
    (tmp_path / "train.jsonl").write_text(json.dumps(json.loads(blocks("json", DATA)[0])) + "\n")
    (tmp_path / "my_registry.py").write_text(source)
    (spec,) = parse_dataset_use("apples", load_registry(str(tmp_path / "my_registry.py")))
    assert spec.annotation_paths == (str(tmp_path / "train.jsonl"),)


def test_inline_forms_of_records_are_read() -> None:
    flat = re.sub(r"\s+", " ", DATA)
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


def test_the_sample_of_the_architecture_page_has_its_tensors(
    apples: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    Image.new("RGB", (640, 480), "red").save(tmp_path / "images" / "001.jpg")
    lines = tmp_path / "shown.jsonl"
    flags = ["--dataset_use", "apples", "--model_name_or_path", str(tiny_checkpoint("qwen3_vl")), "--all"]
    show_sample([*flags, "--json", str(lines), "--dataset_registry", str(apples)])
    shown = json.loads(lines.read_text().splitlines()[0])
    length, trained = len(shown["labels"]), sum(label != IGNORE_INDEX for label in shown["labels"])
    (grid,) = shown["image_grid_thw"]
    page = PAGES["docs/architecture.md"]
    assert f"`labels` int64 [{length}] with {trained} trained tokens" in page
    assert f"grid {tuple(grid)} in patches, {math.prod(grid) // 4} tokens" in page
    assert f"patches {shown['pixel_values']['shape']} (" in page


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
    folder = tiny_checkpoint("qwen3_vl")
    with listening([str(folder)], StockModel(folder).answer) as url:
        for command in (*commands("tools/predict.py"), *commands("tools/evaluate.py")):
            flags = shlex.split(command.partition(".py ")[2])
            if "--model_name_or_path" in flags:
                flags[flags.index("--model_name_or_path") + 1] = str(folder)
                flags += ["--dataset_registry", str(apples)]
            if "--server" in flags:
                flags[flags.index("--server") + 1] = url
                flags[flags.index("--output") + 1] += "-served"
            elif "--model_name_or_path" in flags:
                flags += ["--max_pixels", "64*64", "--min_pixels", "32*32"]
            assert (predict if "predict.py" in command else evaluate)(flags) == 0
    assert (tmp_path / "answers.jsonl").exists() and (tmp_path / "evaluation" / "evaluation.html").exists()


def test_check_serving(
    apples: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(tiny_checkpoint("qwen3_vl"), trained)
    config, processor = AutoConfig.from_pretrained(trained), open_processor(str(trained))
    encoder = build_encoder(processor, config, get_family("qwen3_vl"), DataArguments(), 100)
    with_training_limits(processor, encoder.settings).save_pretrained(trained)  # as training does
    (command,) = commands("check_serving.py")
    flags = shlex.split(command)[2:]
    flags[flags.index("--model_name_or_path") + 1] = str(trained)
    assert check_serving([*flags, "--dataset_registry", str(apples)]) == 0
    assert "vllm serve" in capsys.readouterr().out


def test_check_image_and_pack_data(
    apples: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where they write
    for name, tool in (("check_image.py", check_image), ("pack_data.py", pack_data)):
        flags = shlex.split(commands(name)[0])[2:]
        flags[flags.index("--model_name_or_path") + 1] = str(tiny_checkpoint("qwen3_vl"))
        assert tool([*flags, "--dataset_registry", str(apples)]) == 0
    for name in ("apples_problems.jsonl", "apples_valid.jsonl", "apples_plan.parquet", "apples_plan.json"):
        assert name in PAGES["docs/looking.md"] and (tmp_path / name).exists()


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


def test_every_command_has_flags_that_its_tool_knows() -> None:
    for command in all_commands():
        called = re.search(r"tools/(\w+)\.py(.*)", command)
        if called is None:
            continue
        text = help_of(called[1])
        for flag in re.findall(r" (--\w+)", called[2]):
            assert re.search(rf"{flag}\b", text), f"{called[1]} has no {flag}: {command}"


def help_of(tool: str) -> str:
    """Help page of a command."""
    folder = (REPOSITORY / "qwenvl" / "cli" / tool).is_dir()
    module = importlib.import_module(f"qwenvl.cli.{tool}.command" if folder else f"qwenvl.cli.{tool}")
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert not ended.value.code
    return shown.getvalue()


def test_scripts_of_commands_exist() -> None:
    for command in all_commands():
        for path in re.findall(r"(?:^|\s)((?:scripts|configs|tools|tests|qwenvl)/[\w./-]+)", command):
            assert (REPOSITORY / path).exists(), command


@pytest.mark.parametrize("name", PAGES)
def test_imports_of_python_blocks_work(name: str) -> None:
    for block in blocks("python", PAGES[name]):
        exec("\n".join(re.findall(r"^(?:from|import) .+$", block, flags=re.MULTILINE)), {})


@pytest.mark.parametrize("name", PAGES)
def test_named_files_and_flags_exist(name: str) -> None:
    text = PAGES[name]
    for path in re.findall(r"`((?:scripts|configs|tools|tests|qwenvl|docs|benchmarks)/[\w./]+)`", text):
        assert (REPOSITORY / path).exists(), path
    known = set(all_settings())
    for flag in re.findall(r"`--(\w+)", text):
        assert flag in known or flag in TOOL_FLAGS, flag
    for table in text.split("| flag | meaning |")[1:]:
        for row in re.findall(r"^\| (`\w+`.*?) \|", table.split("\n\n")[0], flags=re.MULTILINE):
            for flag in re.findall(r"`(\w+)`", row):
                assert flag in known, flag


@pytest.mark.parametrize("name", [*PAGES, "README.zh-CN.md", "CONTRIBUTING.md", "AGENTS.md", "benchmarks/README.md"])
def test_links_lead_somewhere(name: str) -> None:
    path = REPOSITORY / name
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        file, _, place = link.partition("#")
        if "://" in link:
            continue
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not place or place in anchors(target), link


def anchors(page: Path) -> set[str]:
    """Names under which the headings of a page are linked to, on a code host and on the site."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/\w+\.md)", PAGES["README.md"]))
    linked |= {f"docs/{name}" for name in re.findall(r"\]\((models/\w+\.md)", PAGES["docs/models.md"])}
    assert linked == PAGES.keys() - {"README.md"}


def test_the_chinese_readme_has_the_same_commands() -> None:
    chinese = (REPOSITORY / "README.zh-CN.md").read_text(encoding="utf-8")
    for language in ("bash", "json", "python"):
        shown, translated = (blocks(language, text) for text in (PAGES["README.md"], chinese))
        assert [without_comments(one) for one in shown] == [without_comments(one) for one in translated]


def without_comments(block: str) -> list[str]:
    return [re.split(r"\s+#", line)[0] for line in block.splitlines()]


def test_the_page_of_flags_is_current() -> None:
    assert flags_page() == PAGES["docs/flags.md"], "run python scripts/flags_page.py > docs/flags.md"


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "qwenvl").rglob("*.py")))
    source = re.sub(r"""["']\s*\n\s*f?["']""", "", source)  # texts that go on in the next line
    own = PAGES["docs/troubleshooting.md"].split("## From libraries")[0]
    messages = re.findall(r"^### `(.+)`$", own, flags=re.MULTILINE)
    assert len(messages) > 15
    for message in messages:
        for part in filter(None, (part.strip() for part in message.split("..."))):
            assert part in source, part


def _on_a_cpu(flags: list[str]) -> list[str]:
    """DeepSpeed and bf16 flags are checked on a machine without a GPU like any other."""
    return [*flags, "--report_to", "none"]
