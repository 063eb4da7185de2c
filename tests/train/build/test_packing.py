"""Packs from a plan file, an official packed file or made at the start: the same tokens, or a clear refusal."""

from __future__ import annotations

import itertools
import json
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from qwenvl.cli.pack_data import main
from qwenvl.config import TrainingArguments, parse_arguments
from qwenvl.data.collator import Collator
from qwenvl.data.sampler import Sharding
from qwenvl.data.sources.registry import load_registry
from qwenvl.families import get_family
from qwenvl.train.build.data import RunData, open_data
from qwenvl.train.dataloader import build_loader
from tests.e2e.runs import SETTINGS, flags

LIMIT = 128
DATA_FLAGS = (
    "max_pixels",
    "min_pixels",
    "video_max_pixels",
    "video_min_pixels",
    "video_max_frames",
    "video_min_frames",
)
Tool = Callable[..., int]


@pytest.fixture
def pack_data(tiny_checkpoint: Callable[[str], Path], registry: Path) -> Tool:
    """Function of further flags that calls the tool with the data flags of ``tests.e2e.runs``; None removes one."""

    def run(**settings: Any) -> int:
        named = {name: SETTINGS[name] for name in ("dataset_use", *DATA_FLAGS)}
        named |= {"model_name_or_path": tiny_checkpoint("qwen3_vl"), "dataset_registry": registry}
        named |= {"model_max_length": LIMIT, **settings}
        return main([text for name, value in named.items() if value is not None for text in (f"--{name}", str(value))])

    return run


@pytest.fixture
def open_run(tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path) -> Callable[..., RunData]:
    """Function of flags that opens the data of a training run."""

    def run(**settings: Any) -> RunData:
        named = {"data_packing": True, "model_max_length": LIMIT, **settings}
        parsed = parse_arguments(flags(tiny_checkpoint("qwen3_vl"), tmp_path / "out", registry, **named))
        config = AutoConfig.from_pretrained(tiny_checkpoint("qwen3_vl"))
        return open_data(parsed, get_family("qwen3_vl"), config)

    return run


