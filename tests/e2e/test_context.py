"""Training beyond the native context: YaRN's settings reach the model, the saved folder and the run that resumes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwenvl.cli.check_serving import main
from qwenvl.families import FAMILIES
from qwenvl.models.adapter_merging import open_adapted
from qwenvl.models.rope_scaling import extend_context
from qwenvl.serving.commands import Served, vllm_command
from tests.e2e.runs import LORA, equal_bits, flags, history, train
from tests.e2e.test_errors import GOOD, Place, edit, says

NATIVE = 64  # so short that the samples pass it
YARN: dict[str, Any] = {"rope_scaling": "yarn", "rope_factor": 3}
KEPT = ("rope_theta", "mrope_section", "mrope_interleaved", "partial_rotary_factor")


@pytest.fixture
def place(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Place:
    return Place(tmp_path, tiny_checkpoint("qwen3_vl"))


def text_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["text_config"]


def rewritten(checkpoint: Path, target: Path, **changes: Any) -> Path:
    """Copy a checkpoint and change its text config."""
    shutil.copytree(checkpoint, target)
    config = json.loads((target / "config.json").read_text())
    config["text_config"] |= changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def as_the_card_says(checkpoint: Path, target: Path) -> Path:
    """Extend a checkpoint by hand, as Qwen3-VL's model card has it, in the older key that hub files use."""
    original = text_config(checkpoint)["rope_parameters"]
    scaling = {name: original[name] for name in KEPT if name in original}
    scaling |= {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": NATIVE}
    folder = rewritten(checkpoint, target, rope_scaling=scaling, max_position_embeddings=3 * NATIVE)
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rotary_of(model: Any) -> Any:
    return model.model.language_model.rotary_emb


def logits(folder: Path) -> torch.Tensor:
    """Return what stock transformers computes from a folder, for text longer than the native context."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(2 * NATIVE).remainder(200).unsqueeze(0)
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_context_extended_by_flags_is_one_extended_by_hand(
    family: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    native = rewritten(tiny_checkpoint(family), tmp_path / "native", max_position_embeddings=NATIVE)
    by_hand = as_the_card_says(native, tmp_path / "by-hand")
    settings = {"max_steps": 2, "dataset_use": "text"}
    ours = train(native, tmp_path / "ours", registry, **YARN, **settings)
    theirs = train(by_hand, tmp_path / "theirs", registry, **settings)
    plain = train(native, tmp_path / "plain", registry, **settings, model_max_length=NATIVE)

    assert history(ours) == history(theirs) != history(plain)
    assert equal_bits(ours, theirs)
    assert torch.equal(logits(ours), logits(theirs))
    before, after = (text_config(folder) for folder in (native, ours))
    assert after["max_position_embeddings"] == 3 * NATIVE
    yarn = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": NATIVE}
    assert after["rope_parameters"] == before["rope_parameters"] | yarn

    model = AutoModelForImageTextToText.from_pretrained(ours)
    expected, scale = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.from_pretrained(by_hand).get_text_config())
    assert torch.equal(rotary_of(model).inv_freq, expected)
    assert rotary_of(model).attention_scaling == scale > 1.0
    assert list(rotary_of(model).mrope_section) == before["rope_parameters"]["mrope_section"]


def test_an_extended_checkpoint_is_not_extended_twice(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(rewritten(tiny_checkpoint("qwen3_vl"), tmp_path / "a"))
    for factor, length in ((3, 98304), (3, 98304), (4, 131072)):
        extend_context(config, factor)
        config.save_pretrained(tmp_path / "saved")
        config = AutoConfig.from_pretrained(tmp_path / "saved")
        rope = config.text_config.rope_parameters
        assert (rope["factor"], rope["original_max_position_embeddings"]) == (factor, 32768)
        assert config.text_config.max_position_embeddings == length
    extend_context(config, 4, native_length=16384)
    assert config.text_config.max_position_embeddings == 65536


def test_the_older_name_of_the_kind_goes(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Qwen2-VL's files say ``"type": "mrope"``, which beside ``"rope_type": "yarn"`` is a contradiction to vLLM."""
    folder = tmp_path / "hub"
    scaling = {"type": "mrope", "mrope_section": [4, 2, 2], "rope_theta": 1e6}
    config = AutoConfig.from_pretrained(rewritten(tiny_checkpoint("qwen2_vl"), folder, rope_parameters=scaling))
    assert config.text_config.rope_parameters["type"] == "mrope"
    extend_context(config, 4)
    assert "type" not in config.text_config.rope_parameters
    assert config.text_config.rope_parameters["mrope_section"] == [4, 2, 2]


def test_resuming_keeps_the_context(
    place: Place,
    fail: Callable[[list[str]], str],
    tmp_path: Path,
) -> None:
    place.write(GOOD, GOOD, GOOD)
    saving = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
    whole = train(place.model, tmp_path / "whole", place.registry, dataset_use="set", **YARN, **saving)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resume = {"dataset_use": "set", **saving}
    message = fail(flags(place.model, tmp_path / "resumed", place.registry, **resume))
    says(message, "checkpoint-2 was trained with a context of 3 x 32768 positions", "this run has the native context")
    message = fail(flags(place.model, tmp_path / "resumed", place.registry, **resume, **YARN | {"rope_factor": 2}))
    says(message, "this run has a context of 2 x 32768", "training_args.yaml")
    resumed = train(place.model, tmp_path / "resumed", place.registry, **resume, **YARN)
    assert equal_bits(whole, resumed)
    assert text_config(resumed) == text_config(whole)


def test_adapters_of_an_extended_context_are_verified_and_used_with_it(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their base has the native context: who opens it, and a server, has to be told of the other one."""
    base = rewritten(tiny_checkpoint("qwen3_vl"), tmp_path / "base", max_position_embeddings=NATIVE)
    settings = {**LORA, **YARN, "learning_rate": 0.05, "max_steps": 4, "verify_export": True}
    folder = train(base, tmp_path / "adapter", registry, dataset_use="text", **settings)
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    opened: dict[str, Any] = {}
    exec(snippet, opened)
    trained = open_adapted(str(base), str(folder), torch.float32)
    tokens = torch.arange(2 * NATIVE).remainder(200).unsqueeze(0)
    with torch.no_grad():
        found, wanted = (one.eval()(input_ids=tokens).logits for one in (opened["model"], trained))
    assert torch.equal(found, wanted)

    capsys.readouterr()
    main(["--model_name_or_path", str(folder), "--dataset_registry", str(registry), "--dataset_use", "text"])
    printed = capsys.readouterr().out
    (overrides,) = re.findall(r"--hf-overrides '(.*)'", printed)
    rope = text_config(base)["rope_parameters"] | {"rope_type": "yarn", "factor": 3.0}
    rope |= {"original_max_position_embeddings": NATIVE}
    told = {"rope_parameters": rope, "max_position_embeddings": 3 * NATIVE}
    assert json.loads(overrides) == {"text_config": told}
    assert "for SGLang and other programs, merge the adapter" in printed


@pytest.mark.parametrize(("family", "told"), [("qwen2_vl", True), ("qwen2_5_vl", True), ("qwen3_vl", False)])
def test_vllm_is_told_the_native_length_that_it_multiplies(
    family: str, told: bool, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(tiny_checkpoint(family))
    extend_context(config, 3)
    text = config.get_text_config()
    limits = {"image_processor": {"size": {}}, "video_processor": {"cap_pixels_per_frame": None}}
    served = Served("x", limits, True, told, 128, {"image": 0, "video": 0}, rope=text.rope_parameters)
    command = shlex.split(vllm_command(served).replace("\\\n", " "))
    assert ("--hf-overrides" in command) == told
    if told:
        rope = json.loads(command[command.index("--hf-overrides") + 1])["text_config"]["rope_parameters"]
        assert rope == dict(text.rope_parameters) | {"original_max_position_embeddings": 32768 // 4}


def test_samples_beyond_the_context_are_not_trained_on(
    place: Place,
    fail: Callable[[list[str]], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Positions count, not tokens: those of a picture are fewer, and each sample of a pack has its own."""
    long = {"id": "long", "conversations": [{"from": "human", "value": "word " * 30}, GOOD["conversations"][1]]}
    place.write(GOOD, long)
    model = rewritten(place.model, tmp_path / "short", max_position_embeddings=40)
    message = fail(place.flags(model=model, per_device_train_batch_size=2))
    says(message, "(id 'long'): the sample takes", "the model is made for 40", "--rope_scaling yarn --rope_factor")
    capsys.readouterr()
    train(model, place.output, place.registry, dataset_use="set", max_steps=1, on_bad_sample="skip")
    assert "--model_max_length 2048 is above the context of the model, 40 positions" in capsys.readouterr().err
    assert json.loads((place.output / "bad_samples.jsonl").read_text())["category"] == "beyond_context"
    train(model, tmp_path / "yarn", place.registry, dataset_use="set", max_steps=1, **YARN | {"rope_factor": 4})


def test_mistakes(place: Place, fail: Callable[[list[str]], str], tmp_path: Path) -> None:
    for factor in ("1", "0.5", None):
        says(fail(place.flags(rope_scaling="yarn", rope_factor=factor)), "--rope_factor above 1")
    says(fail(place.flags(rope_factor=3)), "--rope_factor has no effect without --rope_scaling yarn")
    says(fail(place.flags(rope_native_length=3)), "--rope_native_length has no effect")
    says(fail(place.flags(**YARN, rope_native_length=0)), "--rope_native_length 0 must be")
    says(fail(place.flags(rope_scaling="linear", rope_factor=2)), "rope_scaling", "yarn")
    copy = Path(shutil.copytree(place.model, tmp_path / "copy"))
    edit(copy / "config.json", text_config__rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6})
    says(fail(place.flags(model=copy, **YARN)), "rope_type 'linear'", "Leave --rope_scaling out")
