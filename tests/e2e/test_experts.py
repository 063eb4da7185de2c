"""Mixtures of experts under ZeRO-3: any routing trains, every layout of files loads, the published ones are saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from qwenvl.config import parse_arguments
from qwenvl.data.sampler import SampleOrder, ShardedBatchSampler, Sharding
from qwenvl.families import get_family
from qwenvl.models.loading import load_model
from qwenvl.train.build.data import open_data
from tests.e2e.runs import REPOSITORY, flags, history, largest_difference, run_on_two_ranks, train, weights

pytestmark = pytest.mark.slow

WORDS = ("red blue green circle", "seven dogs run fast")  # of even and of odd samples
# a large epsilon, because Adam makes much of rounding where a gradient is nearly zero
SETTINGS: dict[str, Any] = {"dataset_use": "routed", "per_device_train_batch_size": 1, "adam_epsilon": 1e-2}


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a registry with a dataset of eight samples of text, in two kinds that share few tokens."""
    folder = tmp_path_factory.mktemp("routed")
    records = [
        {"conversations": [{"from": "human", "value": WORDS[n % 2]}, {"from": "gpt", "value": f"{WORDS[n % 2]} " * 3}]}
        for n in range(8)
    ]
    (folder / "routed.json").write_text(json.dumps(records))
    entries = {"routed": {"annotation_path": str(folder / "routed.json"), "data_path": str(folder)}}
    (folder / "registry.py").write_text(f"data_dict = {entries!r}\n")
    return folder / "registry.py"


def _samples(checkpoint: Path, registry: Path) -> list[list[int]]:
    """Return the tokens of the samples, as training gets them."""
    parsed = parse_arguments(flags(checkpoint, registry.parent / "unused", registry, **SETTINGS))
    config = AutoConfig.from_pretrained(checkpoint)
    data = open_data(parsed, get_family(config.model_type), config)
    return [data.train[index].samples[0].tokens.input_ids.tolist() for index in range(len(data.train))]


def _send_kinds_to_experts_of_their_own(folder: Path, samples: list[list[int]]) -> None:
    """Write embeddings and routers: even samples alone reach expert 1, odd ones expert 3; both reach 0 and 2."""
    even, odd = ({token for sample in samples[kind::2] for token in sample} for kind in (0, 1))
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.language_model.embed_tokens.weight"]
    embedding[:, :2] = 0
    for token in even | odd:
        embedding[token, 0] = 20.0 * ((token in even) - (token in odd))
        embedding[token, 1] = 20.0 * (token in even and token in odd)
    for name in tensors:
        if name.endswith("mlp.gate.weight"):
            tensors[name].zero_()
            tensors[name][:, :2] = torch.tensor([[1.0, 1.0], [0.9, -1.0], [-1.0, 1.0], [-0.9, -1.0]])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _require_experts_of_one_rank_alone(checkpoint: Path, samples: list[list[int]]) -> None:
    """Check in every layer, and that there is a step in which one rank has an even sample and the other an odd one."""
    model = load_model(str(checkpoint), dtype=torch.float32, attn_implementation="sdpa")
    seen: dict[int, list[set[int]]] = {0: [], 1: []}

    def record(module: nn.Module, arguments: Any, output: tuple[Tensor, ...]) -> None:
        chosen = next(part for part in output if not part.is_floating_point())
        seen[kind].append(set(chosen.flatten().tolist()))

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(record)
    for kind in (0, 1):
        for sample in samples[kind::2]:
            with torch.no_grad():
                model(input_ids=torch.tensor([sample]), use_cache=False)
    assert all(experts == {0, 1, 2} for experts in seen[0]) and seen[0]
    assert all(experts == {0, 2, 3} for experts in seen[1]) and seen[1]
    order = SampleOrder(len(samples), seed=42)
    ranks = [list(ShardedBatchSampler(order, Sharding(1, 2, rank)))[:3] for rank in (0, 1)]
    assert any(one[0] % 2 != other[0] % 2 for one, other in zip(*ranks, strict=True))


def _fused(checkpoint: Path, folder: Path) -> Path:
    """Return a copy whose experts are not stored one by one."""
    shutil.copytree(checkpoint, folder)
    state = AutoModelForImageTextToText.from_pretrained(checkpoint).state_dict()
    save_file(dict(state), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_experts_train_under_zero3_from_every_layout_and_with_any_routing(
    publish: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path], routed: Path, tmp_path: Path
) -> None:
    """Two real ranks against one process, all of it in float32.

    Experts are fused parameters here, gathered as a whole: no leaf modules have to be set, unlike for lists of modules.
    """
    pytest.importorskip("deepspeed")
    official = publish("qwen3_vl_moe")
    samples = _samples(official, routed)
    _send_kinds_to_experts_of_their_own(official, samples)
    _require_experts_of_one_rank_alone(official, samples)
    stock = AutoModelForImageTextToText.from_pretrained(official)
    assert not any(isinstance(module, nn.ModuleList) and "experts" in name for name, module in stock.named_modules())
    resaved = tmp_path / "checkpoints" / "resaved"
    shutil.copytree(official, resaved)  # the processor
    stock.save_pretrained(resaved)
    listed = tiny_checkpoint("qwen3_5_moe")
    models = {
        "official": official,
        "resaved": resaved,
        "listed": listed,
        "fused": _fused(listed, tmp_path / "checkpoints" / "fused"),
    }
    settings = json.loads((REPOSITORY / "configs" / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or a tiny model is never sharded
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    sharded = {**SETTINGS, "deepspeed": tmp_path / "zero3.json"}
    commands = {name: flags(model, tmp_path / name, routed, **sharded) for name, model in models.items()}
    run_on_two_ranks(tmp_path, commands, "ZeRO-3")
    for name, model in models.items():
        alone = train(model, tmp_path / "alone" / name, routed, **SETTINGS, gradient_accumulation_steps=2)
        assert history(tmp_path / name) == pytest.approx(history(alone), rel=1e-5), name
        assert largest_difference(tmp_path / name, alone) < 1e-5, name
        before, after = weights(official if name == "resaved" else model), weights(tmp_path / name)
        assert {key: tensor.shape for key, tensor in before.items()} == {k: t.shape for k, t in after.items()}, name
        experts = [key for key in before if ".experts." in key and not key.startswith("mtp.")]
        assert all((before[key] - after[key]).abs().max() > 1e-4 for key in experts), name
    for one, other in (("official", "resaved"), ("listed", "fused")):
        states = [AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict() for name in (one, other)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), "stock transformers reads both"
