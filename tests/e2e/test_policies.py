"""What happens to samples that cannot be used, are too long, or are unusual: left out or kept, counted and said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenvl.cli.check_image import command as check_image
from qwenvl.cli.show_sample import main as show_sample
from qwenvl.data.encoding.encoded import Event
from qwenvl.train.records import skipped_samples as report_module
from qwenvl.train.records.skipped_samples import DataReport
from qwenvl.train.train_qwen import main
from tests.e2e.runs import history, largest_difference, torchrun, weights
from tests.e2e.test_errors import GOOD, Place, sample

OTHER = {**GOOD, "id": "other", "conversations": [GOOD["conversations"][0], {"from": "gpt", "value": "Grey and loud."}]}
BAD = sample("<image>", image="no.jpg")
TEXT = {"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello you."}]}


@pytest.fixture
def place(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Place:
    return Place(tmp_path, tiny_checkpoint("qwen3_vl"))


def reported(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "bad_samples.jsonl").read_text().splitlines()]


def summary(stderr: str) -> list[str]:
    return [line.partition("warning: ")[2] for line in stderr.splitlines() if "warning: Dataset 'set': " in line]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_and_counted_once(
    place: Place, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    mismatch = sample("<image><image>", image=["good.jpg"])
    place.write(GOOD, BAD, '{"id": 4, ', [GOOD, mismatch, OTHER], OTHER)
    settings = {"on_bad_sample": "skip", "num_train_epochs": 3, "max_steps": None, "dataloader_num_workers": workers}
    assert main(place.flags(**settings)) == 0
    assert summary(capsys.readouterr().err) == [
        "Dataset 'set': 3 samples left out: cannot be used (see bad_samples.jsonl)."
    ]
    records = sorted(reported(place.output), key=lambda record: record["line"])
    where = {"dataset": "set", "file": str(place.annotations)}
    reasons = [record.pop("reason") for record in records]
    assert records == [
        {**where, "line": 2, "member": None, "id": "bad-7", "category": "missing_file"},
        {**where, "line": 3, "member": None, "id": None, "category": "bad_json"},
        {**where, "line": 4, "member": 2, "id": "bad-7", "category": "too_many_tags"},
    ]
    assert reasons[0] == f"{place.folder}/no.jpg does not exist."


def test_what_an_earlier_run_reported_is_not_kept(place: Place) -> None:
    place.write(GOOD, BAD)
    assert main(place.flags(on_bad_sample="skip")) == 0
    assert len(reported(place.output)) == 1
    place.write(GOOD, OTHER)
    assert main(place.flags(on_bad_sample="skip")) == 0
    assert not (place.output / "bad_samples.jsonl").exists()


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_others_train_as_if_the_bad_sample_were_not_there(place: Place, flatten: bool, packed: bool) -> None:
    """One batch, plain gradient descent: the weights are those of a run on the good samples alone."""
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.1}
    settings |= {"data_flatten": flatten, "on_bad_sample": "skip", "weight_decay": 0.0}
    good, with_bad = [GOOD, OTHER, TEXT], [GOOD, BAD, OTHER, TEXT]
    for name, records in (("without", good), ("with", with_bad)):
        place.write(*([records] if packed else records))
        assert main(place.flags(output=place.folder / name, **settings)) == 0
    assert largest_difference(place.folder / "without", place.folder / "with") < 1e-6
    assert largest_difference(place.folder / "without", place.model) > 1e-3
    assert history(place.folder / "without") == pytest.approx(history(place.folder / "with"), abs=1e-5)


@pytest.mark.parametrize("flatten", [False, True])
def test_a_batch_of_bad_samples_alone_trains_nothing(place: Place, flatten: bool) -> None:
    place.write(BAD, GOOD, {**BAD, "image": "empty.jpg"})
    settings = {"on_bad_sample": "skip", "max_steps": None, "num_train_epochs": 1, "data_flatten": flatten}
    assert main(place.flags(per_device_train_batch_size=1, **settings)) == 0
    losses = history(place.output)
    assert sorted(loss > 0 for loss in losses) == [False, False, True], losses
    assert all(torch.isfinite(tensor).all() for tensor in weights(place.output).values())


def long_sample(words: int) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": "<image>\nFirst?"},
        {"from": "gpt", "value": "One."},
        {"from": "human", "value": "<image>\n" + "word " * words},
        {"from": "gpt", "value": "Two."},
    ]
    return {"id": "long", "image": ["good.jpg", "good.jpg"], "conversations": turns}


def test_too_long_samples_are_dropped_and_counted(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.write(GOOD, long_sample(200), OTHER)
    assert main(place.flags(model_max_length=100, max_steps=4)) == 0
    assert summary(capsys.readouterr().err) == [
        "Dataset 'set': 1 sample left out: longer than --model_max_length (see bad_samples.jsonl)."
    ]
    assert [(record["id"], record["category"]) for record in reported(place.output)] == [("long", "overlength")]


def test_too_long_samples_are_cut_after_whole_turns(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The cut turn's picture goes with it, or the model would be given more patches than it has tokens for."""
    place.write(long_sample(200), long_sample(300), sample("word " * 200))
    settings = {"model_max_length": 100, "overlength": "truncate_turns", "max_steps": 4}
    assert main(place.flags(**settings)) == 0
    assert summary(capsys.readouterr().err) == [
        "Dataset 'set': 1 sample left out: longer than --model_max_length (see bad_samples.jsonl).",
        "Dataset 'set': 2 samples shortened by whole turns to --model_max_length.",
    ]


