"""The tool that checks data: what it finds, what it writes, and that training and it agree."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from qwenvl.cli.check_image.samples import Finding, SampleChecker, default_settings
from qwenvl.cli.check_image.tables import check_table
from qwenvl.config import DataArguments
from qwenvl.data.sources.table import open_annotations
from qwenvl.data.types import DatasetSpec
from qwenvl.utils.errors import UserError
from tests.cli.checking import ALL, BAD, GOOD, Check, problems, read_lines, sample, write_lines


def test_every_category_is_found(check: Check, tmp_path: Path) -> None:
    write_lines(tmp_path / "set.jsonl", [record for _, record in ALL])
    code, output, _ = check()
    assert code == 1
    assert problems(tmp_path) == {record["id"]: categories for categories, record in ALL if categories}
    lines = [line.split() for line in output.splitlines()]
    assert ["set", "no", "problem", str(len(GOOD)), "of", str(len(ALL))] in lines
    for category in {category for categories, _ in ALL for category in categories}:
        samples = sum(category in categories for categories, _ in ALL)
        (line,) = [line for line in lines if line[:2] == ["set", category]]
        assert line[2] == str(samples)
    first = next(place for place, (categories, _) in enumerate(ALL, start=1) if "zero_byte" in categories)
    assert re.search(rf"set\.jsonl:{first} +empty\.jpg is empty \(0 bytes\)\.\n", output)
    assert "Not checked: pixels" in output
    assert "Not checked: lengths" in output
    assert "duplicate" in output and "the same turns and media as line 1." in output
    assert not (tmp_path / "out" / "set_valid.jsonl").exists()


def test_good_data_leaves_an_empty_file(check: Check, tmp_path: Path) -> None:
    write_lines(tmp_path / "set.jsonl", GOOD)
    assert check("--dataset_use", "set", "--decode")[0] == 0
    assert (tmp_path / "out" / "set_problems.jsonl").read_bytes() == b""


def test_files_that_are_cut_are_found_by_decoding(check: Check, tmp_path: Path) -> None:
    write_lines(tmp_path / "set.jsonl", [sample("cut", image="cut.jpg"), *GOOD])
    assert check()[0] == 0
    code, output, _ = check("--dataset_use", "set", "--decode")
    assert code == 1
    assert problems(tmp_path) == {"cut": ["truncated"]}
    assert "Not checked: pixels" not in output
    assert "images and videos decoded" in output


@pytest.mark.parametrize("mode", ["--decode", "--add_vision_id"])
def test_processes_find_what_one_finds(check: Check, tmp_path: Path, mode: str) -> None:
    records = [record for _, record in ALL]
    write_lines(tmp_path / "set.jsonl", [*records, *(sample(str(number), "Hi?") for number in range(300)), *records])
    outputs = []
    for workers in (0, 2):
        code, output, _ = check("--dataset_use", "set", "--write_clean", mode, workers=workers)
        files = [(tmp_path / "out" / f"set_{kind}.jsonl").read_bytes() for kind in ("problems", "valid")]
        table = [line for line in output.splitlines() if line.startswith("set")]
        outputs.append((code, table, files))
    assert outputs[0] == outputs[1]


# --- what is written ---------------------------------------------------------------------------------------------


def test_usable_lines_stay_byte_for_byte(check: Check, tmp_path: Path) -> None:
    kept = [
        '{"id": "a", "x": null, "n": 1.50, "big": 12345678901234567890123, '
        '"conversations":[{"from":"human","value":"Hi"},'
        '{"from": "gpt", "value": "Grün \\u00fc \\ud83d\\ude00"}], "x": 1}',
        json.dumps(sample("b", image="a.jpg"), ensure_ascii=False),
    ]
    broken = ['{"id": "cut", ', *(json.dumps(record) for _, record in BAD)]
    lines = [broken[0], kept[0], "", *broken[1:], kept[1], '{"id": "cut", "conv']
    (tmp_path / "set.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert check("--dataset_use", "set", "--write_clean")[0] == 1
    assert (tmp_path / "out" / "set_valid.jsonl").read_bytes() == "".join(line + "\n" for line in kept).encode()
    found = read_lines(tmp_path / "out" / "set_problems.jsonl")
    bad_json = [record["line"] for record in found if record["category"] == "bad_json"]
    assert bad_json == [1, len(lines)]


def test_an_indented_array_becomes_lines(check: Check, tmp_path: Path) -> None:
    records = [*GOOD, BAD[0][1]]
    (tmp_path / "set.json").write_text(json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")
    assert check("--dataset_use", "set", "--write_clean", file="set.json")[0] == 1
    assert problems(tmp_path) == {BAD[0][1]["id"]: BAD[0][0]}
    valid = read_lines(tmp_path / "out" / "set_valid.jsonl")
    assert valid == GOOD
    assert [list(record) for record in valid] == [list(record) for record in GOOD]


def test_parquet_with_embedded_pictures(check: Check, tmp_path: Path, media: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def embedded(name: str) -> dict[str, Any]:
        return {"bytes": (media / name).read_bytes(), "path": name}

    rows = [sample(name, image=embedded(name)) for name in ("a.jpg", "page.jpg", "b.jpg", "empty.jpg")]
    rows.append({**rows[0], "id": "again"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    assert check("--dataset_use", "set", "--write_clean", "--decode", file="set.parquet")[0] == 1
    found = problems(tmp_path)
    assert found.pop("again") == ["duplicate"]
    assert found.pop("page.jpg") == ["wrong_type"]
    assert list(found) == ["empty.jpg"]
    valid = read_lines(tmp_path / "out" / "set_valid.jsonl")
    assert [record["id"] for record in valid] == ["a.jpg", "b.jpg"]
    assert valid[0]["source"] is None
    assert valid[0]["conversations"] == rows[0]["conversations"]
    (tmp_path / "again.jsonl").write_bytes((tmp_path / "out" / "set_valid.jsonl").read_bytes())
    assert check("--dataset_use", "set", "--decode", file="again.jsonl")[0] == 0


def test_a_hugging_face_dataset_with_columns_of_other_names(check: Check, tmp_path: Path, media: Path) -> None:
    from datasets import Dataset

    rows = [sample(name, "Hi?", picture={"bytes": (media / name).read_bytes()}) for name in ("a.jpg", "b.jpg")]
    rows[1]["conversations"][0]["value"] = "<image>"
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    entry = {"hf_dataset": str(tmp_path / "saved"), "columns": {"image": "picture"}}
    (tmp_path / "other.py").write_text(f"data_dict = {{'set': {entry!r}}}")
    assert check("--dataset_use", "set", "--write_clean", "--dataset_registry", str(tmp_path / "other.py"))[0] == 1
    assert problems(tmp_path) == {"a.jpg": ["too_few_tags"]}
    (tmp_path / "again.jsonl").write_bytes((tmp_path / "out" / "set_valid.jsonl").read_bytes())
    assert check("--dataset_use", "set", "--decode", file="again.jsonl")[0] == 0
    assert [record["id"] for record in read_lines(tmp_path / "again.jsonl")] == ["b.jpg"]


def test_objects_that_fill_tags(check: Check, tmp_path: Path) -> None:
    """ms-swift's grounding format: filled, or refused by name; other objects make another sample."""

    def objects(answer: str, *boxes: list[int]) -> dict[str, Any]:
        return sample(answer, answer=answer, image="a.jpg", objects={"bbox": list(boxes)})

    good = [objects("<bbox>", [1, 2, 3, 4]), {**objects("<bbox>", [1, 2, 3, 5]), "id": "other"}]
    bad = [objects("<bbox><bbox>", [1, 2, 3, 4]), objects("At <bbox>", [1, 2, 401, 4])]
    bad += [sample("none", answer="No <bbox>", image="a.jpg")]
    write_lines(tmp_path / "set.jsonl", [*good, *bad])
    assert check()[0] == 1
    found = [["bad_record"], ["bad_boxes"], ["bad_record"]]
    assert problems(tmp_path) == {record["id"]: one for record, one in zip(bad, found, strict=True)}


