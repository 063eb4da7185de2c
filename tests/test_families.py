"""Records of model families: they are found by ``model_type``, and say where the parts of a model are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from qwenvl.cli.connector_lab.build import ConnectorSettings, build_lab
from qwenvl.cli.make_tiny_checkpoint.parts import build_part
from qwenvl.families import FAMILIES, get_family, register_classes_of
from qwenvl.models.parts import decoder_layers, language_model, mergers, output_head, vision_tower
from qwenvl.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    for name in ("clip", "qwen3"):
        build_part(name, folder / name)
    build_lab(str(folder / "clip"), str(folder / "qwen3"), ConnectorSettings("mlp"), folder / "model")
    return folder / "model"


@pytest.mark.parametrize("name", [*FAMILIES, "connector_lab"])
def test_the_parts_of_every_family_are_where_its_record_says(
    name: str, tiny_checkpoint: Callable[[str], Path], lab: Path
) -> None:
    folder = tiny_checkpoint(name) if name in FAMILIES else lab
    register_classes_of(str(folder))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    layout = get_family(name).layout
    merging = {module for path, module in model.named_modules() if "merger" in path.rpartition(".")[2]}
    assert merging == set(mergers(model)), "a merger that tune_mm_mlp would not train"
    assert merging < set(vision_tower(model).modules())
    assert len(decoder_layers(model)) == model.config.get_text_config().num_hidden_layers
    assert output_head(model) is model.get_output_embeddings()
    assert model.get_submodule(layout.embeddings) is model.get_input_embeddings()
    assert model.get_submodule(layout.embeddings) in language_model(model).modules()
    assert layout.patches is None or model.get_submodule(layout.patches).stride
    holds_experts = any(f".{layout.stacked_experts}." in path for path, _ in model.named_parameters())
    assert holds_experts == get_family(name).moe


@pytest.mark.parametrize("model_type", ["llama", "utils", "data", "qwenvl", "", "..", "connector_lab.model", "no-name"])
def test_other_model_types_are_refused(model_type: str) -> None:
    with pytest.raises(UserError, match="is not one this trainer knows: qwen2_vl, qwen2_5_vl"):
        get_family(model_type)


def test_a_published_model_type_that_is_not_trained_is_refused_by_its_name() -> None:
    with pytest.raises(UserError, match=r"Qwen3.8-Flash-Next \(model_type qwen4_exp\) is not trained.*Qwen3.8-27B"):
        get_family("qwen4_exp")


def test_a_family_of_ones_own_is_imported_where_a_checkpoint_asks_for_it(
    lab: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    script = (
        "import sys, qwenvl.train.train_qwen, qwenvl.train.run\n"
        "from qwenvl.data.encoding.processor import open_processor\n"
        "from qwenvl.train.export.verify_process import main\n"
        "for folder in sys.argv[1:]:\n"
        "    found = type(open_processor(folder)).__name__\n"
        "    print(found, any('connector_lab' in name for name in sys.modules))\n"
    )
    command = [sys.executable, "-c", script, str(tiny_checkpoint("qwen3_vl")), str(lab)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["Qwen3VLProcessor False", "LabProcessor True"]
