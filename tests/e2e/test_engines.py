"""Any mixture of samples trains alike on every engine: DDP, FSDP2, ZeRO-1, -2, -3, and with offloading."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from qwenvl.data.sampler import SampleOrder, ShardedBatchSampler, Sharding
from qwenvl.train.train_qwen import main
from tests.e2e.runs import (
    LORA,
    REPOSITORY,
    changed,
    equal_bits,
    flags,
    history,
    largest_difference,
    read_annotations,
    run_on_two_ranks,
    train,
    weights,
)

FSDP2 = {"fsdp": True, "fsdp_config": "configs/fsdp2.json"}
EVALUATION = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_dataset_use": "held_out",
    "per_device_eval_batch_size": 1,
}
SAVING = {"save_strategy": "steps", "save_steps": 2}
STEPS = 4
# One process with accumulation 2, and two ranks without. All of it on samples one by one, in an order in which the
# ranks hold different kinds of samples; a large epsilon, because Adam makes much of rounding where a gradient is small.
COMMON = {"per_device_train_batch_size": 1, "max_steps": STEPS, "adam_epsilon": 1e-2, "vision_tower_lr": 9e-4}
CASES: dict[str, dict[str, Any]] = {
    "padded": {**EVALUATION, **SAVING},
    "frozen": {"tune_mm_vision": False, "gradient_checkpointing": True, "data_flatten": True, **EVALUATION},
    "checkpointing": {"gradient_checkpointing": True, "data_flatten": True},
    "packed": {"data_packing": True, "model_max_length": 128, "gradient_checkpointing": True},
    "adapters": {
        **(LORA | {"lora_target": "language,vision", "tune_mm_mlp": True, "additional_tokens": "slowly"}),
        **(EVALUATION | SAVING | {"gradient_checkpointing": True, "data_packing": True, "model_max_length": 128}),
    },
    "experts": {
        **(LORA | {"lora_target": "language,experts", "gradient_checkpointing": True, "data_flatten": True}),
        **(EVALUATION | SAVING | {"learning_rate": 1e-2, "verify_export": True}),
    },
}
# A mismatch of collective operations is named within seconds; it makes every one of them slow.
STRICT = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}


def kind(record: dict[str, Any]) -> str:
    images, videos = len(record.get("image", ())), len(record.get("video", ()))
    return "both" if images and videos else "video" if videos else ("text", "image", "images")[images]


@pytest.fixture(scope="session")
def worst_seed(registry: Path) -> int:
    """A seed of the order in which the ranks hold different kinds in each step, and text on either, beside pictures."""
    kinds = [kind(record) for record in read_annotations(registry, "mixed")]
    for seed in count():
        order = SampleOrder(len(kinds), seed)
        ranks = [[kinds[index] for (index,) in ShardedBatchSampler(order, Sharding(1, 2, rank))] for rank in (0, 1)]
        steps = list(zip(*ranks, strict=True))[:STEPS]
        texts = [pair.index("text") for pair in steps if "text" in pair]
        seen = {name for pair in steps for name in pair}
        if all(one != other for one, other in steps) and set(texts) == {0, 1} and len(seen) == 5:
            return seed
    raise AssertionError


@pytest.fixture(scope="session")
def alone(
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    worst_seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """Return ``function(case, model=None)`` that runs a case in this process, once."""
    folder, done = tmp_path_factory.mktemp("alone"), {}

    def function(case: str, model: Path | None = None) -> Path:
        model = model or tiny_checkpoint("qwen3_vl")
        if (case, model) not in done:
            settings = {**COMMON, **CASES[case], "data_seed": worst_seed, "gradient_accumulation_steps": 2}
            done[case, model] = train(model, folder / str(len(done)), registry, **settings)
        return done[case, model]

    return function


@pytest.fixture
def command(
    tiny_checkpoint: Callable[[str], Path], registry: Path, worst_seed: int, tmp_path: Path
) -> Callable[..., list[str]]:
    """Return a function that makes the command line of a case on two ranks."""

    def function(name: str, case: str, model: Path | None = None, **settings: Any) -> list[str]:
        settings = {**COMMON, **CASES[case], "data_seed": worst_seed, "ddp_timeout": 600, **settings}
        return flags(model or tiny_checkpoint("qwen3_vl"), tmp_path / name, registry, **settings)

    return function


@pytest.fixture
def zero(tmp_path: Path) -> Callable[..., Path]:
    """Return ``function(name, stage=None)`` that makes a configuration of the recipes fit for tiny models on CPUs."""

    def function(name: str, stage: int | None = None) -> Path:
        settings = json.loads((REPOSITORY / "configs" / f"{name}.json").read_text())
        optimization = settings["zero_optimization"]
        optimization["stage"] = stage or optimization["stage"]
        if stage == 1:
            settings.pop("data_types", None)  # float32 sums of gradients are refused there
        if optimization["stage"] == 3:
            optimization["stage3_param_persistence_threshold"] = 0  # or a tiny model is never sharded
        if "offload_optimizer" in optimization:
            settings["zero_force_ds_cpu_optimizer"] = False  # torch's own, which needs no compiler
        file = tmp_path / f"{name}-{optimization['stage']}.json"
        file.write_text(json.dumps(settings))
        return file

    return function


def require_alike(split: Path, single: Path, model: Path) -> None:
    """Check that two ranks ended with the weights and losses of one process, and saved the model's own names."""
    assert weights(split).keys() == weights(model).keys()
    assert largest_difference(split, single) < 1e-5
    assert changed(model, split)
    for key in ("loss", "eval_loss", "learning_rate_vision", "learning_rate_language"):
        assert history(split, key) == pytest.approx(history(single, key), rel=1e-4)


