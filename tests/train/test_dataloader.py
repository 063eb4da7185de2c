"""DataLoader workers: one thread, memory that is reused and does not grow, and no process that outlives the run."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import pickle
import platform
import resource
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from qwenvl.config import DataArguments, TrainingArguments
from qwenvl.data.collator import Collator, for_model
from qwenvl.data.dataset import ConversationDataset, open_tables
from qwenvl.data.encoding.encoded import Item
from qwenvl.data.encoding.processor import build_encoder, open_processor
from qwenvl.data.sampler import SampleOrder, Sharding
from qwenvl.data.types import DatasetSpec
from qwenvl.families import get_family
from qwenvl.models.loss.causal_lm import prepare_inputs
from qwenvl.models.vision.grid_inputs import TowerGrids
from qwenvl.tasks.objective import Objective
from qwenvl.train.dataloader import PreparingCollator, ShardedDataLoader, _end_workers, build_loader
from tests.e2e.runs import REPOSITORY
from tests.e2e.test_errors import GOOD, Place, sample

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")


@pytest.fixture
def dataset(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> Callable[..., ConversationDataset]:
    """Function of pictures' sizes (height, width) and a percentage that makes a dataset of one picture a row."""
    folder = tiny_checkpoint("qwen3_vl")
    arguments = DataArguments(min_pixels=32 * 32, max_pixels=512 * 512)
    config = AutoConfig.from_pretrained(folder)
    encoder = build_encoder(open_processor(str(folder)), config, get_family("qwen3_vl"), arguments, 4096)

    def make(sizes: Sequence[tuple[int, int]], percent: float = 100) -> ConversationDataset:
        generator = np.random.default_rng(0)
        with (tmp_path / "rows.jsonl").open("w") as file:
            for number, (height, width) in enumerate(sizes):
                name = f"{number}.{'png' if number % 8 == 0 else 'jpg'}"
                coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((width, height)).save(tmp_path / name)
                turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "word " * (1 + number % 50)}]
                file.write(json.dumps({"image": name, "conversations": turns}) + "\n")
        spec = DatasetSpec("rows", (str(tmp_path / "rows.jsonl"),), str(tmp_path), sampling_percent=percent)
        return ConversationDataset(open_tables([spec], seed=0), encoder)

    return make


def load(dataset: ConversationDataset, collate: Callable[[Any], Any], folder: Path, batch_size: int = 1) -> Any:
    """Batches from the loader of training, with one worker."""
    args = TrainingArguments(output_dir=str(folder), dataloader_num_workers=1, use_cpu=True)
    loader: ShardedDataLoader = build_loader(
        dataset,
        collate,
        args,
        SampleOrder(len(dataset), shuffle=False),
        Sharding(batch_size),  # type: ignore[arg-type]
    )
    return iter(loader)


def threads(items: Any) -> tuple[int, int]:
    """Return torch's threads and all threads of the process that collates."""
    del items
    return torch.get_num_threads(), psutil.Process().num_threads()


