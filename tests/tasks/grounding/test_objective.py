"""``--task grounding``: masks are learned from a frozen model's attention, however samples are laid out and shared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from qwenvl.cli.inference_args import AskArguments, open_asking_encoder
from qwenvl.data.dataset import open_tables
from qwenvl.data.sources.registry import load_registry, parse_dataset_use
from qwenvl.tasks.files import WEIGHTS_FILE
from qwenvl.tasks.grounding.metrics import compare_masks, mask_metrics
from qwenvl.tasks.grounding.predict import open_grounder
from qwenvl.tasks.grounding.unet import MaskUNet
from qwenvl.train.train_qwen import main
from tests.e2e.runs import (
    flags,
    history,
    logged_losses,
    losses_alone,
    open_trainer,
    read_annotations,
    run_on_two_ranks,
    weights,
)
from tests.e2e.runs import train as train_here
from tests.tasks.grounding.sam import save_tiny_sam

SEED = 42
TASK: dict[str, Any] = {
    "task": "grounding",
    "dataset_use": "scenes",
    "tune_mm_vision": None,
    "tune_mm_mlp": None,
    "tune_mm_llm": None,
    "seed": SEED,
    "mask_channels": 4,
    "mask_resolution": 12,
    # Plain gradient descent: Adam divides by the gradient's size, and makes much of rounding where it is nearly zero.
    "optim": "sgd",
    "learning_rate": 0.05,
    "weight_decay": 0,
}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset_use": "held_out"}
_WORDS = "a the red blue box here there is and see one".split()


def _scene(folder: Path, number: int, images: int, phrases: int) -> dict[str, Any]:
    """Pictures of any size with a rectangle each, and an answer that names them among other words."""
    generator = np.random.default_rng(number)
    record: dict[str, Any] = {"id": f"scene-{number}", "image": [], "masks": []}
    answer = ""
    for place in range(phrases):
        image = place % images
        answer += " ".join(generator.choice(_WORDS, generator.integers(1, 6))) + f" thing{place} "
        height, width = (int(side) for side in np.random.default_rng([number, image]).integers(40, 110, 2))
        top, left = int(generator.integers(0, height // 2)), int(generator.integers(0, width // 2))
        corners = [left, top, left + 18, top, left + 18, top + 15, left, top + 15]
        record["masks"].append({"phrase": f"thing{place}", "image": image, "segmentation": [corners]})
        if place < images:
            pixels = np.random.default_rng([number, image]).integers(0, 256, (height, width, 3), dtype=np.uint8)
            pixels[top : top + 15, left : left + 18] = 255
            Image.fromarray(pixels).save(folder / f"{number}-{image}.png")
            record["image"].append(f"{number}-{image}.png")
    question = "<image>" * images + "What is here?"
    record["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return record


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a registry with ``scenes``, of one or two pictures and one to three masks each, and ``held_out``."""
    folder = tmp_path_factory.mktemp("scenes")
    kinds = [(1, 1), (2, 3), (1, 2), (1, 1), (2, 2), (1, 3), (1, 1), (1, 2), (2, 2)]
    sets = {
        "scenes": [_scene(folder, number, *kind) for number, kind in enumerate(kinds)],
        "held_out": [_scene(folder, 100 + number, *kind) for number, kind in enumerate(kinds[:4])],
    }
    for name, records in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    entries = {name: {"annotation_path": str(folder / f"{name}.json"), "data_path": str(folder)} for name in sets}
    (folder / "registry.py").write_text(f"data_dict = {entries!r}\n")
    return folder / "registry.py"


@pytest.fixture
def train(tiny_checkpoint: Callable[[str], Path], scenes: Path, tmp_path: Path) -> Callable[..., Path]:
    """Function of a name and settings that trains masks, and returns the folder."""

    def run(name: str, family: str = "qwen3_vl", **settings: Any) -> Path:
        return train_here(tiny_checkpoint(family), tmp_path / name, scenes, **{**TASK, **settings})

    return run


def _head(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS_FILE)


