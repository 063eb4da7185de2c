"""The README.md of a finished model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from tests.e2e.runs import history, train


def test_card_says_what_was_trained_on_and_how(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    asked = {"max_steps": 2, "eval_ratio": 0.2, "eval_strategy": "steps", "eval_steps": 2, "hub_token": "secret-word"}
    bad = tmp_path / "run" / "README.md"
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **asked, model_max_length=150)
    text = bad.read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "image-text-to-text"
    assert "base_model" not in front  # a folder is no name on the hub
    assert ModelCard.load(bad).data.tags == ["qwenvl", "sft"]
    assert "| mixed | 9 | training |" in text and "| mixed | 2 | evaluation |" in text
    assert f"| training loss, last log line | {history(folder)[-1]:.4g} |" in text
    assert f"| evaluation loss | {history(folder, 'eval_loss')[-1]:.4g} |" in text
    assert "resizes images to 1,024 to 4,096 pixels, and takes 2 to 4 frames of a video" in text
    assert "--learning_rate 0.001" in text and "transformers 5." in text
    assert f'from_pretrained("{folder}")' in text
    assert "secret-word" not in text


def test_left_out_samples_are_on_the_card(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path, registry, max_steps=6, model_max_length=80)
    assert "left out: longer than --model_max_length" in (folder / "README.md").read_text()


def test_a_readme_of_a_person_stays(tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path) -> None:
    train(tiny_checkpoint("qwen3_vl"), tmp_path, registry, max_steps=1, dataset_use="text")
    first = (tmp_path / "README.md").read_text()
    train(tiny_checkpoint("qwen3_vl"), tmp_path, registry, max_steps=1, dataset_use="pictures")
    assert "| pictures |" in (tmp_path / "README.md").read_text() != first
    (tmp_path / "README.md").write_text("# Mine\n")
    train(tiny_checkpoint("qwen3_vl"), tmp_path, registry, max_steps=1, dataset_use="text")
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