def test_a_worker_has_one_thread(dataset: Callable[..., ConversationDataset], tmp_path: Path) -> None:
    """Besides the one that hands its batches over."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = list(load(dataset([(200, 300)] * 20), threads, tmp_path))
    finally:
        torch.set_num_threads(before)
    assert all(in_torch == 1 and in_all <= 2 for in_torch, in_all in found), found


def page_faults(items: Any) -> int:
    """Return how often the process that collates was given a page of memory."""
    del items
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@glibc
def test_a_worker_reuses_its_memory(dataset: Callable[..., ConversationDataset], tmp_path: Path) -> None:
    """Where every buffer is a new one, a picture of a megapixel takes 1,400 page faults.

    Reused ones take few, besides the pages of the parent that a forked process copies now and then.
    """
    faults = list(load(dataset([(900, 1000)] * 2, percent=1500), page_faults, tmp_path))
    each = [after - before for before, after in itertools.pairwise(faults[10:])]
    assert statistics.median(each) < 350, each


def test_batches_are_made_here_without_workers(dataset: Callable[..., ConversationDataset], tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), dataloader_num_workers=0, use_cpu=True)
    rows = dataset([(40, 60)] * 5)
    loader = build_loader(rows, Collator(0, flatten=True), args, SampleOrder(5, shuffle=False), Sharding(2))
    assert loader.num_workers == 0 and not loader.pin_memory
    assert [len(batch["origins"]) for batch in loader] == [2, 2, 1]


@pytest.mark.parametrize("asked", [True, False])
def test_memory_is_pinned_for_a_gpu_on_request(asked: bool, dataset: Callable[..., ConversationDataset]) -> None:
    loaders = []
    for device in ("cuda", "cpu"):
        args: Any = SimpleNamespace(dataloader_num_workers=0, dataloader_pin_memory=asked, device=torch.device(device))
        loaders.append(build_loader(dataset([(40, 60)]), Collator(0, flatten=True), args, SampleOrder(1), Sharding(1)))
    assert [loader.pin_memory for loader in loaders] == [asked, False]


def test_workers_are_ended_though_they_ignore_the_signal(
    dataset: Callable[..., ConversationDataset], tmp_path: Path
) -> None:
    """That this happens at the end of the process, see the slow test of a run that fails."""
    others = set(multiprocessing.active_children())
    batches = [load(dataset([(40, 60)] * 50), threads, tmp_path) for _ in range(2)]
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == len(batches) == 2
    assert all(next(batch) for batch in batches)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        for worker in workers:
            worker.terminate()
            worker.join(0.2)
        assert all(worker.is_alive() for worker in workers), "SIGTERM ends them"
        _end_workers()
        for worker in workers:
            worker.join(20)
        assert not any(worker.is_alive() for worker in workers)
    finally:
        signal.signal(signal.SIGCHLD, handler)


@pytest.mark.slow
@glibc
def test_the_memory_of_a_worker_stays_flat(dataset: Callable[..., ConversationDataset], tmp_path: Path) -> None:
    """Ten thousand pictures of varying size, JPEG and PNG; 2 KB lost with each of them would be too much."""
    sizes = np.random.default_rng(0).integers(20, 160, (200, 2)).tolist()
    rows = dataset(sizes, percent=5000)
    assert len(rows) == 10_000
    others = set(psutil.Process().children())  # of earlier tests
    batches = load(rows, Collator(0, flatten=True), tmp_path, batch_size=4)
    (worker,) = set(psutil.Process().children()) - others
    used = [worker.memory_info().rss for number, _ in enumerate(batches) if number % 50 == 49]
    assert max(used[10:]) - used[9] < 16 << 20, [value >> 20 for value in used]


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_a_run_that_fails_ends(tmp_path: Path, tiny_checkpoint: Callable[..., Path], persistent: bool) -> None:
    """With its workers, which ignore the signal by which a process ends those that are left at its exit."""
    place = Place(tmp_path, tiny_checkpoint("qwen3_vl"))
    place.write(*[GOOD] * 20, sample("<image>", image="cut.jpg"), *[GOOD] * 20)
    settings = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent, "max_steps": 200}
    command = [sys.executable, "qwenvl/train/train_qwen.py", *place.flags(**settings)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1, done.stderr
    assert "cut.jpg: the image is cut off" in done.stderr


class WithReference(Objective):
    """Keeps a model, as a task with a reference does."""

    def begin(self, model: torch.nn.Module) -> None:
        self.reference, self.margin = model, 0.5


def test_inputs_are_prepared_in_the_worker(dataset: Callable[..., ConversationDataset], tmp_path: Path) -> None:
    """Even in one that is not forked, which gets no model."""
    objective, tower = WithReference(), TowerGrids(2, 16, None, None, varlen=True)
    objective.begin(torch.nn.Linear(2, 2))
    maker = pickle.loads(pickle.dumps(PreparingCollator(Collator(0, flatten=True), objective, tower, 2)))
    assert maker.objective.margin == 0.5 and not hasattr(maker.objective, "reference")
    rows = dataset([(200, 300)] * 3)
    for found, number in zip(load(rows, maker, tmp_path), range(3), strict=True):
        plain = for_model(Collator(0, flatten=True)([rows[number]]))
        prepared = prepare_inputs(plain)
        assert torch.equal(found["kept_positions"], prepared["kept_positions"])
        assert found["total_weight"] == found["num_units"] == len(prepared["targets"]) > 0
        assert found["vision_grids"]["grid_thw"].tolist() == [list(shape[1:]) for shape in plain["media"]]
        assert len(found["origins"]) == 1 and found["error"] is None and "labels" not in found
    empty = maker([Item()])
    assert empty["total_weight"] == 0 and empty["vision_grids"]["grid_thw"].tolist() == [[1, 2, 2]]