def test_packed_rows_lose_their_bad_members_alone(check: Check, tmp_path: Path) -> None:
    rows = [[GOOD[0], BAD[0][1], GOOD[1]], [BAD[1][1]], GOOD[2:4], GOOD[4]]
    write_lines(tmp_path / "set.jsonl", rows)
    assert check("--dataset_use", "set", "--write_clean")[0] == 1
    found = [(record["line"], record["member"]) for record in read_lines(tmp_path / "out" / "set_problems.jsonl")]
    assert found == [(1, 2), (2, 1)]
    assert read_lines(tmp_path / "out" / "set_valid.jsonl") == [[GOOD[0], GOOD[1]], GOOD[2:4], GOOD[4]]


def test_duplicates_name_the_first_one(check: Check, tmp_path: Path) -> None:
    """Whatever its id, other fields, and the order of keys; with several files and packed rows."""
    one, two = sample("one", "Hi?", "Ho."), sample("two", "Hi?", "Hum.")
    reordered = dict(reversed(list({**one, "id": "three", "image": None, "source": "x"}.items())))
    write_lines(tmp_path / "a.jsonl", [[two, one], {**two, "id": "four"}])
    write_lines(tmp_path / "b.jsonl", [sample("five", "Hi?", "Hm."), reordered])
    entry = {"annotation_path": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], "data_path": ""}
    (tmp_path / "other.py").write_text(f"data_dict = {{'both': {entry!r}}}")
    assert check("--dataset_use", "both", "--dataset_registry", str(tmp_path / "other.py"))[0] == 1
    found = read_lines(tmp_path / "out" / "both_problems.jsonl")
    assert [(record["id"], record["category"]) for record in found] == [("four", "duplicate"), ("three", "duplicate")]
    assert "as line 1, member 1. " in found[0]["reason"]
    assert f"as line 1, member 2 of {tmp_path / 'a.jsonl'}. " in found[1]["reason"]