@pytest.mark.parametrize(("use", "rows"), [("set", 8), ("set%50", 4), ("set%12.5", 1), ("set%250", 20)])
def test_percents_through_the_front_door(place: Place, use: str, rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    place.write(*[GOOD] * 8)
    assert main(place.flags(dataset_use=use, max_steps=1)) == 0
    assert re.search(rf"^set +8 +[\d.]+% +{rows} +-$", capsys.readouterr().err, re.MULTILINE)


def test_thinking_that_does_not_fit_is_said_once_and_counted(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    thinking = [
        sample(
            id=str(n), conversations=[{"from": "human", "value": "?"}, {"from": "gpt", "value": "<think>x</think>y"}]
        )
        for n in range(3)
    ]
    place.write(*thinking, GOOD)
    assert main(place.flags(max_steps=4)) == 0
    error = capsys.readouterr().err
    assert error.count("does not fit the checkpoint's chat template") == 1
    assert summary(error) == [
        "Dataset 'set': 3 samples with a <think> block where the chat template opens none, or without the one it opens."
    ]


def test_keys_that_nothing_reads_are_named_once(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """In training, in the dry run, and by show_sample; keys that are read, null or of no meaning are none of them."""
    turns = [
        {"from": "human", "value": [{"type": "text", "text": "Hi", "cached": True}], "mood": "calm", "loss": None},
        {"from": "gpt", "value": "Hello.", "loss": True, "note": None},
    ]
    place.write(GOOD, *[{"id": str(n), "source": "web", "conversations": turns, "score": 3} for n in range(3)])
    keys = ("'score'", "'mood' of turns", "'cached' of text parts")
    named = [f"dataset 'set': nothing reads {key}." for key in keys]

    def said() -> list[str]:
        lines = capsys.readouterr().err.splitlines()
        return [line.partition("warning: ")[2] for line in lines if "nothing reads" in line]

    assert main(place.flags(max_steps=4)) == 0
    assert said() == named + sorted(text.replace("dataset", "Dataset") for text in named)
    assert main([*place.flags(max_steps=4), "--dry_run", "True"]) == 0
    assert said() == named
    file, folder = str(place.annotations), str(place.folder)
    flags = ["--annotation_path", file, "--data_path", folder, "--model_name_or_path", str(place.model), "--all"]
    assert show_sample(flags) == 0
    assert said() == [text.replace("'set'", repr(place.annotations.stem)) for text in named]


def test_a_key_of_a_single_row_is_named_before_training(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """By check_image and the dry run alike: both read all rows."""
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    rows: list[dict[str, Any]] = [{"id": str(number), "conversations": turns} for number in range(2000)]
    rows[1501]["score"] = 3
    place.write(*rows)
    assert main([*place.flags(max_steps=1), "--dry_run", "True"]) == 0
    assert "dataset 'set': nothing reads 'score'." in capsys.readouterr().err
    flags = ["--annotation_path", str(place.annotations), "--data_path", str(place.folder)]
    check_image.main([*flags, "--output", str(place.folder), "--workers", "0"])
    assert "nothing reads 'score'" in capsys.readouterr().out


def test_coordinates_that_are_not_converted_are_said(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Once, with the count of samples, in training; and by the dry run, show_sample and check_image alike."""
    point, words = '{"x": 3, "y": 4}', "Nothing to click."
    answers = [point, '{"point": [3, 4]}', f"{point}.", words]
    turns = [[{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": text}] for text in answers]
    fields = {"image": "good.jpg", "bbox_format": "pixel"}
    place.write(*[{"id": str(number), "conversations": one, **fields} for number, one in enumerate(turns)])
    assert main(place.flags(max_steps=2)) == 0
    error = capsys.readouterr().err
    assert error.count("no box or point in a form that is converted (docs/data.md, Boxes).") == 1
    assert summary(error) == [
        "Dataset 'set': 2 samples with a bbox_format and numbers, but no box or point in a form that is converted."
    ]
    assert main([*place.flags(max_steps=2), "--dry_run", "True"]) == 0
    dry = "Dataset 'set': 2 samples with a bbox_format and numbers, but no box or point in a form that is converted."
    assert dry in capsys.readouterr().err
    flags = ["--annotation_path", str(place.annotations), "--data_path", str(place.folder)]
    assert show_sample([*flags, "--model_name_or_path", str(place.model), "--all"]) == 0
    assert capsys.readouterr().out.count("with a bbox_format and numbers, but no box or point") == 2
    check_image.main([*flags, "--output", str(place.folder), "--workers", "0"])
    said = [line for line in capsys.readouterr().out.splitlines() if "bbox_format" in line]
    assert len(said) == 1
    assert "2 samples with a bbox_format and numbers, but no box or point in a form that is converted." in said[0]


def test_two_ranks_leave_out_what_either_finds(place: Place) -> None:
    """Over two epochs each bad sample is met by both ranks; it is still one line, and nobody waits for nobody."""
    place.write(GOOD, BAD, OTHER, {**BAD, "id": "bad-8"}, TEXT)
    settings = {"on_bad_sample": "skip", "max_steps": None, "num_train_epochs": 4, "per_device_train_batch_size": 1}
    settings |= {"tune_mm_mlp": False, "mm_projector_lr": 1e-3}
    script = place.folder / "train.py"
    script.write_text("from qwenvl.train.train_qwen import main\n\nraise SystemExit(main())\n")
    output = torchrun(script, *place.flags(**settings))
    assert sorted(record["id"] for record in reported(place.output)) == ["bad-7", "bad-8"]
    assert summary(output) == ["Dataset 'set': 2 samples left out: cannot be used (see bad_samples.jsonl)."]
    # Said by one of them: what every rank finds out alike, the tables, and the figures.
    for text in ("Videos are decoded by", "--mm_projector_lr has no effect", "Training starts.", "step 1 of 12: loss "):
        assert output.count(text) == 1, text
    assert "2 devices (cpu) x batches of 1 x 1 accumulated" in output


def test_what_all_ranks_know_is_said_by_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    event = Event("bad", "set", "one", {"dataset": "set"})
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        report = DataReport(str(tmp_path))
        report.add([event], common=True)
        report.add([event])  # met again in training: known
        assert (tmp_path / "bad_samples.jsonl").exists() == (rank == "0")
    assert len(caplog.records) == 1


def test_ranks_tell_each_other_what_is_new_and_count_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of a run asks at every evaluation, and a large dataset has many events."""
    mine, theirs, later = (Event("truncated", "set", message) for message in ("mine", "theirs", "later"))
    other = {("truncated", one.message): one for one in (mine, theirs)}
    sent: list[list[tuple[str, str]]] = []

    def gather(news: dict[tuple[str, str], Event]) -> list[dict[tuple[str, str], Event]]:
        sent.append(list(news))
        return [news, other]

    monkeypatch.setattr(report_module, "gather_objects", gather)
    report = DataReport(str(tmp_path))
    report.add([mine, mine])
    assert report.gather() == [mine, theirs]
    report.add([mine, later])
    assert report.summary() == ["Dataset 'set': 3 samples shortened by whole turns to --model_max_length."]
    assert sent == [[("truncated", "mine")], [("truncated", "later")]]


def test_long_lines_and_other_alphabets_survive(tmp_path: Path) -> None:
    report = DataReport(str(tmp_path))
    record = {"dataset": "ü", "reason": "字" * 5000}
    report.add([Event("bad", "ü", "one", record), Event("bad", "ü", "one", record)])
    assert report.summary() == ["Dataset 'ü': 1 sample left out: cannot be used (see bad_samples.jsonl)."]
    assert reported(tmp_path) == [record]


def test_a_resumed_run_counts_what_was_left_out_before(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.write(GOOD, BAD, OTHER, TEXT)
    settings = {"on_bad_sample": "skip", "max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    assert main(place.flags(**settings)) == 0
    before = reported(place.output)
    capsys.readouterr()
    assert main(place.flags(**settings)) == 0  # resumes at its end and meets no sample
    assert summary(capsys.readouterr().err) == [
        "Dataset 'set': 1 sample left out: cannot be used (see bad_samples.jsonl)."
    ]
    assert reported(place.output) == before
