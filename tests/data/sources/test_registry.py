"""The registry: what it accepts, and that each mistake names its file and its cure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl.data.sampler import sample_rows
from qwenvl.data.sources.registry import Registry, load_registry, parse_dataset_use
from qwenvl.data.types import DatasetSpec, HuggingFaceDataset
from qwenvl.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def registry_file(tmp_path: Path) -> Path:
    (tmp_path / "media").mkdir()
    for name in ("a.json", "b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text("[]")
    file = tmp_path / "mine.py"
    file.write_text(
        "data_dict = {\n"
        "  'apples': {'annotation_path': 'a.json', 'data_path': 'media', 'allow_absolute': True},\n"
        "  'bananas': {'annotation_path': ['b.jsonl', 'c.jsonl'], 'data_path': ''},\n"
        "  'gone': {'annotation_path': 'gone.json', 'data_path': ''},\n"
        "  'homeless': {'annotation_path': 'a.json', 'data_path': 'nowhere'},\n"
        "  'typo': {'annotation_pth': 'a.json', 'data_path': ''},\n"
        "  'no_data_path': {'annotation_path': 'a.json'},\n"
        "  'text': 'a.json',\n"
        "  'option': {'annotation_path': 'a.json', 'data_path': '', 'bbox_fromat': 'pixel'},\n"
        "  'history': {'annotation_path': 'a.json', 'data_path': '', 'history': 'lst'},\n"
        "  'arguments': {'annotation_path': 'a.json', 'data_path': '', 'chat_template_kwargs': 3},\n"
        "}\n"
    )
    return file


def test_entries_become_specs(registry_file: Path, tmp_path: Path) -> None:
    registry = load_registry(str(registry_file))
    apples, bananas = parse_dataset_use(" apples%12.5, bananas ,", registry)
    assert (apples.name, apples.sampling_percent, apples.options) == ("apples", 12.5, {"allow_absolute": True})
    assert apples.annotation_paths == (str(tmp_path / "a.json"),)
    assert apples.data_path == str(tmp_path / "media")
    assert bananas.annotation_paths == (str(tmp_path / "b.jsonl"), str(tmp_path / "c.jsonl"))
    assert (bananas.data_path, bananas.sampling_percent, bananas.options) == ("", 100.0, {})


def test_paths_do_not_depend_on_the_working_folder(
    registry_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (spec,) = parse_dataset_use("apples", load_registry("../mine.py"))
    assert spec.annotation_paths == (str(tmp_path / "a.json"),)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Annotation files in folders, beside a registry."""
    for name in ("train/b.jsonl", "train/a.jsonl", "train/deep/er/c.jsonl", "train/a.json", "x[1].jsonl", ".h.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "train" / "folder.jsonl").mkdir()
    return tmp_path


def paths_of(base: Path, annotation_path: object) -> list[str]:
    registry = Registry({"x": {"annotation_path": annotation_path, "data_path": ""}}, base / "r.py", base)
    (spec,) = parse_dataset_use("x", registry)
    return [str(Path(path).relative_to(base)) for path in spec.annotation_paths]


@pytest.mark.parametrize("absolute", [False, True])
def test_patterns_stand_for_sorted_files(files: Path, absolute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    start = f"{files}/" if absolute else ""
    assert paths_of(files, f"{start}train/*.jsonl") == ["train/a.jsonl", "train/b.jsonl"]
    assert paths_of(files, f"{start}**/*.jsonl") == [
        *("train/a.jsonl", "train/b.jsonl", "train/deep/er/c.jsonl", "x[1].jsonl")
    ]
    assert paths_of(files, f"{start}train/[b-z].json?") == ["train/b.jsonl"]
    assert paths_of(files, [f"{start}train/b.jsonl", f"{start}train/*"]) == [
        *("train/b.jsonl", "train/a.json", "train/a.jsonl")
    ]
    assert paths_of(files, f"{start}x[1].jsonl") == ["x[1].jsonl"]  # a file of that very name


def test_a_pattern_without_a_match_is_named(files: Path) -> None:
    with pytest.raises(UserError, match=r"'x' in .*r.py: no annotation file matches 'val/\*.jsonl'.*start from"):
        paths_of(files, ["train/*.jsonl", "val/*.jsonl"])


def hf_entry(base: Path, **entry: object) -> DatasetSpec:
    (spec,) = parse_dataset_use("x%50", Registry({"x": entry}, base / "r.py", base))
    return spec


def test_entries_of_hugging_face_datasets(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    spec = hf_entry(tmp_path, hf_dataset="folder")
    assert (spec.annotation_paths, spec.data_path, spec.sampling_percent, spec.options) == ((), "", 50.0, {})
    assert spec.hf_dataset == HuggingFaceDataset(str(tmp_path / "folder"), "train", None, None)
    spec = hf_entry(tmp_path, hf_dataset="owner/name", split="test", config="en", revision="v1.0", data_path="folder",
                    columns={"image": "picture"}, allow_absolute=True)  # fmt: skip
    assert spec.hf_dataset == HuggingFaceDataset("owner/name", "test", "en", "v1.0")
    assert (spec.columns, spec.options) == ({"image": "picture"}, {"allow_absolute": True})
    assert spec.data_path == str(tmp_path / "folder")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"hf_dataset": "a", "annotation_path": "a.json"}, ["'annotation_path' and 'hf_dataset'", "keep the one"]),
        ({"hf_datset": "a/b", "data_path": ""}, ["no 'annotation_path'", "Or 'hf_dataset'"]),
        ({"hf_dataset": "./gone"}, ["folder of its 'hf_dataset'", "gone, does not exist"]),
        ({"hf_dataset": "r.py"}, ["r.py, is a file", "'annotation_path'"]),
        ({"hf_dataset": 3}, ["'hf_dataset' must be a name, not 3"]),
        ({"hf_dataset": "a/b", "split": ""}, ["'split' must be a name"]),
        ({"hf_dataset": "a/b", "data_path": "gone"}, ["folder of its media", "gone"]),
        ({"hf_dataset": "a/b", "columns": ["image"]}, ["'columns' must be a dict"]),
        ({"hf_dataset": "a/b", "columns": {"imag": "x"}}, ["'imag'", "Did you mean 'image'"]),
        ({"annotation_path": "r.py", "data_path": "", "split": "train"}, ["'split'", "'hf_dataset' alone"]),
    ],
)
def test_mistakes_in_entries_of_hugging_face_datasets(
    tmp_path: Path, entry: dict[str, object], expected: list[str]
) -> None:
    (tmp_path / "r.py").write_text("")
    with pytest.raises(UserError) as caught:
        hf_entry(tmp_path, **entry)
    for words in ["'x' in the registry", *expected]:
        assert words in str(caught.value)