def _difference(one: Path, other: Path) -> float:
    left, right = _head(one), _head(other)
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def test_masks_do_not_depend_on_how_samples_are_laid_out(train, tiny_checkpoint) -> None:
    """Padded, in one row, in packs, or accumulated: the same head; the model itself stays as it was, bit for bit."""
    padded = train("padded", per_device_train_batch_size=4)
    flattened = train("flattened", per_device_train_batch_size=4, data_flatten=True)
    accumulated = train("accumulated", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for other in (flattened, accumulated):
        assert history(other) == pytest.approx(history(padded), rel=1e-5)
        assert _difference(padded, other) < 1e-5
    start = MaskUNet(json.loads((padded / "task.json").read_text())["maps"], channels=4, seed=SEED).state_dict()
    assert max(float((_head(padded)[f"unet.{name}"] - value).abs().max()) for name, value in start.items()) > 1e-3
    model = {name: value for name, value in weights(padded).items() if name not in _head(padded)}
    before = weights(tiny_checkpoint("qwen3_vl"))
    assert model.keys() == before.keys()
    assert all(model[name].equal(before[name]) for name in before)


@pytest.mark.parametrize(
    "layout",
    [
        {"per_device_train_batch_size": 9},
        {"per_device_train_batch_size": 3, "data_flatten": True, "gradient_accumulation_steps": 3},
        {"data_packing": True, "model_max_length": 256, "gradient_accumulation_steps": 9},
    ],
    ids=["padded", "flattened", "packed"],
)
def test_the_losses_of_samples_are_those_of_their_phrases_alone(
    layout: dict[str, Any], train, tiny_checkpoint, scenes, tmp_path
) -> None:
    single = {**TASK, "per_device_train_batch_size": 1}
    alone = losses_alone(open_trainer(tiny_checkpoint("qwen3_vl"), tmp_path / "alone", scenes, **single))
    assert [phrases for _, phrases in (alone[line] for line in sorted(alone))] == [1, 3, 2, 1, 2, 3, 1, 2, 2]
    found = logged_losses(train("run", **layout, max_steps=1, log_sample_losses=True))
    assert found.keys() == alone.keys()
    for line, expected in alone.items():
        assert found[line] == pytest.approx(expected, rel=1e-4), line


@pytest.mark.parametrize("with_sam", [False, True], ids=["coarse", "sam"])
def test_a_folder_opened_by_one_call_finds_the_masks_that_training_evaluated(
    with_sam: bool, train, scenes, tmp_path
) -> None:
    sam = save_tiny_sam(tmp_path / "tiny-sam") if with_sam else None
    settings = {"mask_resolution": 64, "learning_rate": 0.01}  # as good as untrained: masks are not empty
    folder = train("run", **EVALUATION, **settings, max_pixels="96*96", sam_model_name_or_path=sam)
    if sam:
        shutil.rmtree(sam)
    AutoModelForImageTextToText.from_pretrained(folder)
    encoder = open_asking_encoder(AskArguments(model_name_or_path=str(folder), dataset_use="d", max_pixels=96 * 96))
    grounder = open_grounder(str(folder), device="cpu")
    assert grounder.readout is not None
    assert (grounder.readout.refiner is not None) == with_sam
    reader = grounder.mask_reader(encoder)
    records, phrases = [], []
    (table,) = open_tables(parse_dataset_use("held_out", load_registry(str(scenes))), 0)
    for row in range(4):
        (sample,) = table.table[row]
        plan = encoder.plans(sample)[0]
        regions = reader.read(sample, plan)
        places, sizes = [region.place for region in regions], [region.mask.size for region in regions]
        found = grounder.masks(encoder.encode([plan], sample)[0], places, sizes)
        phrases += [place.phrase for place in places]
        records += [compare_masks(mask, region.mask.pixels()) for mask, region in zip(found, regions, strict=True)]
    named = [mask["phrase"] for record in read_annotations(scenes, "held_out") for mask in record["masks"]]
    assert phrases == named
    assert sum(record.union - record.area for record in records), "the head finds nothing: figures would say nothing"
    for name, value in mask_metrics(records).items():
        assert history(folder, f"eval_{name}")[-1] == pytest.approx(value, rel=1e-6), name
    assert history(folder, "eval_phrases") == [len(records)]


def test_a_stopped_run_goes_on_to_the_same_head(train, tmp_path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch"}
    whole = train("whole", **settings)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = train("resumed", **settings, resume_from_checkpoint=True)
    assert all(value.equal(_head(resumed)[name]) for name, value in _head(whole).items())
    assert _difference(whole / "checkpoint-2", whole) > 0


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"])
def test_every_family_learns_masks(family, train) -> None:
    folder = train("run", family, max_steps=2, mask_channels=2)
    assert len(history(folder)) == 2
    layers = json.loads((folder / "config.json").read_text())["text_config"]
    full = layers.get("layer_types", ["full_attention"] * layers["num_hidden_layers"]).count("full_attention")
    assert json.loads((folder / "task.json").read_text())["maps"] == full * layers["num_attention_heads"]


def test_half_precision_learns_the_same_but_for_rounding(train, tmp_path) -> None:
    settings = {"sam_model_name_or_path": save_tiny_sam(tmp_path / "tiny-sam"), "max_steps": 2}
    exact, rounded = train("exact", **settings), train("rounded", **settings, bf16=True)
    assert history(rounded) == pytest.approx(history(exact), rel=0.02)
    assert {value.dtype for value in _head(rounded).values()} == {torch.float32}


def test_a_dry_run_measures_masks_too(train, capsys, caplog, tmp_path) -> None:
    sam = save_tiny_sam(tmp_path / "tiny-sam")
    caplog.set_level("INFO", "qwenvl")
    train("dry", dry_run=True, sam_model_name_or_path=sam)
    assert not (tmp_path / "dry" / "task.json").exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"tune_mm_mlp": True},
            "--task grounding reads the attention of a frozen model, and --tune_mm_mlp",
        ),
        ({"lora_enable": True}, "and --lora_enable would train it"),
        ({"attn_implementation": "eager"}, "--attn_implementation eager does not show what --task grounding reads"),
        ({"deepspeed": "configs/zero3.json"}, "--task grounding with ZeRO-3: ranks would have to gather"),
        ({"mask_resolution": 4}, "--mask_resolution must be 8 or more"),
        ({"sam_model_name_or_path": "qwen3_vl"}, "holds no SAM that transformers opens: it is a qwen3_vl"),
        ({"dataset_use": "pictures"}, "'masks' is None: --task grounding needs a list of one or more masks"),
    ],
)
def test_mistakes_end_with_one_message(settings, expected, fail, registry, scenes, tiny_checkpoint, tmp_path) -> None:
    known = registry if "dataset_use" in settings else scenes
    if settings.get("sam_model_name_or_path") == "qwen3_vl":
        settings = {"sam_model_name_or_path": tiny_checkpoint("qwen3_vl")}
    assert expected in fail(flags(tiny_checkpoint("qwen3_vl"), tmp_path, known, **{**TASK, **settings}))