def samples_of(data: RunData) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every sample of an epoch as (input_ids, labels), as the batches hold them."""
    found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    args = TrainingArguments(output_dir="unused", report_to="none")
    for batch in build_loader(data.train, Collator(0, True), args, data.order, Sharding(1)):
        borders = batch["cu_seq_lens_q"].tolist()
        assert borders[-1] <= LIMIT
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        for start, stop in itertools.pairwise(borders):
            found[tuple(ids[start:stop]), tuple(labels[start:stop])] += 1
    return found


def test_plan_official_file_and_plan_at_the_start_train_on_the_same_tokens(
    pack_data: Tool, open_run: Callable[..., RunData], registry: Path, tmp_path: Path
) -> None:
    use = "mixed%150,held_out"
    at_start = open_run(dataset_use=use)
    again = open_run(dataset_use=use)
    assert pack_data(dataset_use=use, output=tmp_path / "plan.parquet") == 0
    planned = open_run(dataset_use=use, data_packing=None, packing_plan=tmp_path / "plan.parquet")
    unnamed = open_run(dataset_use=None, data_packing=None, packing_plan=tmp_path / "plan.parquet")
    assert pack_data(dataset_use=use, output=tmp_path / "packed.json", format="official") == 0
    entry = {"annotation_path": str(tmp_path / "packed.json"), "data_path": str(registry.parent)}
    (tmp_path / "packed.py").write_text(f"data_dict = {{'packed': {entry!r}}}")
    official = open_run(dataset_use="packed", dataset_registry=tmp_path / "packed.py")
    wanted = samples_of(at_start)
    assert sum(wanted.values()) > 16
    for data in (again, planned, unnamed, official):
        assert samples_of(data) == wanted
    for data in (again, planned, unnamed):  # not only the same samples, but the same packs in the same order
        assert data.train.content == at_start.train.content
        assert data.order.costs is not None
        assert data.order.costs.tolist() == at_start.order.costs.tolist()
        assert data.arranged.events == at_start.arranged.events
    rows = json.loads((tmp_path / "packed.json").read_text())
    assert Counter(map(len, rows)) == Counter(len(planned.train.samples(index)) for index in range(len(planned.train)))


def test_second_start_reads_the_plan_of_the_first(
    open_run: Callable[..., RunData], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"data_cache_dir": tmp_path / "cache", "dataset_use": "text,pictures"}
    first = open_run(**settings)
    assert len(list((tmp_path / "cache" / "plans").iterdir())) == 1
    second = open_run(**settings)
    (plan,) = (tmp_path / "cache" / "plans").iterdir()
    assert first.arranged.packs is not None
    assert second.arranged.packs == replace(first.arranged.packs, source=plan)
    assert second.train.content == first.train.content
    plan.write_bytes(plan.read_bytes()[:-20])
    third = open_run(**settings)
    assert "made anew" in caplog.text
    assert third.train.content == first.train.content
    open_run(**settings | {"model_max_length": 100})
    assert len(list((tmp_path / "cache" / "plans").iterdir())) == 2


@pytest.mark.parametrize("flatten", [True, False])
def test_steps_of_equal_cost_are_sorted_by_length_where_they_are_padded(
    flatten: bool, open_run: Callable[..., RunData]
) -> None:
    """Padding is what samples of other lengths in a batch cost; a flattened row has none."""
    settings = {"data_packing": None, "group_by_cost": True, "model_max_length": 2048}
    data = open_run(**settings, data_flatten=flatten)
    assert data.arranged.packs is None and data.arranged.measures is not None
    tokens = [len(data.train[index].samples[0].tokens.input_ids) for index in range(len(data.train))]
    costs, lengths = data.order.costs, data.order.lengths
    assert costs is not None and len(costs) == len(tokens)
    assert (lengths is None) if flatten else (lengths is not None and lengths.tolist() == tokens)
    assert data.arranged.measures["tokens"].tolist() == tokens


def test_nothing_is_measured_where_nothing_asks_for_it(open_run: Callable[..., RunData]) -> None:
    data = open_run(data_packing=None)
    assert data.arranged.measures is None and data.order.costs is None and data.order.shuffle
    assert (data.order.num_samples, data.order.seed) == (11, 42)
    for seeds, wanted in (({"seed": 3}, 3), ({"seed": 3, "data_seed": 0}, 0)):
        assert open_run(data_packing=None, **seeds).order.seed == wanted


def test_figures_say_how_full_the_packs_are(open_run: Callable[..., RunData]) -> None:
    data = open_run()
    figures = data.arranged.packs
    assert figures is not None and data.arranged.measures is not None
    packs = [data.train[index].samples for index in range(len(data.train))]
    tokens = [sum(len(sample.tokens.input_ids) for sample in samples) for samples in packs]
    assert (figures.count, figures.limit) == (len(tokens), LIMIT) and max(tokens) <= LIMIT
    assert figures.fill == pytest.approx(sum(tokens) / (len(tokens) * LIMIT))
    assert -(-sum(tokens) // LIMIT) <= figures.fewest <= figures.count


def test_several_media_folders_are_written_in_full(
    pack_data: Tool, open_run: Callable[..., RunData], registry: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").symlink_to(registry.parent)
    entries = {
        name: {**entry, "data_path": str(tmp_path / "elsewhere") if name == "pictures" else entry["data_path"]}
        for name, entry in load_registry(str(registry)).items()
    }
    (tmp_path / "two.py").write_text(f"data_dict = {entries!r}")
    two = {"dataset_use": "pictures,held_out", "dataset_registry": tmp_path / "two.py"}
    assert pack_data(**two, output=tmp_path / "packed.jsonl", format="official") == 0
    rows = [json.loads(line) for line in (tmp_path / "packed.jsonl").read_text().splitlines()]
    paths = [path for row in rows for sample in row for path in (*sample.get("image", ()), *sample.get("video", ()))]
    assert {Path(path).parent for path in paths} == {tmp_path / "elsewhere", registry.parent}
    entry = {"annotation_path": str(tmp_path / "packed.jsonl"), "data_path": ""}
    (tmp_path / "packed.py").write_text(f"data_dict = {{'packed': {entry!r}}}")
    official = open_run(dataset_use="packed", dataset_registry=tmp_path / "packed.py")
    assert samples_of(official) == samples_of(open_run(**two))


MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "limit": ({"model_max_length": 100}, "--model_max_length (128, now 100)"),
    "policy": ({"overlength": "error"}, "--overlength (drop, now error)"),
    "pixels": ({"max_pixels": "96*96"}, "limits of images and videos"),
    "other datasets": ({"dataset_use": "text"}, "the datasets (text, pictures; now text)"),
    "percent": ({"dataset_use": "text%200,pictures"}, "which rows of dataset 'text' are used"),
    "held out": ({"eval_ratio": 0.5}, "which rows of dataset 'pictures' are used"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_plan_of_other_data_or_settings_is_refused(
    case: str, pack_data: Tool, open_run: Callable[..., RunData], tmp_path: Path
) -> None:
    changes, message = MISMATCHES[case]
    use = {"dataset_use": "text,pictures"}
    assert pack_data(**use, output=tmp_path / "plan.parquet") == 0
    with pytest.raises(ValueError) as caught:
        open_run(**use | {"packing_plan": tmp_path / "plan.parquet", **changes})
    assert message in str(caught.value)
    assert "python tools/pack_data.py --" in str(caught.value)
    assert str(tmp_path / "plan.parquet") in str(caught.value)


def test_command_of_the_message_makes_the_plan(
    open_run: Callable[..., RunData], pack_data: Tool, tmp_path: Path
) -> None:
    assert pack_data(dataset_use="pictures", output=tmp_path / "plan.parquet") == 0
    settings = {"packing_plan": tmp_path / "plan.parquet", "dataset_use": "text%150", "max_pixels": 96 * 96}
    settings |= {"chat_template_kwargs": '{"enable_thinking": false}', "eval_dataset_use": "held_out"}
    with pytest.raises(ValueError) as caught:
        open_run(**settings)
    command = shlex.split(str(caught.value).splitlines()[-1])
    assert command[:2] == ["python", "tools/pack_data.py"]
    assert main(command[2:]) == 0
    assert len(open_run(**settings).train) > 0


def test_bad_samples_that_a_plan_leaves_out_stop_a_run_that_does_not_skip_them(
    pack_data: Tool, open_run: Callable[..., RunData], registry: Path, tmp_path: Path
) -> None:
    records = json.loads((registry.parent / "text.json").read_text())
    silent = {"conversations": [{"from": "human", "value": "and?"}]}
    (tmp_path / "rows.json").write_text(json.dumps([*records, silent]))
    (tmp_path / "own.py").write_text(
        f"data_dict = {{'own': {{'annotation_path': {str(tmp_path / 'rows.json')!r}, 'data_path': ''}}}}"
    )
    use = {"dataset_use": "own", "dataset_registry": tmp_path / "own.py", "data_cache_dir": tmp_path / "cache"}
    assert pack_data(**use, output=tmp_path / "plan") == 1
    assert pack_data(**use, output=tmp_path / "plan", on_bad_sample="skip") == 0
    with pytest.raises(ValueError, match="leaves out 1 samples"):
        open_run(**use, packing_plan=tmp_path / "plan")
    planned = open_run(**use, packing_plan=tmp_path / "plan", on_bad_sample="skip")
    assert [event.kind for event in planned.arranged.events] == ["bad"]
    open_run(**use, on_bad_sample="skip")
    assert not (tmp_path / "cache" / "plans").exists()  # so that a row is found once it has been mended


@pytest.mark.parametrize("content", [b"", b"PAR1", b"[]"])
def test_what_is_no_plan_is_refused(content: bytes, open_run: Callable[..., RunData], tmp_path: Path) -> None:
    (tmp_path / "plan").write_bytes(content)
    with pytest.raises(ValueError, match=r"tools/pack_data\.py"):
        open_run(packing_plan=tmp_path / "plan")
    with pytest.raises(ValueError, match="does not exist"):
        open_run(packing_plan=tmp_path / "none", dataset_use=None)
