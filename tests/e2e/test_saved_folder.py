"""What a run leaves behind: folders that stock transformers opens and that see what training saw."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from qwenvl.config import parse_arguments
from qwenvl.data.encoding.encoded import EncodedSample
from qwenvl.data.media.video.decode import choose_backend
from qwenvl.families import get_family
from qwenvl.train.build.data import open_data
from qwenvl.train.train_qwen import main
from tests.e2e.runs import equal_bits, flags, read_annotations, train, weights
from tests.patches import grids_of, patches_of

RUN: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "video_fps": 1.5}
FAMILIES = ["qwen2_5_vl", "qwen3_vl"]  # one of each kind of processor


@dataclass(frozen=True)
class Trained:
    """A finished run: its family, the checkpoint it started from, its output folder and its command line."""

    family: str
    checkpoint: Path
    folder: Path
    command: list[str]


@pytest.fixture(scope="module", params=FAMILIES)
def trained(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    """A run of three steps with a checkpoint after the second."""
    checkpoint, output = tiny_checkpoint(request.param), tmp_path_factory.mktemp("saved") / "run"
    train(checkpoint, output, registry, **RUN)
    return Trained(request.param, checkpoint, output, flags(checkpoint, output, registry, **RUN))


def _json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("name", ["", "checkpoint-2"])
def test_folder_holds_what_the_checkpoint_held_and_the_records(trained: Trained, name: str) -> None:
    folder = trained.folder / name
    files = {path.name for path in folder.iterdir()}
    assert {path.name for path in trained.checkpoint.iterdir()} <= files
    assert {"training_args.yaml", "versions.json", "original_processor_limits.json", "trainer_state.json"} <= files
    assert not [file for file in files if file.endswith(".bin") and "model" in file]
    assert (folder / "chat_template.jinja").read_bytes() == (trained.checkpoint / "chat_template.jinja").read_bytes()
    assert {"torch", "transformers", "accelerate", "python", "qwenvl"} <= _json(folder / "versions.json").keys()
    _, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert weights(folder).keys() == weights(trained.checkpoint).keys()


@pytest.mark.parametrize("name", ["", "checkpoint-2"])
def test_configs_stay_as_they_were(trained: Trained, name: str) -> None:
    for file in ("generation_config.json", "tokenizer.json"):
        assert _json(trained.folder / name / file) == _json(trained.checkpoint / file), file
    configs = [AutoConfig.from_pretrained(path).to_dict() for path in (trained.folder / name, trained.checkpoint)]
    assert configs[0] == configs[1] | {"_name_or_path": configs[0]["_name_or_path"]}
    saved, original = (_json(path / "tokenizer_config.json") for path in (trained.folder / name, trained.checkpoint))
    assert saved.pop("additional_special_tokens") == original.pop("extra_special_tokens")  # the name both versions read
    assert saved.items() >= original.items()  # transformers notes there besides how the tokenizer was found


@pytest.mark.parametrize("name", ["", "checkpoint-2"])
def test_a_folder_has_the_names_of_transformers_4_too(trained: Trained, name: str) -> None:
    """As published checkpoints; tests/clients opens such folders with transformers 4.57."""
    folder = trained.folder / name
    config, processor = _json(folder / "config.json"), _json(folder / "processor_config.json")
    rope = config["text_config"]["rope_parameters"]
    assert config["text_config"]["rope_theta"] == rope.pop("rope_theta")
    assert config["text_config"]["rope_scaling"] == rope
    assert config["vision_config"]["model_type"] == trained.family
    for part, file in (("image", "preprocessor_config.json"), ("video", "video_preprocessor_config.json")):
        own = _json(folder / file)
        assert own.pop("processor_class") == processor["processor_class"]
        assert own == processor[f"{part}_processor"]
    template = (folder / "chat_template.jinja").read_text()
    bare = folder / "chat_template_videos.jinja"
    assert bare.is_file() == (trained.family == "qwen3_vl")
    if bare.is_file():
        marked = "<|vision_start|><|video_pad|><|vision_end|>"
        assert template.count(marked) == 1
        assert bare.read_text() == template.replace(marked, "<|video_pad|>")


def test_config_is_kept_that_differs_from_the_tokenizer(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """transformers' Trainer would write the tokenizer's special tokens over both files."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("qwen3_vl"), checkpoint)
    config = _json(checkpoint / "config.json")
    config["text_config"] |= {"eos_token_id": 3, "pad_token_id": 5}
    (checkpoint / "config.json").write_text(json.dumps(config))
    generation = _json(checkpoint / "generation_config.json") | {"pad_token_id": 5, "eos_token_id": [7, 3]}
    (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    folder = train(checkpoint, tmp_path / "out", registry, max_steps=1, dataset_use="text")
    saved = _json(folder / "config.json")
    assert saved["text_config"].items() >= config["text_config"].items()
    assert {key: saved[key] for key in config if not key.endswith("_config")} == {
        key: config[key] for key in config if not key.endswith("_config")
    }
    assert _json(folder / "generation_config.json") == generation


def test_state_holds_the_log(trained: Trained) -> None:
    state = _json(trained.folder / "trainer_state.json")
    assert state["global_step"] == 3
    lines = [line for line in state["log_history"] if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["tokens_per_second"] > 0 and line["samples_per_second"] > 0 for line in lines)


@pytest.mark.parametrize("name", ["", "checkpoint-2"])
def test_recipe_in_the_folder_repeats_the_job(trained: Trained, name: str, tmp_path: Path) -> None:
    recipe = trained.folder / name / "training_args.yaml"
    assert main([str(recipe), "--output_dir", str(tmp_path / "repeated")]) == 0
    assert equal_bits(tmp_path / "repeated", trained.folder)
    assert (tmp_path / "repeated" / "checkpoint-2").is_dir()


def test_limits_are_those_of_training_and_the_old_ones_are_recorded(trained: Trained) -> None:
    before, after = (AutoProcessor.from_pretrained(path) for path in (trained.checkpoint, trained.folder))
    assert dict(after.image_processor.size)["longest_edge"] == 64 * 64
    assert dict(after.image_processor.size)["shortest_edge"] == 32 * 32
    video = after.video_processor
    assert (video.fps, video.min_frames, video.max_frames) == (1.5, 2, 4)
    record = _json(trained.folder / "original_processor_limits.json")
    for part in ("image_processor", "video_processor"):
        for name, value in record[part].items():
            held = getattr(getattr(before, part), name, None)
            assert value == (held if name != "size" else {k: v for k, v in dict(held).items() if v is not None})


def test_the_saved_processor_is_the_checkpoints_but_for_the_limits(trained: Trained) -> None:
    """Clients that give it sampled frames rely on what the published one does with them."""
    limits = {"size", "fps", "min_frames", "max_frames", "cap_pixels_per_frame", "max_video_tokens"}
    for part in ("image_processor", "video_processor"):
        before, after = (
            AutoProcessor.from_pretrained(folder).to_dict()[part] for folder in (trained.checkpoint, trained.folder)
        )
        assert {key: before[key] for key in before if key not in limits} == {
            key: after[key] for key in after if key not in limits
        }
    video = AutoProcessor.from_pretrained(trained.folder).video_processor
    assert video.do_sample_frames is (trained.family == "qwen3_vl")


def test_original_limits_are_kept_on_request(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("qwen3_vl")
    settings = {"max_steps": 1, "dataset_use": "text", "save_processor_limits": "original"}
    folder = train(checkpoint, tmp_path, registry, **settings)
    assert _json(folder / "processor_config.json") == _json(checkpoint / "processor_config.json")


def _encoded(trained: Trained) -> list[EncodedSample]:
    """Return what training fed to the model, sample by sample in the order of the file."""
    parsed = parse_arguments(trained.command)
    config = AutoConfig.from_pretrained(trained.checkpoint)
    data = open_data(parsed, get_family(trained.family), config)
    return [data.train[index].samples[0] for index in range(len(data.train))]


def _stock(folder: Path, record: dict[str, Any], media: Path) -> dict[str, Any]:
    """Return what the saved folder makes of a record with stock transformers alone.

    Only the decoding of videos is not transformers' own, which needs FFmpeg: it gets all frames, and samples them.
    """
    question, answer = (turn["value"] for turn in record["conversations"])
    kinds = {"<image>": "image", "<video>": "video"}
    content = [
        {"type": kinds[line]} if line in kinds else {"type": "text", "text": line} for line in question.split("\n")
    ]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    files: dict[str, Any] = {}
    if "image" in record:
        files["images"] = [str(media / name) for name in record["image"]]
    if "video" in record:
        backend, paths = choose_backend(), [str(media / name) for name in record["video"]]
        headers = [backend.header(path) for path in paths]
        counts = [np.arange(header.num_frames) for header in headers]
        files["videos"] = [backend.frames(path, count) for path, count in zip(paths, counts, strict=True)]
        files["video_metadata"] = [VideoMetadata(total_num_frames=h.num_frames, fps=h.fps) for h in headers]
        files["do_sample_frames"] = True  # as the model card has it
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(messages, tokenize=False)
    return dict(processor(text=[text], return_tensors="pt", **files))


def test_saved_processor_makes_of_pictures_what_training_was_fed(trained: Trained, registry: Path) -> None:
    records, samples = read_annotations(registry, "mixed"), _encoded(trained)
    pictures = [n for n, record in enumerate(records) if "image" in record and "video" not in record]
    assert len(pictures) > 3
    for number in pictures:
        stock = _stock(trained.folder, records[number], registry.parent)
        assert stock["input_ids"][0].tolist() == samples[number].tokens.input_ids.tolist()
        assert stock["image_grid_thw"].tolist() == grids_of(samples[number])
        assert torch.equal(stock["pixel_values"], patches_of(samples[number], trained.folder))


def test_saved_processor_makes_of_videos_what_training_was_fed(trained: Trained, registry: Path) -> None:
    """The same frames, sizes and timestamps.

    For Qwen3-VL transformers 5.23 leaves the chat template's ``<|vision_start|>`` and ``<|vision_end|>`` standing
    around those of the frames; training does not. That is compared without the outer pair.
    """
    records, samples = read_annotations(registry, "mixed"), _encoded(trained)
    videos = [n for n, record in enumerate(records) if "video" in record and "image" not in record]
    assert len(videos) > 1
    for number in videos:
        stock = _stock(trained.folder, records[number], registry.parent)
        assert stock["video_grid_thw"].tolist() == grids_of(samples[number])
        assert torch.equal(stock["pixel_values_videos"], patches_of(samples[number], trained.folder))
        ids = stock["input_ids"][0].numpy()
        if trained.family == "qwen3_vl":
            config = AutoConfig.from_pretrained(trained.folder)
            before, after = np.roll(ids, 1), np.roll(ids, -1)
            outer_start = (ids == config.vision_start_token_id) & (after != config.video_token_id)
            outer_end = (ids == config.vision_end_token_id) & (before != config.video_token_id)
            ids = ids[~(outer_start | outer_end)]
        assert ids.tolist() == samples[number].tokens.input_ids.tolist()
