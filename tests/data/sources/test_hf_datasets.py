"""Hugging Face datasets and Parquet with pictures: the same samples as from files, lazily, in every process."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from torch.utils.data import DataLoader
from transformers import AutoConfig

from qwenvl.config import DataArguments
from qwenvl.data.conversation.messages import build_conversation
from qwenvl.data.dataset import ConversationDataset, SampledTable
from qwenvl.data.encoding.processor import build_encoder, open_processor
from qwenvl.data.media.reader import MediaReader
from qwenvl.data.sources.hf_datasets import DatasetRows
from qwenvl.data.sources.table import AnnotationTable, open_annotations
from qwenvl.data.types import DatasetSpec, HuggingFaceDataset, ImageItem, Sample, VideoItem
from qwenvl.families import get_family
from qwenvl.utils.errors import UserError
from tests.data.images import encoded, picture

PICTURES = [encoded(picture(30 + number, 20), "PNG") for number in range(6)]
IMAGE = datasets.Image()


def talk(number: int, tags: int = 1) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>" * tags + "?"}, {"from": "gpt", "value": f"answer {number}"}]


def rows(count: int = 6, **fields: Callable[[int], Any]) -> list[dict[str, Any]]:
    """One picture a row, none in every third; or what ``fields`` say."""
    made = []
    for number in range(count):
        image = {"bytes": PICTURES[number], "path": f"{number}.png"} if number % 3 else None
        row = {"id": str(number), "image": image, "conversations": talk(number, tags=int(image is not None))}
        made.append({**row, **{name: make(number) for name, make in fields.items()}})
    return made


TURNS = [{"from": Value("string"), "value": Value("string")}]
FEATURES = Features({"id": Value("string"), "image": IMAGE, "conversations": TURNS})


def dataset(count: int = 6) -> Dataset:
    return Dataset.from_list(rows(count), features=FEATURES)


def open_folder(folder: Path | str, columns: dict[str, str] | None = None, **source: Any) -> AnnotationTable:
    spec = DatasetSpec("things", (), "", hf_dataset=HuggingFaceDataset(str(folder), **source), columns=columns or {})
    return open_annotations(spec)


def open_file(path: Path, columns: dict[str, str] | None = None) -> AnnotationTable:
    return open_annotations(DatasetSpec("things", (str(path),), "", columns=columns or {}))


def sources(samples: tuple[Sample, ...]) -> list[Any]:
    return [item.source for sample in samples for item in build_conversation(sample, ()).media()]


def expect_rows(table: AnnotationTable, count: int = 6) -> None:
    assert [sources(samples) for samples in table] == [[PICTURES[n]] if n % 3 else [] for n in range(count)]
    answers = [build_conversation(sample, ()).messages[-1].text for samples in table for sample in samples]
    assert answers == [f"answer {number}" for number in range(count)]
    reader = MediaReader("")
    assert reader.image_size(ImageItem(sources(table[2])[0])) == (20, 32)
    assert reader.read_image(ImageItem(sources(table[2])[0])).size == (32, 20)


def write_folder_of_parquet(folder: Path) -> None:
    folder.mkdir()
    dataset(4).to_parquet(folder / "train-00000-of-00002.parquet")
    Dataset.from_list(rows()[4:], features=FEATURES).to_parquet(folder / "train-00001-of-00002.parquet")


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "save_to_disk": lambda folder: dataset().save_to_disk(folder, num_shards=2),
    "splits": lambda folder: DatasetDict({"test": dataset(3), "train": dataset()}).save_to_disk(folder),
    "parquet": write_folder_of_parquet,
}


@pytest.mark.parametrize("form", FOLDERS)
def test_folders(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "a dataset"
    FOLDERS[form](folder)
    table = open_folder(folder)
    expect_rows(table)
    origin = table[4][0].origin
    assert (origin.file, origin.line, origin.id) == (f"{folder} (train)", 5, "4")
    assert table.origin(4).line == 5
    assert table.text(0) is None


def test_other_splits(tmp_path: Path) -> None:
    FOLDERS["splits"](tmp_path / "d")
    expect_rows(open_folder(tmp_path / "d", split="test"), 3)
    DatasetDict({"one": dataset(3)})["one"].save_to_disk(tmp_path / "single")
    expect_rows(open_folder(tmp_path / "single"), 3)


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    lines = []
    for number, content in enumerate(PICTURES):
        (tmp_path / "train" / f"{number}.png").write_bytes(content)
        lines.append(json.dumps({"file_name": f"{number}.png", "conversations": talk(number)}))
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(lines))
    table = open_folder(tmp_path)
    sizes = [MediaReader("").image_size(ImageItem(source)) for samples in table for source in sources(samples)]
    assert sizes == [(20, 30 + number) for number in range(6)]


def test_fields_of_several_types(tmp_path: Path) -> None:
    """In one file of JSON lines: by the library, and read by ourselves."""
    records = [
        {"image": "a.jpg", "conversations": talk(0), "id": 1},
        {"image": ["a.jpg", "b.jpg"], "conversations": talk(1, tags=2), "id": "x"},
        {"image": None, "messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]},
                                     {"role": "assistant", "content": "yes"}], "id": None},
        {"image": {"path": "c.jpg", "max_pixels": 9}, "conversations": talk(2), "extra": {"deep": [1, "a", None]}},
    ]  # fmt: skip
    (tmp_path / "d").mkdir()
    file = tmp_path / "d" / "train.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    for table in (open_folder(tmp_path / "d"), open_file(file)):
        conversations = [build_conversation(sample, ()) for samples in table for sample in samples]
        media = [[(item.source, item.max_pixels) for item in conversation.media()] for conversation in conversations]
        assert media == [[("a.jpg", None)], [("a.jpg", None), ("b.jpg", None)], [], [("c.jpg", 9)]]
        assert [len(conversation.messages) for conversation in conversations] == [2, 2, 2, 2]


def test_lists_of_pictures_and_frames(tmp_path: Path) -> None:
    features = {
        "images": [IMAGE],
        "video": [{"frames": [IMAGE], "fps": Value("float32")}],
        "messages": [{"role": Value("string"), "content": Value("string")}],
    }
    embedded = [{"bytes": content, "path": None} for content in PICTURES]
    turns = [{"role": "user", "content": "<image><video><image>?"}, {"role": "assistant", "content": "yes"}]
    row = {"images": embedded[:2], "video": [{"frames": embedded[:3], "fps": 4.0}], "messages": turns}
    Dataset.from_list([row], features=Features(features)).save_to_disk(tmp_path / "d")
    (sample,) = open_folder(tmp_path / "d")[0]
    first, second = (ImageItem(content) for content in PICTURES[:2])
    assert build_conversation(sample, ()).media() == (first, VideoItem(tuple(PICTURES[:3]), fps=4.0), second)


def test_typed_parts_with_pictures(tmp_path: Path) -> None:
    part = {"type": Value("string"), "text": Value("string"), "image": IMAGE}
    turn = {"role": Value("string"), "content": [part]}
    embedded = {"bytes": PICTURES[0], "path": None}
    user = [{"type": "image", "text": None, "image": embedded}, {"type": "text", "text": "?", "image": None}]
    answer = [{"type": "text", "text": "yes", "image": None}]
    row = {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}
    Dataset.from_list([row], features=Features({"messages": [turn]})).save_to_disk(tmp_path / "d")
    assert sources(open_folder(tmp_path / "d")[0]) == [PICTURES[0]]


def parquet_with_binary(path: Path) -> None:
    records = [{**row, "image": row["image"] and row["image"]["bytes"]} for row in rows()]
    pq.write_table(pa.Table.from_pylist(records), path)


PARQUET: dict[str, Callable[[Path], Any]] = {
    "datasets": lambda path: dataset().to_parquet(path),
    "structs": lambda path: pq.write_table(pa.Table.from_pylist(rows()), path),
    "bytes": parquet_with_binary,
}


@pytest.mark.parametrize("form", PARQUET)
def test_parquet_with_pictures(tmp_path: Path, form: str) -> None:
    path = tmp_path / "with [brackets] and *.parquet"
    PARQUET[form](path)
    table = open_file(path)
    assert [type(file) for file in table.files] == [DatasetRows]  # mapped, not read by row groups
    expect_rows(table)
    assert (table[4][0].origin.file, table[4][0].origin.line) == (str(path), 5)
    assert len(pickle.dumps(table)) < 20_000


def test_parquet_without_pictures_is_read_where_it_lies(tmp_path: Path) -> None:
    records = [{"image": f"{number}.png", "conversations": talk(number)} for number in range(3)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    assert [sources(samples) for samples in open_file(tmp_path / "a.parquet")] == [["0.png"], ["1.png"], ["2.png"]]
    cached = Path(os.environ["HF_DATASETS_CACHE"]).rglob("*.arrow")
    assert not [path for path in cached if path.stat().st_mtime > (tmp_path / "a.parquet").stat().st_mtime]


def first_answer(samples: list[tuple[Sample, ...]]) -> list[tuple[str, list[Any]]]:
    return [(build_conversation(one[0], ()).messages[-1].text, sources(one)) for one in samples]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["save_to_disk", "parquet file"])
def test_workers_read_it(tmp_path: Path, form: str, method: str) -> None:
    if form == "parquet file":
        PARQUET["datasets"](tmp_path / "a.parquet")
        table = open_file(tmp_path / "a.parquet")
    else:
        FOLDERS[form](tmp_path / "d")
        table = open_folder(tmp_path / "d")
    expected = first_answer(list(table))
    assert len(pickle.dumps(table)) < 20_000
    assert first_answer(list(pickle.loads(pickle.dumps(table)))) == expected
    loader = DataLoader(
        table, batch_size=2, num_workers=2, collate_fn=first_answer, multiprocessing_context=method  # type: ignore[arg-type]
    )  # fmt: skip
    assert [one for batch in loader for one in batch] == expected


def test_the_model_sees_what_it_sees_of_files(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    folder, arguments = tiny_checkpoint("qwen3_vl"), DataArguments(min_pixels=32 * 32, max_pixels=64 * 64)
    config = AutoConfig.from_pretrained(folder)
    encoder = build_encoder(open_processor(str(folder)), config, get_family("qwen3_vl"), arguments, 1000)
    FOLDERS["save_to_disk"](tmp_path / "d")
    for number, content in enumerate(PICTURES):
        (tmp_path / f"{number}.png").write_bytes(content)
    lines = [{**row, "image": row["image"] and row["image"]["path"]} for row in rows()]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    of_files = open_annotations(DatasetSpec("things", (str(tmp_path / "a.jsonl"),), str(tmp_path)))
    whole = np.arange(6)
    embedded, files = (
        ConversationDataset([SampledTable(table, whole)], encoder) for table in (open_folder(tmp_path / "d"), of_files)
    )
    for index in range(6):
        (one,), (other,) = embedded[index].samples, files[index].samples
        assert torch.equal(one.tokens.input_ids, other.tokens.input_ids)
        assert len(one.media) == len(other.media) == (index % 3 > 0)
        for medium, same in zip(one.media, other.media, strict=True):
            assert torch.equal(medium.frames, same.frames)


@pytest.mark.parametrize("form", FOLDERS)
def test_the_fingerprint_is_that_of_the_content(tmp_path: Path, form: str) -> None:
    FOLDERS[form](tmp_path / "d")
    first = open_folder(tmp_path / "d").fingerprint
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
    assert open_folder(tmp_path / "d").fingerprint == first
    if form == "parquet":
        changed = [{**row, "id": "x"} for row in rows()]
        Dataset.from_list(changed, features=FEATURES).to_parquet(tmp_path / "d" / "train-00000-of-00002.parquet")
    else:
        shutil.rmtree(tmp_path / "d")
        changed = Dataset.from_list([{**row, "id": "x"} for row in rows()], features=FEATURES)
        DatasetDict({"train": changed}).save_to_disk(tmp_path / "d")
    assert open_folder(tmp_path / "d").fingerprint != first


def test_nothing_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a picture was decoded")

    records = [{"image": {"bytes": b"no picture", "path": None}, "conversations": talk(0), "extra": extra}
               for extra in (1, {"a": "b"})]  # fmt: skip
    features = Features({"image": IMAGE, "conversations": TURNS, "extra": datasets.Json()})
    Dataset.from_list(records, features=features).save_to_disk(tmp_path / "d")
    monkeypatch.setattr(datasets.Image, "decode_example", fail)
    table = open_folder(tmp_path / "d")
    assert [sources(samples) for samples in table] == [[b"no picture"]] * 2
    assert [samples[0].record["extra"] for samples in table] == [1, {"a": "b"}]


def test_a_name_on_the_hub_without_a_network() -> None:
    """Tests run with HF_HUB_OFFLINE."""
    with pytest.raises(UserError, match=r"'things': 'nobody/nothing' is no folder here.*download it beforehand"):
        open_folder("nobody/nothing")


def test_broken_parquet_with_pictures(tmp_path: Path) -> None:
    PARQUET["datasets"](tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:4] + b"\xff" * 200 + content[204:])
    with pytest.raises(UserError, match=r"a.parquet: the datasets library cannot open it"):
        open_file(tmp_path / "a.parquet")
