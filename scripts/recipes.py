#!/usr/bin/env python
"""Write the recipes of ``configs/`` and their launchers of ``scripts/`` from one table of models.

    python scripts/recipes.py

Writes ``configs/sft_NAME.yaml`` (full fine-tuning, with the values of the official recipe where it has the model),
``configs/lora_NAME.yaml`` and ``scripts/sft_NAME.sh``, ``scripts/lora_NAME.sh``. Values of one model are in the table,
values of all models in the text below it; a test compares the files with the output of this script.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

ZERO = {
    "zero2": "configs/zero2.json        # ZeRO-2: the weights fit on every GPU",
    "zero2 as official": "configs/zero2.json        # ZeRO-2, as in the official recipe for this mixture of experts",
    "zero3": "configs/zero3.json        # ZeRO-3: weights, gradients and optimizer state are sharded across GPUs",
}


@dataclass(frozen=True)
class Model:
    """What differs between the recipes of two models.

    Args:
        name: Name in file names.
        repository: Name on the Hugging Face hub.
        batch: Samples of a micro-batch on each GPU, full fine-tuning.
        accumulation: Micro-batches of an optimizer step.
        evaluation: Samples of an evaluation batch on each GPU.
        engine: DeepSpeed configuration of full fine-tuning, a key of ``ZERO``.
        rate: Learning rate of full fine-tuning.
        needs: Hardware, a sentence for the head of the recipe; empty where one node of 8 GPUs of 80 GB has room.
        official: The official recipe has this model.
        lora_sharded: Adapters need the frozen weights sharded.
        experts: A mixture of experts.
    """

    name: str
    repository: str
    batch: int = 4
    accumulation: int = 4
    evaluation: int = 8
    engine: str = "zero3"
    rate: str = "1e-5"
    needs: str = ""
    official: bool = False
    lora_sharded: bool = False
    experts: bool = False

    @property
    def title(self) -> str:
        """The model's name for people."""
        return self.repository.removeprefix("Qwen/").removesuffix("-Instruct")


_NODE = "Needs 8 GPUs of 80 GB or more."
_TIGHT = (
    "Needs 16 GPUs of 80 GB, or 8 with a copy of configs/zero3.json without data_types (bfloat16 sums of gradients)."
)
_LARGE = {"batch": 2, "accumulation": 8, "evaluation": 4, "needs": _NODE, "lora_sharded": True}
_EXPERTS = {"batch": 1, "accumulation": 4, "evaluation": 2, "lora_sharded": True, "experts": True}

MODELS = (
    Model("qwen2_5vl_7b", "Qwen/Qwen2.5-VL-7B-Instruct", rate="2e-7", official=True),
    Model("qwen3vl_2b", "Qwen/Qwen3-VL-2B-Instruct", engine="zero2", official=True),
    Model("qwen3vl_4b", "Qwen/Qwen3-VL-4B-Instruct", official=True),
    Model("qwen3vl_8b", "Qwen/Qwen3-VL-8B-Instruct", official=True),
    Model("qwen3vl_32b", "Qwen/Qwen3-VL-32B-Instruct", official=True, **(_LARGE | {"needs": _TIGHT})),
    Model(
        "qwen3vl_30b_a3b",
        "Qwen/Qwen3-VL-30B-A3B-Instruct",
        engine="zero2 as official",
        needs="The official recipe runs it on 32 GPUs of 80 GB.",
        official=True,
        **_EXPERTS,
    ),
    Model(
        "qwen3vl_235b_a22b",
        "Qwen/Qwen3-VL-235B-A22B-Instruct",
        needs="Needs 64 GPUs of 141 GB, or 64 of 80 GB with configs/zero3_offload.json.",
        **_EXPERTS,
    ),
    Model("qwen3_5_0_8b", "Qwen/Qwen3.5-0.8B", engine="zero2"),
    Model("qwen3_5_2b", "Qwen/Qwen3.5-2B", engine="zero2"),
    Model("qwen3_5_4b", "Qwen/Qwen3.5-4B"),
    Model("qwen3_5_9b", "Qwen/Qwen3.5-9B"),
    Model("qwen3_5_27b", "Qwen/Qwen3.5-27B", **_LARGE),
    Model("qwen3_5_35b_a3b", "Qwen/Qwen3.5-35B-A3B", needs="Needs 16 GPUs of 80 GB or more.", **_EXPERTS),
    Model("qwen3_6_27b", "Qwen/Qwen3.6-27B", **_LARGE),
    Model("qwen3_6_35b_a3b", "Qwen/Qwen3.6-35B-A3B", needs="Needs 16 GPUs of 80 GB or more.", **_EXPERTS),
    Model("qwen3_8_27b", "Qwen/Qwen3.8-27B", **_LARGE),
)