def require_stock_opens(folder: Path, single: Path) -> None:
    """Check that stock transformers reads from a folder what it reads from one that a single process saved."""
    read = []
    for one in (folder, single):
        model, report = AutoModelForImageTextToText.from_pretrained(one, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        read.append(model.state_dict())
    assert all(torch.allclose(read[0][name], tensor, rtol=0, atol=1e-5) for name, tensor in read[1].items())


@pytest.mark.slow
def test_fsdp2_trains_saves_and_resumes_like_one_process(
    command: Callable[..., list[str]],
    alone: Callable[..., Path],
    tiny_checkpoint: Callable[[str], Path],
    publish: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two real ranks over gloo. accelerate trains with DDP there and does not say so: the model itself is looked at."""
    older = publish("qwen2_5_vl")
    sharded = {**FSDP2, "fsdp_config": json.dumps({"state_dict_type": "SHARDED_STATE_DICT"})}
    commands = {case: command(case, case, **FSDP2) for case in ("padded", "frozen", "packed")}
    once = json.dumps({"cpu_ram_efficient_loading": True})  # rank 1 reads no weights
    commands["read once"] = command("read once", "padded", **{**FSDP2, "fsdp_config": once})
    commands["older"] = command("older", "padded", older, **sharded)
    for name, source, model, settings in (("resumed", "padded", None, FSDP2), ("again", "older", older, sharded)):
        resume = {"resume_from_checkpoint": tmp_path / source / "checkpoint-2"}
        commands[name] = command(name, "padded", model, **settings, **resume)
    split = run_on_two_ranks(tmp_path, commands, "FSDP2")
    for case in ("padded", "frozen", "packed"):
        require_alike(split[case], alone(case), tiny_checkpoint("qwen3_vl"))
    require_alike(split["older"], alone("padded", older), older)
    for name, source in (("resumed", "padded"), ("again", "older"), ("read once", "padded")):
        assert equal_bits(split[name], split[source])
        assert history(split[name]) == history(split[source])
    for name, single in (("padded", alone("padded")), ("older", alone("padded", older))):
        require_stock_opens(split[name], single)
        require_stock_opens(split[name] / "checkpoint-2", single / "checkpoint-2")
    resume = {"resume_from_checkpoint": split["padded"] / "checkpoint-2", "gradient_accumulation_steps": 2}
    assert main(command("refused", "padded", **resume)) == 1
    assert "was saved with FSDP, and this run has none" in caplog.text


@pytest.mark.slow
def test_zero_trains_saves_and_resumes_like_one_process(
    command: Callable[..., list[str]],
    alone: Callable[..., Path],
    zero: Callable[..., Path],
    tiny_checkpoint: Callable[[str], Path],
    publish: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Two real ranks with the recipes' settings, mixed media; the experts of the MoE are stored transposed."""
    pytest.importorskip("deepspeed")
    model, experts = tiny_checkpoint("qwen3_vl"), publish("qwen3_vl_moe")
    runs = {  # configuration, case, checkpoint
        "ZeRO-1": (zero("zero2", 1), "padded", model),
        "ZeRO-2": (zero("zero2"), "frozen", model),
        "ZeRO-3": (zero("zero3"), "padded", model),
        "experts": (zero("zero3"), "padded", experts),
        "offload": (zero("zero3_offload"), "frozen", model),
    }
    commands = {
        name: command(name, case, checkpoint, deepspeed=file) for name, (file, case, checkpoint) in runs.items()
    }
    for name, source in (("resumed", "experts"), ("again", "ZeRO-1")):
        file, case, checkpoint = runs[source]
        resume = {"resume_from_checkpoint": tmp_path / source / "checkpoint-2"}
        commands[name] = command(name, case, checkpoint, deepspeed=file, **resume)
    commands["text"] = command("text", "checkpointing", model, deepspeed=zero("zero3"), dataset_use="text")
    commands["crossed"] = command("crossed", "checkpointing", alone("padded"), deepspeed=zero("zero3"))
    others = {"ZeRO-1": "ZeRO-1", "again": "ZeRO-1", "ZeRO-2": "ZeRO-2", "offload": "ZeRO-3 offload"}
    engines = dict.fromkeys(commands, "ZeRO-3") | others
    split = run_on_two_ranks(tmp_path, commands, engines)
    for name, (_, case, checkpoint) in runs.items():
        require_alike(split[name], alone(case, checkpoint), checkpoint)
        if case == "padded":
            assert weights(split[name] / "checkpoint-2").keys() == weights(checkpoint).keys()
    require_stock_opens(split["experts"], alone("padded", experts))
    assert equal_bits(split["resumed"], split["experts"])
    assert equal_bits(split["again"], split["ZeRO-1"])
    assert not changed(model, split["text"], ["model.visual"]), "no sample had a picture"
    # ZeRO-3 goes on from a folder that one process saved, and one process from a folder that ZeRO-3 saved.
    require_alike(split["crossed"], alone("checkpointing", split["ZeRO-3"]), model)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-3"])
def test_adapters_train_save_and_resume_like_in_one_process(
    engine: str,
    command: Callable[..., list[str]],
    alone: Callable[..., Path],
    zero: Callable[..., Path],
    publish: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Adapters of linear layers beside other trained parts, and adapters of stacked experts."""
    settings = FSDP2 if engine == "FSDP2" else {"deepspeed": zero("zero3")}
    models = {"adapters": None, "experts": publish("qwen3_5_moe" if engine == "FSDP2" else "qwen3_vl_moe")}
    commands: dict[str, list[str]] = {}
    for case, model in models.items():
        resume = {"resume_from_checkpoint": tmp_path / case / "checkpoint-2"}
        commands[case] = command(case, case, model, **settings)
        commands[f"{case} resumed"] = command(f"{case} resumed", case, model, **settings, **resume)
    split = run_on_two_ranks(tmp_path, commands, engine)
    for case, model in models.items():
        assert largest_difference(split[case], alone(case, model)) < 1e-5
        assert changed(split[case] / "checkpoint-2", split[case]) == set(weights(split[case]))
        for key in ("loss", "eval_loss"):
            assert history(split[case], key) == pytest.approx(history(alone(case, model), key), rel=1e-4)
        assert equal_bits(split[f"{case} resumed"], split[case])
    assert any(name.endswith(".experts.base_layer.lora_B.weight") for name in weights(split["experts"]))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-3"])
def test_every_family_trains_like_one_process(
    engine: str,
    command: Callable[..., list[str]],
    alone: Callable[..., Path],
    zero: Callable[..., Path],
    publish: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    settings = FSDP2 if engine == "FSDP2" else {"deepspeed": zero("zero3")}
    models = {name: publish(name) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")}
    commands = {name: command(name, "padded", model, **settings) for name, model in models.items()}
    split = run_on_two_ranks(tmp_path, commands, engine)
    for name, model in models.items():
        require_alike(split[name], alone("padded", model), model)
        require_stock_opens(split[name], alone("padded", model))


# What the ranks do without the one call of the vision tower: none where a batch has no picture, as in stock models.
WITHOUT_THE_CALL = """
from qwenvl.models import forward as vision

encode = vision.encode


def encode_pictures_only(visual, patchify, inputs):
    if inputs.pixels is not None:
        return encode(visual, patchify, inputs)
    nothing = inputs.rows.new_zeros((0, visual.config.out_hidden_size), dtype=visual.dtype)
    return vision.VisionFeatures(nothing, (nothing,) * len(visual.config.deepstack_visual_indexes))


vision.encode = encode_pictures_only
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-3"])
def test_without_the_vision_call_on_every_rank_the_run_fails(
    engine: str, command: Callable[..., list[str]], zero: Callable[..., Path], tmp_path: Path
) -> None:
    """The negative control: what trains above does not without the call, so that it is the call that is tested."""
    settings = FSDP2 if engine == "FSDP2" else {"deepspeed": zero("zero3")}
    commands = {"mixed": command("mixed", "checkpointing", **settings)}
    with pytest.raises(AssertionError) as failure:
        run_on_two_ranks(tmp_path, commands, engine, WITHOUT_THE_CALL, **STRICT)
    assert "Detected mismatch between collectives on ranks" in str(failure.value)