@given(parts=st.lists(st.sampled_from([("", 100.0), ("%50", 50.0), ("%0.5", 0.5), ("%250", 250.0)]), min_size=1))
def test_a_name_given_twice_adds_up(parts: list[tuple[str, float]]) -> None:
    registry = {"x": {"annotation_path": __file__, "data_path": ""}}
    specs = parse_dataset_use(",".join("x" + suffix for suffix, _ in parts), registry)
    assert [spec.sampling_percent for spec in specs] == [pytest.approx(sum(percent for _, percent in parts))]


def test_percents_of_a_name_add_up_exactly() -> None:
    """As floats, 7.6 + 92.1 is below 99.7, and 9,969 of 10,000 rows would be used."""
    registry = {"x": {"annotation_path": __file__, "data_path": ""}}
    for use, rows in (
        ("x%7.6,x%92.1", 9970),
        ("x%0.1,x%0.2", 30),
        ("x%33.3,x%33.3,x%33.4", 10_000),
        ("x, x %.5", 10_050),
    ):
        (spec,) = parse_dataset_use(use, registry)
        assert len(sample_rows(10_000, spec.sampling_percent, "x", 0)) == rows, use


@pytest.mark.parametrize("order", [1, -1])
def test_a_file_is_used_once_however_often_it_is_named(
    tmp_path: Path, order: int, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}")
    os.symlink(tmp_path / "b.jsonl", tmp_path / "link")
    written = [str(tmp_path / "*.jsonl"), str(tmp_path / "a.jsonl"), f"{tmp_path}/./link"][::order]
    (spec,) = parse_dataset_use("x", {"x": {"annotation_path": written, "data_path": ""}})
    assert {os.path.realpath(path) for path in spec.annotation_paths} == {
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "b.jsonl"),
    }
    assert len(spec.annotation_paths) == 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert "a.jsonl" in said and "more than once. It is used once; NAME%200 uses a dataset twice." in said


