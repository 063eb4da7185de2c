"""What is wrong with a finished folder is found, in float32 and in bfloat16, and what rounding does is not."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwenvl.cli.make_tiny_checkpoint.command import build_tiny_checkpoint
from qwenvl.families import FAMILIES
from qwenvl.train import verify_export as exporting
from qwenvl.train.export import verify_process as export_check
from qwenvl.utils.errors import UserError
from tests.e2e.runs import LORA, flags, train

RUN: dict[str, Any] = {"max_steps": 2, "dataset_use": "pictures,text", "bf16": True, "verify_export": True}
KINDS: dict[str, dict[str, Any]] = {
    "whole": {"save_dtype": "bfloat16"},
    "adapters": {**LORA, "tune_mm_mlp": True, "additional_tokens": "slowly"},
}


@dataclass(frozen=True)
class Told:
    """A verified folder, and what its fresh process was told.

    Args:
        folder: Of the run.
        arguments: Of the process; files are kept.
    """

    folder: Path
    arguments: tuple[str, ...]


def _train(model: Path, output: Path, registry: Path, **settings: Any) -> Told:
    """Train and verify, in this process; the run fails if it finds anything."""
    kept: list[str] = []

    def check(arguments: Sequence[str]) -> dict[str, Any]:
        files = [shutil.copy(file, output.parent / f"{output.name}-{Path(file).name}") for file in arguments[1:3]]
        kept.extend([arguments[0], *map(str, files), *arguments[3:]])
        return _said(kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "_run_fresh", check)
        return Told(train(model, output, registry, **RUN | settings), tuple(kept))


def _said(arguments: Sequence[str]) -> dict[str, Any]:
    with redirect_stdout(StringIO()) as printed:
        assert export_check.main(arguments) == 0
    said: dict[str, Any] = json.loads(printed.getvalue().splitlines()[-1])
    return said


@pytest.fixture(scope="module", params=KINDS)
def four_layers(
    request: pytest.FixtureRequest, registry: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Told]:
    """A run of a model of four layers that computes in bfloat16."""
    folder = tmp_path_factory.mktemp(request.param)
    build_tiny_checkpoint("qwen3_vl", folder / "base", size="demo")
    return request.param, _train(folder / "base", folder / "run", registry, **KINDS[request.param])


def _change(tensors: dict[str, Tensor], part: str, change: Callable[[Tensor], Tensor]) -> None:
    (name,) = [name for name in tensors if part in name]
    tensors[name] = change(tensors[name]).contiguous()


def _swap(tensors: dict[str, Tensor], one: str, other: str) -> None:
    (first,), (second,) = ([name for name in tensors if part in name] for part in (one, other))
    tensors[first], tensors[second] = tensors[second], tensors[first]


def _weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for file in folder.glob("*model*.safetensors"):  # two files where tensors of the source are carried over
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file, {"format": "pt"})

    return damage


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        adapter = folder / "adapter_config.json"
        file = adapter if adapter.is_file() else folder / "config.json"
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))

    return damage


LOST, COUNT, OTHER = "not those of training: .*", "have another scale than in training: .*", "computes something else"
BROKEN: dict[str, dict[str, tuple[Callable[[Path], None], str]]] = {
    "whole": {
        "transposed": (_weights(lambda t: _change(t, "language_model.layers.2.self_attn.q_proj", Tensor.t)), LOST),
        "no bias": (_weights(lambda t: _change(t, "blocks.1.attn.qkv.bias", torch.zeros_like)), LOST + "qkv.bias"),
        "swapped": (_weights(lambda t: _swap(t, "s.1.mlp.up_proj", "s.2.mlp.up_proj")), "2 tensors are " + LOST),
        "zeroed": (_weights(lambda t: _change(t, "s.0.input_layernorm", torch.zeros_like)), LOST + "input_layernorm"),
        "last digit": (_weights(lambda t: _change(t, "s.3.mlp.down_proj", lambda w: w * (1 + 2**-7))), LOST),
        "context": (_config(lambda c: c["text_config"].update(rope_theta=1e3)), OTHER),  # transformers reads it first
        "deepstack": (_config(lambda c: c["vision_config"].update(deepstack_visual_indexes=[2, 1, 0])), OTHER),
    },
    "adapters": {
        "alpha": (_config(lambda c: c.update(lora_alpha=9)), COUNT),
        "rslora": (_config(lambda c: c.update(use_rslora=True)), COUNT),
        "swapped": (_weights(lambda t: _swap(t, "s.1.mlp.up_proj.lora_B", "s.2.mlp.up_proj.lora_B")), LOST),
        "partly": (_weights(lambda t: [t.pop(name) for name in list(t) if ".layers.3." in name]), LOST + "layers.3"),
        "merger": (_weights(lambda t: _change(t, "visual.merger.linear_fc1.bias", torch.zeros_like)), LOST + "merger"),
        "row": (_weights(lambda t: _change(t, "trainable_tokens_delta", torch.zeros_like)), LOST + "token_adapter"),
    },
}


def test_broken_folders_are_found_in_bfloat16(four_layers: tuple[str, Told], tmp_path: Path) -> None:
    kind, told = four_layers
    for name, (damage, message) in BROKEN[kind].items():
        folder = tmp_path / name.replace(" ", "-")
        shutil.copytree(told.folder, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
        damage(folder)
        said = _said([str(folder), *told.arguments[1:]])
        with pytest.raises(UserError, match=message):
            exporting.require_same(folder, said, "bfloat16")


def test_logits_alone_find_what_matters(four_layers: tuple[str, Told], tmp_path: Path) -> None:
    """Without the checksums: whatever moves the logits further than rounding does is found by them."""
    kind, told = four_layers
    if kind == "adapters":
        pytest.skip("two steps move adapters by less than rounding; checksums are there for them")
    nothing = tmp_path / "nothing.json"
    nothing.write_text(json.dumps({"tensors": {}, "scales": {}}))
    for name in ("transposed", "swapped", "zeroed"):
        folder = tmp_path / name
        shutil.copytree(told.folder, folder)
        BROKEN[kind][name][0](folder)
        said = _said([str(folder), told.arguments[1], str(nothing), *told.arguments[3:]])
        with pytest.raises(UserError, match=OTHER):
            exporting.require_same(folder, said, "bfloat16")


PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"bf16": False},
    "bf16": {},
    "adapters": {**LORA, "model_dtype": "bfloat16"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", PRECISIONS)
def test_rounding_is_no_reason_to_stop_and_faults_in_few_rows_are(
    family: str, kind: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """Rounding stays below what is allowed, also where it sends tokens to other experts."""
    told = _train(tiny_checkpoint(family), tmp_path / "run", registry, **PRECISIONS[kind], dataset_use="mixed")
    said = _said(told.arguments)
    assert {"behind an image", "in a sample"} < {one["where"] for one in said["differences"]}
    for one in said["differences"]:
        assert one["error"] <= 1e-3 + one["multiple"] * one["noise"], one
    nothing = tmp_path / "nothing.json"
    nothing.write_text(json.dumps({"tensors": {}, "scales": {}}))
    reduced = None if kind == "float32" else "bfloat16"
    broken = _shifted(told, tmp_path / "shifted.safetensors")
    if not (FAMILIES[family].linear_attention and reduced):  # there positions matter less than rounding
        _require_notice(broken, nothing, reduced)
    if kind == "adapters":
        return
    for damage in (_other_row(told), _other_expert):
        folder = tmp_path / "damaged"
        shutil.copytree(told.folder, folder)
        _weights(damage)(folder)
        if damage is not _other_expert or FAMILIES[family].moe:
            _require_notice([str(folder), *told.arguments[1:]], nothing, reduced)
        shutil.rmtree(folder)


def _require_notice(arguments: Sequence[str], nothing: Path, reduced: str | None) -> None:
    """Check that logits alone, without checksums, show what is wrong: the run fails, or is warned."""
    said = _said([*arguments[:2], str(nothing), *arguments[3:]])
    try:
        assert not exporting.require_same(Path(arguments[0]), said, reduced)
    except UserError as error:
        assert OTHER in str(error)


def _shifted(told: Told, file: Path) -> list[str]:
    """Return the arguments for cases whose positions behind the last clip are one too high."""
    model, _ = export_check.open_model(told.folder, "float32")
    stock = getattr(model, "get_base_model", lambda: model)().model
    tensors = load_file(told.arguments[1])
    for number, case in enumerate(export_check.split_cases(tensors)):
        ids = case["input_ids"]
        clips = (ids[0] == model.config.video_token_id).nonzero()
        if len(clips):
            kinds = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
            inputs = {**case, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
            known = inspect.signature(stock.get_rope_index).parameters
            positions = case.get("position_ids")
            if positions is None:
                positions, _ = stock.get_rope_index(**{name: inputs[name] for name in known if name in inputs})
            positions[..., int(clips[-1]) + 1 :] += 1
            tensors[f"{number}.position_ids"] = positions.contiguous()
    save_file(tensors, file)
    return [told.arguments[0], str(file), *told.arguments[2:]]


def _other_row(told: Told) -> Callable[[dict[str, Tensor]], None]:
    """Return a function that changes the embedding of one token of the samples."""
    token = int(export_check.split_cases(load_file(told.arguments[1]))[0]["input_ids"][0, -6])

    def damage(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("embed_tokens.weight"):
                tensors[name][token] = tensors[name][token].roll(1).clone()

    return damage


def _other_expert(tensors: dict[str, Tensor]) -> None:
    """Change the second expert of the last layer, if there are experts."""
    names = sorted(name for name in tensors if name.endswith(("experts.down_proj", "experts.1.down_proj.weight")))
    for name in names[-1:]:
        expert = tensors[name][1] if tensors[name].dim() == 3 else tensors[name]
        expert.copy_(expert.roll(1, 0).clone())


@pytest.mark.parametrize(
    ("error", "reduced", "outcome"),
    [(0.3, "bfloat16", "same"), (0.5, "bfloat16", "doubtful"), (0.7, "bfloat16", "other"), (0.5, None, "other")]
    + [(float("inf"), "bfloat16", "other")],
)
def test_a_doubtful_difference_is_a_warning_in_half_precision(
    error: float, reduced: str | None, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    noise = 0.0 if reduced is None else 0.1
    record = {"where": "behind a clip", "error": error, "noise": noise, "multiple": 3.0}
    said = {"problems": [], "differences": [{**record, "error": 0.0}, record]}
    if outcome == "other":
        with pytest.raises(UserError, match="its logits behind a clip differ by"):
            exporting.require_same(Path("folder"), said, reduced)
    else:
        assert exporting.require_same(Path("folder"), said, reduced) == (outcome == "same")
        assert ("bfloat16 explains 0.3" in caplog.text) == (outcome == "doubtful")


def test_want_of_memory_is_not_the_folders_fault(
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fail: Callable[[list[str]], str],
) -> None:
    monkeypatch.setattr(exporting, "_run_fresh", lambda _: None)
    train(tiny_checkpoint("qwen3_vl"), tmp_path / "auto", registry, **RUN | {"verify_export": "auto"})
    assert "was saved, but not verified: there is not enough memory" in caplog.text
    message = fail(flags(tiny_checkpoint("qwen3_vl"), tmp_path / "true", registry, **RUN))
    assert "not enough memory" in message and "--verify_export auto" in message