# --- the command line --------------------------------------------------------------------------------------------


def test_a_file_without_a_registry(check: Check, tmp_path: Path, media: Path) -> None:
    write_lines(tmp_path / "some.data.jsonl", [*GOOD, BAD[0][1]])
    assert check("--annotation_path", str(tmp_path / "some.data.jsonl"), "--data_path", str(media))[0] == 1
    assert problems(tmp_path, "some") == {BAD[0][1]["id"]: BAD[0][0]}


def test_all_rows_are_checked_whatever_the_percentage(check: Check, tmp_path: Path) -> None:
    write_lines(tmp_path / "set.jsonl", GOOD)
    _, output, _ = check("--dataset_use", "set%10")
    assert f"of {len(GOOD)}" in output
    assert "whatever percentage" in output


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ((), ["Name the data"]),
        (("--dataset_use", "sit"), ["'sit'", "Did you mean 'set'?"]),
        (("--dataset_use", "set", "--decod"), ["--decod", "Did you mean 'decode'"]),
        (("--dataset_use", "set", "--model_name_or_path", "/none"), ["/none"]),
        (("--dataset_use", "set", "--output", "set.jsonl"), ["--output set.jsonl"]),
        (("--annotation_path", "none.jsonl"), ["none.jsonl does not exist"]),
    ],
)
def test_mistakes_are_one_message(check: Check, tmp_path: Path, flags: tuple[str, ...], parts: list[str]) -> None:
    write_lines(tmp_path / "set.jsonl", GOOD)
    code, output, messages = check(*(flags or ("--data_path", "x")))
    assert code == 2
    assert output == ""
    assert messages.count("error: ") == 1
    assert "Traceback" not in messages
    for part in parts:
        assert part in messages


def test_what_is_read_is_not_written_over(check: Check, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    lines = write_lines(tmp_path / "out" / "set_valid.jsonl", GOOD).read_bytes()
    code, _, messages = check("--dataset_use", "set", "--write_clean", file="out/set_valid.jsonl")
    assert code == 2
    assert "set_valid.jsonl is an annotation file of dataset 'set'" in messages
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [lines]


class DyingChecker(SampleChecker):
    """Ends its process, as a decoder that crashes would."""

    def check_row(self, samples: object) -> list[Finding]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []


def test_a_process_that_dies_is_one_message(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", GOOD * 100)
    table = open_annotations(DatasetSpec("set", (str(tmp_path / "a.jsonl"),), ""))
    checker = DyingChecker(default_settings(DataArguments(dataset_use="set")), (), False)
    with pytest.raises(UserError, match="A process died while it checked dataset 'set'.*--workers 1"):
        list(check_table(table, checker, workers=2))


def test_a_dataset_without_rows(check: Check, tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text("\n")
    code, _, messages = check()
    assert code == 2
    assert "has no rows" in messages


def test_keys_that_nothing_reads_are_named(check: Check, tmp_path: Path) -> None:
    record = sample("odd", image="a.jpg")
    record["conversations"][1] |= {"score": 3, "loss": False, "empty": None}
    record["conversations"] += [{"from": "human", "value": "So?"}, {"from": "gpt", "value": "Yes.", "mood": "calm"}]
    write_lines(tmp_path / "set.jsonl", [*GOOD, record])
    code, output, _ = check("--dataset_use", "set")
    assert code == 0
    assert "Dataset 'set': nothing reads 'mood' of turns, 'score', 'score' of turns." in output


def test_duplicates_of_other_forms(check: Check, tmp_path: Path) -> None:
    """The same question and answer, of the same clip; other keys may differ."""
    asked = {"query": "<video>?", "response": "Yes.", "video_path": "clip.mp4"}
    clips = [
        {**asked, "start": 0},
        {**asked, "start": 0.2},
        {**asked, "response": "No."},
        {**asked, "start": 0, "id": 1},
    ]
    write_lines(tmp_path / "set.jsonl", [*clips, {"text": "a"}, {"text": "b"}])
    check("--dataset_use", "set")
    found = [(record["line"], record["category"]) for record in read_lines(tmp_path / "out" / "set_problems.jsonl")]
    assert found == [(5, "bad_record"), (6, "bad_record"), (4, "duplicate")]


def test_a_false_label_is_a_bad_answer_except_for_a_task_that_reads_it(check: Check, tmp_path: Path) -> None:
    write_lines(tmp_path / "set.jsonl", [{**sample("one"), "image": "a.jpg", "label": False}])
    code, output, _ = check("--dataset_use", "set")
    assert code == 1 and "'label' false, which in KTO marks a bad answer" in output
    assert check("--dataset_use", "set", "--task", "classification")[0] == 0
