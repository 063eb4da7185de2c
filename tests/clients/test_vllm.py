"""Saved folders in a real vLLM on the CPU, started with the command that ``check_serving`` prints.

Prompts have the ids of training, those of images, and of clips longer than the frame limits, among them; the
log-probabilities of what it answers are the trainer's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qwenvl.cli.check_serving import main
from tests.clients.reference import log_probabilities, open_float32, rows_of
from tests.clients.vllm_server import ask, printed_command, serving
from tests.e2e.runs import LORA

pytestmark = pytest.mark.slow

Compare = Callable[..., str]


@pytest.fixture
def compare(vllm: Path, registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    """Return a function of a folder and a dataset that holds them against vLLM; returns what the tool printed."""

    def function(folder: Path, dataset: str, *, prompts_alone: bool = False) -> str:
        data = ["--dataset_registry", str(registry), "--dataset_use", dataset]
        capsys.readouterr()
        assert main(["--model_name_or_path", str(folder), *data]) == 0
        printed = capsys.readouterr().out
        model, rows = open_float32(folder), list(rows_of(folder, *data))
        with serving(vllm, printed_command(printed), tmp_path / "vllm.log") as address:
            assert main(["--model_name_or_path", str(folder), *data, "--server", address]) == 0
            said = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  server ")]
            assert [words[:4] for words in said] == [["server", "prompt", "ids", "equal"]] * len(rows), said
            name = "adapter" if (folder / "adapter_config.json").is_file() else str(folder)
            for row in () if prompts_alone else rows:
                answer = ask(address, name, row.messages(), row.arguments())
                assert answer["prompt"] == row.inputs().input_ids.tolist(), row.name
                own = log_probabilities(model, row, answer["answer"])
                assert answer["logprobs"] == pytest.approx(own, abs=1e-4), row.name
        return printed

    return function


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_whole_models(family: str, trained: Callable[..., Path], compare: Compare) -> None:
    compare(trained(family), "mixed")


def test_linear_attention(trained: Callable[..., Path], compare: Compare) -> None:
    """Prompts alone: vLLM computes it on the CPU with heads of 32 and more, and a tiny model has 16."""
    compare(trained("qwen3_5"), "mixed", prompts_alone=True)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_adapters_with_other_limits_than_their_base(
    family: str, trained: Callable[..., Path], compare: Compare
) -> None:
    # A server cannot be told the budget that the frames of a clip of Qwen2.5-VL share: here their own limit counts.
    frame = "64*64" if family == "qwen2_5_vl" else None
    printed = compare(trained(family, **LORA, learning_rate=5e-3, video_max_frame_pixels=frame), "mixed")
    assert "pixels that the frames of a clip share" not in printed
    assert "--mm-processor-kwargs" in printed and "--enable-lora" in printed


YARN: dict[str, object] = {"rope_scaling": "yarn", "rope_factor": 4, "rope_native_length": 64, "model_max_length": 256}


@pytest.mark.parametrize(("family", "settings"), [("qwen2_5_vl", {}), ("qwen3_vl", LORA)])
def test_extended_contexts(
    family: str, settings: dict[str, object], trained: Callable[..., Path], compare: Compare
) -> None:
    """A whole Qwen2.5-VL, whose frequencies vLLM computes with another length, and adapters on a base without YaRN."""
    assert "--hf-overrides" in compare(trained(family, **settings, **YARN), "mixed")