ENGINES = {"ddp": "DDP", "zero2": "ZeRO-2"}


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(train, scenes, tiny_checkpoint, tmp_path) -> None:
    """Nine samples: in the last step of an epoch a rank has fewer, or none."""
    settings = {"per_device_train_batch_size": 1, "max_steps": 4, "data_flatten": True, **EVALUATION}
    settings["sam_model_name_or_path"] = save_tiny_sam(tmp_path / "tiny-sam")
    alone = train("alone", **settings, gradient_accumulation_steps=4)
    commands = {
        name: flags(
            tiny_checkpoint("qwen3_vl"),
            tmp_path / name,
            scenes,
            **{**TASK, **settings, "gradient_accumulation_steps": 2},
            **({"deepspeed": "configs/zero2.json"} if name == "zero2" else {}),
        )
        for name in ENGINES
    }
    for name, folder in run_on_two_ranks(tmp_path, commands, ENGINES).items():
        assert history(folder) == pytest.approx(history(alone), rel=1e-4), name
        assert _difference(folder, alone) < 2e-5, name
        assert history(folder, "eval_miou") == pytest.approx(history(alone, "eval_miou"), abs=1e-3), name


def test_the_whole_way_is_in_the_help(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--sam_model_name_or_path" in capsys.readouterr().out
