"""Run all stages at a published size with random weights, without a GPU: build, train, verify, merge, generate.

    python benchmarks/real_size.py --folder DIR [--size 2b|4b|8b|tiny] [--train lora|merger|mtp] [--keep]
    python benchmarks/real_size.py --folder DIR --config config.json --processor FOLDER [--train ...] [--keep]

Tiny checkpoints hide problems of size: rounding over many layers, several weight files, tied embeddings of a real
vocabulary, time and memory. Builds a Qwen3-VL of the given size in bfloat16, in files of at most 2 GB, or the model
of a published ``config.json`` with the tokenizer and processor of a folder, and some images with captions. Trains it
for three steps of at most 256 tokens (``lora``: adapters of the language model; ``merger``: the mergers in full;
``mtp``: the layer for multi-token prediction too) with verification of the finished folder, merges the adapters,
opens the result with stock transformers and generates. Prints a line of JSON per stage: wall seconds, CPU-seconds,
and the peak memory of all its processes together. DIR needs room for twice the weights; it is removed at the end,
unless ``--keep`` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory

from benchmarks.step_samples import SIZES, make_config
from qwenvl.cli.make_tiny_checkpoint.command import draw_model, save_model
from qwenvl.cli.make_tiny_checkpoint.processor import build_processor
from qwenvl.cli.make_tiny_checkpoint.tokenizer import build_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
FAMILY = "qwen3_vl"
TRAINED = {
    "lora": {"lora_enable": True, "lora_r": 16, "lora_alpha": 32, "learning_rate": 1e-4, "tune_mm_mlp": False},
    "merger": {"tune_mm_mlp": True, "learning_rate": 1e-5},
    "mtp": {"tune_mm_mlp": True, "train_mtp": True, "learning_rate": 1e-5},
}
SETTINGS: dict[str, Any] = {
    "dataset_use": "captions",
    "tune_mm_llm": False,
    "tune_mm_vision": False,
    "bf16": True,
    "model_max_length": 256,
    "max_pixels": "128*128",
    "min_pixels": "32*32",
    "per_device_train_batch_size": 1,
    "max_steps": 3,
    "save_strategy": "no",
    "dataloader_num_workers": 0,
    "report_to": "none",
    "disable_tqdm": True,
    "verify_export": True,
}


def build(folder: Path, size: str) -> None:
    """Write a checkpoint of a size with random weights."""
    tokenizer, config = build_tokenizer(FAMILY), make_config(size)
    for name, token in (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start")):
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|{token}|>"))
    config.vision_end_token_id = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = size in ("2b", "4b", "tiny")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")
    build_processor(FAMILY, tokenizer, "instruct").save_pretrained(folder)


def build_published(folder: Path, config: Path, processor: Path) -> None:
    """Write a checkpoint of a published config with random weights."""
    model, mtp = draw_model(AutoConfig.from_pretrained(config), 0, torch.bfloat16)
    save_model(model, mtp, folder, torch.bfloat16)
    for file in processor.iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, folder / file.name)


def write_data(folder: Path) -> None:
    """Write images with captions, and a registry that names them."""
    random, rows = np.random.default_rng(0), []
    for number in range(8):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"Noise {number}. " * 20}]
        rows.append({"image": f"{number}.png", "conversations": turns})
        rows.append({"conversations": [{**turns[0], "value": "Count to twenty."}, turns[1]]})
    (folder / "captions.json").write_text(json.dumps(rows))
    entry = {"captions": {"annotation_path": str(folder / "captions.json"), "data_path": str(folder)}}
    (folder / "registry.py").write_text(f"data_dict = {entry!r}\n")


def open_and_generate(model_folder: Path, image: Path) -> None:
    """Open a folder with stock transformers, and generate eight tokens about an image."""
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype="auto")
    processor = AutoProcessor.from_pretrained(model_folder)
    content = [{"type": "image", "image": str(image)}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    written = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert written.shape[1] == inputs["input_ids"].shape[1] + 8


def measure(stage: str, command: Sequence[str], log: Path) -> None:
    """Run a command and print its time and memory; exit if it fails."""
    peak, start, ended = [0], time.monotonic(), threading.Event()
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        watcher = threading.Thread(target=_watch, args=(process.pid, peak, ended))
        watcher.start()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        ended.set()
        watcher.join()
    figures = {"seconds": round(time.monotonic() - start, 1), "cpu_seconds": round(used.ru_utime + used.ru_stime, 1)}
    said = re.findall(r"(?:Verified|Merged|Saved)[:a-z ].*", log.read_text())
    print(json.dumps({"stage": stage, **figures, "peak_gib": round(peak[0] / 2**30, 2), "said": said}), flush=True)
    if process.returncode:
        sys.exit(f"{stage} ended with exit code {process.returncode}:\n{log.read_text()[-3000:]}")


def _watch(pid: int, peak: list[int], ended: threading.Event) -> None:
    """Record the peak memory of a process and its children together; shared pages count once per process."""
    while not ended.wait(0.2):
        try:
            family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            peak[0] = max(peak[0], sum(process.memory_info().rss for process in family))
        except psutil.NoSuchProcess:
            continue


def stages(arguments: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Return the command of each stage, in order."""
    trained = arguments.train
    given = {"size": arguments.size, "config": arguments.config, "processor": arguments.processor}
    flags = [text for name, value in given.items() if value for text in (f"--{name}", str(value))]
    own = [sys.executable, str(Path(__file__).resolve()), "--folder", str(folder), *flags, "--stage"]
    settings = {**SETTINGS, **TRAINED[trained], "model_name_or_path": folder / "base", "output_dir": folder / "trained"}
    settings["dataset_registry"] = folder / "registry.py"
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    train = [sys.executable, str(REPOSITORY / "qwenvl" / "train" / "train_qwen.py"), *flags]
    if trained != "lora":
        return {"build": [*own, "build"], "train and verify": train, "open and generate": [*own, "trained"]}
    merge = [sys.executable, str(REPOSITORY / "tools" / "merge_lora.py")]
    merge += ["--adapter", str(folder / "trained"), "--output", str(folder / "merged")]
    opening = {"merge": merge, "open and generate": [*own, "merged"]}
    return {"build": [*own, "build"], "train and verify": train, **opening}


def main() -> None:
    """Read the command line and run all stages, each in its own process; or run a single stage in this process."""
    parser = argparse.ArgumentParser(description="Run all stages at a real size with random weights.")
    parser.add_argument("--folder", required=True, type=Path, help="folder for checkpoints; removed at the end")
    parser.add_argument("--size", default="2b", choices=list(SIZES))
    parser.add_argument("--config", type=Path, help="published config.json in place of a size")
    parser.add_argument("--processor", type=Path, help="folder with its tokenizer, chat template and processor")
    parser.add_argument("--train", default="lora", choices=list(TRAINED))
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints; an existing base is reused")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if (arguments.config is None) != (arguments.processor is None):
        parser.error("--config and --processor go together")
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "build":
        write_data(folder)
        if arguments.config is None:
            build(folder / "base", arguments.size)
        else:
            build_published(folder / "base", arguments.config, arguments.processor)
    elif arguments.stage:
        open_and_generate(folder / arguments.stage, folder / "0.png")
    else:
        run_stages(arguments, folder)


def run_stages(arguments: argparse.Namespace, folder: Path) -> None:
    """Run the stages in order, and remove their files."""
    for stage, command in stages(arguments, folder).items():
        if not (stage == "build" and (folder / "base").is_dir()):
            measure(stage, command, folder / f"{stage.replace(' ', '-')}.log")
    if not arguments.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
