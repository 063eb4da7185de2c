"""The precision of FSDP2, and what its ranks keep between the micro-batches of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenvl.train.checkpoint.sharding import fsdp_precision
from tests.e2e.runs import equal_bits, flags, run_on_two_ranks

FSDP2 = {"fsdp": True, "fsdp_config": "configs/fsdp2.json"}

# Writes what each micro-batch of rank 0 returned and left behind.
WATCH = """
import json, os, sys
import qwenvl.train.trainer as module
from torch.distributed.tensor import DTensor


class Watching(module.Trainer):
    def training_step(self, *arguments):
        loss = super().training_step(*arguments)
        grads = [value.grad for value in self.model.parameters() if value.requires_grad]
        line = {
            "type": str(loss.dtype),
            "loss": float(loss),
            "last": self.accelerator.sync_gradients,
            "sharded": all(isinstance(grad, DTensor) and str(grad.dtype) == "torch.float32" for grad in grads),
        }
        if os.environ["RANK"] == "0":
            with open(sys.argv[1] + ".seen", "a") as file:
                file.write(json.dumps(line) + chr(10))
        return loss


module.Trainer = Watching
"""


def test_sums_are_float32_and_products_have_16_bits() -> None:
    for options, dtype in (({"bf16": True}, torch.bfloat16), ({"fp16": True}, torch.float16)):
        policy = fsdp_precision(**{"bf16": False, "fp16": False, **options})
        assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (dtype, torch.float32, None)
    policy = fsdp_precision(bf16=False, fp16=False)
    assert policy.param_dtype is policy.reduce_dtype is policy.output_dtype is None


@pytest.mark.slow
def test_the_loss_has_its_digits_and_only_shards_of_gradients_are_kept(
    tiny_checkpoint: Any, registry: Path, tmp_path: Path
) -> None:
    settings = {"bf16": True, "gradient_accumulation_steps": 2, "max_steps": 2, "per_device_train_batch_size": 1}
    command = flags(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **FSDP2, **settings, ddp_timeout=600)
    run_on_two_ranks(tmp_path, {"run": command}, "FSDP2", WATCH)
    seen = [json.loads(line) for line in (tmp_path / "commands.json.seen").read_text().splitlines()]
    assert [line["last"] for line in seen] == [False, True, False, True]
    assert all(line["sharded"] for line in seen), "after the first micro-batch of a step too"
    assert {line["type"] for line in seen} == {"torch.float32"}
    losses = torch.tensor([line["loss"] for line in seen])
    assert (losses != losses.bfloat16().float()).all(), "bfloat16 has three digits"


# Writes which ranks copy their weights to host memory, for a file of the whole model.
WATCH_COPIES = """
import os, sys
import deepspeed.checkpoint.utils as utils

clone = utils.clone_tensors_for_torch_save


def watched(item, *arguments, **options):
    if isinstance(item, dict) and "lm_head.weight" in item:
        with open(sys.argv[1] + ".copies", "a") as file:
            file.write(os.environ["RANK"])
    return clone(item, *arguments, **options)


utils.clone_tensors_for_torch_save = watched
"""


@pytest.mark.slow
def test_under_zero_2_the_rank_that_writes_copies_weights_and_resumes(
    tiny_checkpoint: Any, registry: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    settings = {
        "deepspeed": "configs/zero2.json",
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "bf16": True,
    }
    model = tiny_checkpoint("qwen3_vl")
    first = flags(model, tmp_path / "first", registry, **settings)
    resume = {"resume_from_checkpoint": tmp_path / "first" / "checkpoint-1"}
    again = flags(model, tmp_path / "again", registry, **settings, **resume)
    run_on_two_ranks(tmp_path, {"first": first, "again": again}, "ZeRO-2", WATCH_COPIES)
    copies = (tmp_path / "commands.json.copies").read_text()
    assert copies == "0" * 5, "two checkpoints and the finished model; one and the finished model"
    assert equal_bits(tmp_path / "first", tmp_path / "again")


@pytest.mark.slow
def test_fsdp2_resumes_to_the_same_bits(tiny_checkpoint: Any, registry: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "bf16": True, **FSDP2}
    model = tiny_checkpoint("qwen3_vl")
    first = flags(model, tmp_path / "first", registry, **settings)
    resume = {"resume_from_checkpoint": tmp_path / "first" / "checkpoint-1"}
    again = flags(model, tmp_path / "again", registry, **settings, **resume)
    run_on_two_ranks(tmp_path, {"first": first, "again": again}, "FSDP2")
    assert equal_bits(tmp_path / "first", tmp_path / "again")
