"""Mistakes of users: each is one message that says what, where, why and what to do, and a non-zero exit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwenvl.train.train_qwen import main
from tests.data.media.video.test_decode import make_video
from tests.e2e.runs import ERROR, flags

GOOD = {
    "id": "good",
    "image": "good.jpg",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}],
}


def sample(question: str = "What?", **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Noise."}]
    return {"id": "bad-7", "conversations": turns, **fields}


class Place:
    """A folder of media, a model, and a registry whose dataset ``set`` holds what a test writes."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.output = folder, model, folder / "output"
        self.registry, self.annotations = folder / "registry.py", folder / "set.jsonl"
        generator = np.random.default_rng(0)
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "good.jpg")
        (folder / "cut.jpg").write_bytes((folder / "good.jpg").read_bytes()[:1500])
        (folder / "empty.jpg").touch()
        Image.new("RGB", (3000, 10)).save(folder / "wide.png")
        make_video(folder / "one.mp4", frames=1)
        entry = {"annotation_path": str(self.annotations), "data_path": str(folder)}
        self.registry.write_text(f"data_dict = {{'set': {entry!r}}}")
        self.write(GOOD, GOOD)

    def write(self, *records: Any) -> None:
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        self.annotations.write_text("".join(line + "\n" for line in lines))

    def flags(self, **settings: Any) -> list[str]:
        merged = {"dataset_use": "set", "model_max_length": 512, "max_steps": 2, **settings}
        return flags(merged.pop("model", self.model), merged.pop("output", self.output), self.registry, **merged)