def test_files_that_are_named_once_are_used_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("{}")
    written = [str(tmp_path / "b.jsonl"), str(tmp_path / "a*.jsonl")]
    (spec,) = parse_dataset_use("x", {"x": {"annotation_path": written, "data_path": ""}})
    assert spec.annotation_paths == (str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl"))
    assert not caplog.records


@pytest.mark.parametrize("percent", ["", "0", "0.0", "-5", "abc", "nan", "inf", "5%5", "1e2", "1_0", "٣"])
def test_a_percent_must_be_a_number_above_zero(percent: str) -> None:
    with pytest.raises(UserError, match="number above 0"):
        parse_dataset_use(f"x%{percent}", {"x": {"annotation_path": __file__, "data_path": ""}})


@pytest.mark.parametrize(
    ("dataset_use", "expected"),
    [
        ("", ["names no dataset", "apples"]),
        (" , ", ["names no dataset"]),
        ("aples", ["'aples'", "mine.py", "Did you mean 'apples'", "--dataset_registry"]),
        ("gone", ["'gone'", "gone.json does not exist", "Relative paths start from"]),
        ("homeless", ["'homeless'", "nowhere", "does not exist"]),
        ("typo", ["'typo'", "has no 'annotation_path'", "Did you mean 'annotation_pth'"]),
        ("no_data_path", ["has no 'data_path'", 'may be ""']),
        ("text", ["'text'", "an entry is a dict"]),
        ("history", ["'history' is 'lst', not one of exact, last, as_rendered"]),
        ("arguments", ["'chat_template_kwargs' must be a dict, not 3"]),
        ("option", ["'option'", "'bbox_fromat', which has no effect", "Did you mean 'bbox_format'"]),
    ],
)
def test_mistakes_are_named(registry_file: Path, dataset_use: str, expected: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_dataset_use(dataset_use, load_registry(str(registry_file)))
    for words in expected:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\ndata_dict = {\n", "line 2"),
        ("x = 1\n\nraise RuntimeError('boom')\n", "line 3: RuntimeError: boom"),
        ("datasets = {}\n", "must define data_dict"),
        ("data_dict = []\n", "it has a list"),
        ("data_dict = {'a%b': {}}\n", "'a%b' cannot be a dataset name"),
        ("data_dict = {3: {}}\n", "3 cannot be a dataset name"),
    ],
)
def test_broken_registries_are_explained(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_registry(str(file))
    assert expected in str(caught.value) and str(file) in str(caught.value)


def test_a_missing_registry_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_registry(str(tmp_path / "none.py"))
    with pytest.raises(UserError, match="does not exist"):
        load_registry(str(tmp_path))  # a folder without __init__.py


def test_a_folder_may_import_its_own_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "more.py").write_text("EXTRA = {'annotation_path': 'notes.json', 'data_path': ''}\n")
    (folder / "__init__.py").write_text("from .more import EXTRA\ndata_dict = {'extra': EXTRA}\n")
    (tmp_path / "notes.json").write_text("[]")
    before = set(sys.modules)
    (spec,) = parse_dataset_use("extra", load_registry(str(folder)))
    assert spec.annotation_paths == (str(tmp_path / "notes.json"),)
    assert "data" not in set(sys.modules) - before


def test_an_edit_in_the_same_second_counts(tmp_path: Path) -> None:
    """Python takes its cached code for a file of the same size that was written in the same second."""
    file = tmp_path / "mine.py"
    for value in ("one", "two"):
        file.write_text(f"data_dict = {{'a': '{value}'}}")
        os.utime(file, (1_700_000_000, 1_700_000_000))
        assert load_registry(str(file)) == {"a": value}
    assert not (tmp_path / "__pycache__").exists()


def test_an_edited_registry_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("data_dict = {'first': {}}\n")
    assert list(load_registry(str(file))) == ["first"]
    file.write_text("data_dict = {'second': {}, 'third': {}}\n")
    assert list(load_registry(str(file))) == ["second", "third"]


def test_the_shipped_registry_loads_from_any_folder(tmp_path: Path) -> None:
    """In a new process elsewhere, where another module called ``data`` stands in the way."""
    (tmp_path / "data.py").write_text("raise SystemExit('the wrong data module')\n")
    code = "from qwenvl.data.sources.registry import load_registry as f; print(sorted(f(None)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    for name in ("demo_digits", "demo_digits_heldout", "demo_comparisons", "demo_grounding", "demo_motion_heldout"):
        assert repr(name) in done.stdout


def test_the_examples_of_the_shipped_registry_are_valid_and_come_first(tmp_path: Path) -> None:
    text = (ROOT / "data" / "__init__.py").read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text(text.replace("    # ", "    "))
    registry = load_registry(str(tmp_path / "mine.py"))
    assert list(registry)[:3] == ["my_dataset", "my_hf_dataset", "demo_digits"]
    (spec,) = parse_dataset_use("my_hf_dataset", registry)
    assert spec.hf_dataset == HuggingFaceDataset(name="owner/name", split="train", config=None, revision=None)
    with pytest.raises(UserError, match=r"/data/my_dataset/annotations\.jsonl"):  # right but for the file
        parse_dataset_use("my_dataset", registry)