_DATA = """
# Data
dataset_use: my_dataset              # names of data/__init__.py, separated by commas; name%50 takes half of it
data_flatten: true                   # samples of a batch one after another in one row, without padding
model_max_length: 8192               # tokens of the longest sample, images included
max_pixels: 64*28*28                 # most pixels of an image; one token is {token}x{token} of them
min_pixels: 28*28                    # fewest pixels of an image

# Length of the run and batches
num_train_epochs: 0.5
per_device_train_batch_size: {batch}       # samples of a micro-batch on each GPU
gradient_accumulation_steps: {accumulation}       # micro-batches of an optimizer step
per_device_eval_batch_size: {evaluation}
"""
_OPTIMIZER = """lr_scheduler_type: cosine
warmup_ratio: 0.03                   # share of the steps in which the learning rate rises
weight_decay: 0
max_grad_norm: 1                     # gradient-norm clipping threshold

# Memory and speed
bf16: true
gradient_checkpointing: true         # compute activations twice instead of keeping them
"""
_OUTPUT = """dataloader_num_workers: 4            # worker processes of each GPU

# Output
output_dir: output/{recipe}
run_name: {recipe}
logging_steps: 1
save_strategy: steps
save_steps: 1000
save_total_limit: 1                  # checkpoints kept
eval_strategy: "no"                  # steps or epoch, together with eval_dataset_use or eval_ratio
report_to: tensorboard               # or wandb, trackio, swanlab, none
"""


def main() -> None:
    """Write all files."""
    for path, text in files().items():
        (REPOSITORY / path).write_text(text, encoding="utf-8")
        if path.endswith(".sh"):
            (REPOSITORY / path).chmod(0o755)


def files() -> dict[str, str]:
    """Return the text of every file by its path in the repository."""
    found = {}
    for model in MODELS:
        for kind, lines in (("sft", _full(model)), ("lora", _lora(model))):
            recipe = f"{kind}_{model.name}"
            found[f"configs/{recipe}.yaml"] = "".join(f"{line}\n" for line in lines)
            found[f"scripts/{recipe}.sh"] = _launcher(recipe, _what(kind, model))
    return found


def _what(kind: str, model: Model) -> str:
    return f"{'Full fine-tuning of' if kind == 'sft' else 'LoRA on'} {model.title}"


def _full(model: Model) -> Iterator[str]:
    recipe = f"sft_{model.name}"
    source = ", with the values of the official recipe" if model.official else ""
    yield f"# {_what('sft', model)}{source}."
    yield from (f"# {model.needs}",) if model.needs else ()
    yield from _head(recipe, model)
    yield "tune_mm_llm: true                    # train the language model"
    yield "tune_mm_mlp: true                    # train the merger between vision and language"
    yield "tune_mm_vision: false                # leave the vision encoder as it is"
    yield _data(model, model.batch)
    yield "# Optimizer"
    yield f"learning_rate: {model.rate}"
    yield _OPTIMIZER + f"deepspeed: {ZERO[model.engine]}"
    yield _OUTPUT.format(recipe=recipe).rstrip("\n")


def _lora(model: Model) -> Iterator[str]:
    recipe = f"lora_{model.name}"
    yield f"# {_what('lora', model)}, with its merger trained whole."
    if model.experts:
        yield "# Adapters of experts have the rank lora_r / experts per token; lora_target: language leaves them out."
    yield from _head(recipe, model)
    yield "tune_mm_llm: false                   # its weights stay as they are; adapters train"
    yield "tune_mm_mlp: true                    # train the merger between vision and language, saved with the adapters"
    yield "tune_mm_vision: false                # leave the vision encoder as it is"
    yield "\n# Adapters\nlora_enable: true"
    target = f"lora_target: language{',experts' * model.experts}"
    yield f"{target:36} # or vision, merger (then tune_mm_mlp: false), all, or a pattern"
    yield "lora_r: 64\nlora_alpha: 128\nlora_dropout: 0.0"
    yield _data(model, 1)
    yield "# Optimizer"
    yield "learning_rate: 1e-4                  # of the adapters"
    yield "mm_projector_lr: 1e-5                # of the merger"
    yield _OPTIMIZER.rstrip("\n")
    sharded = "deepspeed: configs/zero3.json"
    yield f"{sharded if model.lora_sharded else f'# {sharded}':36} # shards the frozen weights across several GPUs"
    yield _OUTPUT.format(recipe=recipe).rstrip("\n")


def _head(recipe: str, model: Model) -> Iterator[str]:
    yield f"#   scripts/launch.sh configs/{recipe}.yaml --dataset_use my_dataset --output_dir output/my_run"
    yield "# Flags override what stands here; train_qwen.py --help explains them. Written by scripts/recipes.py."
    yield f"\n# Model\nmodel_name_or_path: {model.repository}"


def _data(model: Model, batch: int) -> str:
    token = 28 if model.name.startswith("qwen2") else 32
    return _DATA.format(token=token, batch=batch, accumulation=model.accumulation, evaluation=model.evaluation)


def _launcher(recipe: str, what: str) -> str:
    return f"""#!/usr/bin/env bash
# {what} with the values of configs/{recipe}.yaml. Written by scripts/recipes.py.
#
#   DATASETS=my_dataset%50,other OUTPUT_DIR=output/my_run scripts/{recipe}.sh [--flag VALUE ...]
#
# What the environment overrides is listed in scripts/sft.sh; train_qwen.py --help explains the flags.
set -euo pipefail
exec "$(dirname -- "${{BASH_SOURCE[0]}}")/sft.sh" {recipe} "$@"
"""


if __name__ == "__main__":
    main()