@pytest.fixture
def place(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Place:
    return Place(tmp_path, tiny_checkpoint("qwen3_vl"))


@pytest.fixture
def copy(place: Place) -> Path:
    """A copy of the model that may be broken."""
    return Path(shutil.copytree(place.model, place.folder / "copy"))


def says(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


def test_a_good_sample_trains(place: Place) -> None:
    """What the other tests take away from is right in itself."""
    assert main(place.flags(max_steps=1)) == 0


BAD_SAMPLES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "too many tags": (sample("<image><image>?", image=["good.jpg"]), ("2 <image> tags", "1 image", "take tags out")),
    "too few tags": (sample("What?", image="good.jpg"), ("0 <image> tags", "1 image", "Put <image> where")),
    "missing file": (sample("<image>", image="no.jpg"), ("{folder}/no.jpg does not exist",)),
    "truncated JPEG": (sample("<image>", image="cut.jpg"), ("{folder}/cut.jpg", "cut off")),
    "zero-byte file": (sample("<image>", image="empty.jpg"), ("{folder}/empty.jpg", "0 bytes")),
    "extreme ratio": (sample("<image>", image="wide.png"), ("3000 x 10 pixels", "more than 200 times", "Crop it")),
    "one-frame video": (sample("<video>", video="one.mp4"), ("1 frame", "at least 2", "as `image`")),
    "no answer": (sample(conversations=[{"from": "human", "value": "Hi"}]), ("no assistant turn", "Add the answer")),
    "broken JSON": ('{"id": "bad-7", "conv', ("broken JSON at column 17", "ends there")),
    "reserved token": (sample("<|image_pad|>"), ("turn 1 (user) holds <|image_pad|>", "Write <image>")),
    "unknown role": (sample(conversations=[{"from": "bot", "value": "Hi"}]), ("turn 1 is from 'bot'", "human")),
}


IN_WORKERS = ("truncated JPEG", "no answer", "broken JSON")  # one of each stage shows how errors travel


@pytest.mark.parametrize(("case", "workers"), [(case, 0) for case in BAD_SAMPLES] + [(case, 2) for case in IN_WORKERS])
def test_bad_samples(place: Place, fail: Callable[[list[str]], str], case: str, workers: int) -> None:
    """One in the middle of the file, met by training itself, in this process or in a worker of the loader."""
    bad, parts = BAD_SAMPLES[case]
    place.write(GOOD, "", bad, GOOD)
    message = fail(place.flags(dataloader_num_workers=workers, per_device_train_batch_size=3))
    identifier = "" if case == "broken JSON" else " (id 'bad-7')"
    says(message, f"dataset 'set', {place.annotations}:3{identifier}: ", "--on_bad_sample skip")
    says(message, *(part.format(folder=place.folder) for part in parts))


def test_a_bad_sample_that_comes_first_stops_the_run_before_the_model_loads(
    place: Place, copy: Path, fail: Callable[[list[str]], str]
) -> None:
    place.write(sample("<image>", image="no.jpg"), GOOD)
    (copy / "model.safetensors").unlink()
    says(fail(place.flags(model=copy)), "no.jpg does not exist")


def test_bad_samples_of_evaluation(place: Place, fail: Callable[[list[str]], str]) -> None:
    other = {"annotation_path": str(place.folder / "held.jsonl"), "data_path": str(place.folder)}
    (place.folder / "held.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(sample("<image>", image="no.jpg")))
    text = place.registry.read_text()
    place.registry.write_text(f"{text}\ndata_dict['held'] = {other!r}")
    evaluating = {"eval_dataset_use": "held", "eval_strategy": "steps", "eval_steps": 1}
    message = fail(place.flags(**evaluating))
    says(message, "dataset 'held'", "held.jsonl:2", "no.jpg does not exist")
    (place.folder / "held.jsonl").write_text(json.dumps(sample("<image>", image="no.jpg")))
    message = fail(place.flags(**evaluating, on_bad_sample="skip"))  # a loss of 0 would pass for the best one
    says(message, "None of the 1 evaluation rows", "held.jsonl:1", "no.jpg")
    message = fail(place.flags(**{**evaluating, "eval_dataset_use": "hold"}))
    says(message, "'hold' of --eval_dataset_use", "Did you mean 'held'?")
    place.write(GOOD)
    says(fail(place.flags(eval_ratio=0.5, eval_strategy="steps")), "--eval_ratio", "dataset 'set'", "one row")


def test_datasets(place: Place, fail: Callable[[list[str]], str]) -> None:
    says(
        fail(place.flags(dataset_use="sat")), "'sat'", str(place.registry), "Did you mean 'set'?", "--dataset_registry"
    )
    place.write(GOOD, '{"id": 3,')
    says(fail(place.flags()), "'set'", f"{place.annotations}: line 2: broken JSON at column")
    place.annotations.unlink()
    says(fail(place.flags()), "'set'", str(place.registry), f"{place.annotations} does not exist")
    place.registry.unlink()
    says(fail(place.flags()), "--dataset_registry", f"{place.registry}", "Correct the path")


def test_a_length_that_no_sample_fits(place: Place, fail: Callable[[list[str]], str]) -> None:
    message = fail(place.flags(model_max_length=8))
    says(
        message,
        "None of the 2 training rows",
        f"{place.annotations}:1 (id 'good')",
        "more than --model_max_length 8. Raise it",
    )


def test_no_sample_can_be_used(place: Place, fail: Callable[[list[str]], str]) -> None:
    place.write(sample("<image>", image="no.jpg"), sample("<image>", image="empty.jpg"))
    says(
        fail(place.flags(on_bad_sample="skip")),
        "None of the 2 training rows",
        f"{place.annotations}:1 (id 'bad-7')",
        "no.jpg",
    )


def test_a_length_that_is_an_error(place: Place, fail: Callable[[list[str]], str]) -> None:
    long = sample(conversations=[{"from": "human", "value": "word " * 600}, {"from": "gpt", "value": "Yes."}])
    place.write(GOOD, long)
    message = fail(place.flags(overlength="error", model_max_length=64))
    says(message, f"{place.annotations}:2 (id 'bad-7')", "tokens, more than --model_max_length 64", "--overlength drop")


PROCESSOR_FILES = ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (PROCESSOR_FILES, ("cannot open its processor", "Copy the files", "tokenizer*")),
        (("processor_config.json",), ("cannot open its processor", "Copy the files")),
        (("tokenizer.json", "tokenizer_config.json"), ("its tokenizer is missing", "Copy the files")),
        (("chat_template.jinja",), ("no chat template", "chat_template.jinja")),
        (("model.safetensors",), ("weights could not be loaded", "model.safetensors")),
        (("config.json",), ("no config.json", "Point at the folder")),
    ],
)
def test_incomplete_models(
    place: Place, copy: Path, fail: Callable[[list[str]], str], files: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    for file in files:
        (copy / file).unlink()
    says(fail(place.flags(model=copy)), *parts)


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    for path, value in changes.items():
        *parents, name = path.split("__")
        target = content
        for parent in parents:
            target = target[parent]
        target[name] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "changes", "parts"),
    [
        ("config.json", {"image_token_id": 5}, ("<|image_pad|>", "expects 5", "belong to another model")),
        (
            "processor_config.json",
            {"video_processor__patch_size": 14},
            ("video_processor has patch_size 14", "config.json 16", "belong to another model"),
        ),
        ("config.json", {"model_type": "llava"}, ("'llava'", "qwen3_vl_moe", "--model_name_or_path")),
    ],
)
def test_files_of_another_model(
    place: Place,
    copy: Path,
    fail: Callable[[list[str]], str],
    file: str,
    changes: dict[str, Any],
    parts: tuple[str, ...],
) -> None:
    edit(copy / file, **changes)
    says(fail(place.flags(model=copy)), *parts)


def test_models_that_are_not_there(place: Place, copy: Path, fail: Callable[[list[str]], str]) -> None:
    says(fail(place.flags(model=place.folder / "none")), f"{place.folder}/none", "no such folder")
    (copy / "config.json").write_text("{")
    says(fail(place.flags(model=copy)), f"{copy}/config.json", "not a valid JSON file")
    content = (place.model / "model.safetensors").read_bytes()
    shutil.copy(place.model / "config.json", copy)
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    says(fail(place.flags(model=copy)), str(copy), "weights could not be loaded")


def test_a_language_model_with_a_switch_passed_over(place: Place, copy: Path, fail: Callable[[list[str]], str]) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["attn_logit_softcapping"] = 50.0
    (copy / "config.json").write_text(json.dumps(config))
    says(fail(place.flags(model=copy)), "attn_logit_softcapping 50.0", "Use a language model without it")


def test_settings(place: Place, fail: Callable[[list[str]], str]) -> None:
    says(
        fail(place.flags(tune_mm_vision=False, tune_mm_mlp=False, tune_mm_llm=False)),
        "nothing would be trained",
        "--tune_mm_llm",
    )
    says(fail([*place.flags(), "--learning_rat", "3"]), "--learning_rat.", "Did you mean 'learning_rate'")
    recipe = place.folder / "recipe.yaml"
    recipe.write_text("learning_rat: 3\n")
    says(fail([str(recipe)]), f"recipe {recipe}: learning_rat", "Did you mean 'learning_rate'")
    (place.folder / "file").touch()  # a folder under a file cannot be made, by root neither
    output = place.folder / "file" / "output"
    says(fail(place.flags(output=output)), f"--output_dir {output}", "cannot be written to", "Choose another")
    says(fail(place.flags(deepspeed="configs/zero2.json")), "--deepspeed needs a launcher", "torchrun")
    says(fail(place.flags(fsdp=True)), "--fsdp needs a launcher", "torchrun")
    output = Path("/proc/output")  # where the system says that there is no such folder
    says(fail(place.flags(output=output)), f"--output_dir {output}", "cannot be written to", "Choose another")


def test_debug_shows_the_traceback(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*place.flags(dataset_use="sat"), "--debug"]) == 1
    error = capsys.readouterr().err
    assert len(ERROR.findall(error)) == 1
    assert "Traceback (most recent call last)" in error
    assert "in parse_dataset_use" in error


def test_what_nobody_expected_keeps_its_traceback(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise TypeError("a surprise")

    monkeypatch.setattr("qwenvl.train.run.build_trainer", fail)
    with pytest.raises(TypeError, match="a surprise"):
        main(place.flags())


def test_earlier_checkpoints_survive(place: Place, fail: Callable[[list[str]], str]) -> None:
    place.write(*[GOOD] * 9, sample("<image>", image="cut.jpg"))
    message = fail(place.flags(max_steps=10, per_device_train_batch_size=1, save_strategy="steps", save_steps=1))
    says(message, "cut.jpg")
    checkpoints = sorted(path.name for path in place.output.glob("checkpoint-*"))
    assert checkpoints, "the bad sample came first: choose another seed"
    for name in checkpoints:
        assert (place.output / name / "model.safetensors").exists()
        assert "global_step" in json.loads((place.output / name / "trainer_state.json").read_text())
    shutil.copy(place.folder / "good.jpg", place.folder / "cut.jpg")
    assert main(place.flags(max_steps=10, per_device_train_batch_size=1)) == 0  # and the run goes on from there


def test_an_auxiliary_loss_of_experts_that_are_not_there(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(tiny_checkpoint("qwen3_vl"), tmp_path, registry, router_aux_loss_coef=0.001)) == 1
    assert "qwen3_vl has no experts" in capsys.readouterr().err
