"""The tool that checks data, with a model: what passes is what training takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoProcessor

from qwenvl.cli.check_image.samples import RESERVED_TOKENS, SampleChecker, default_settings
from qwenvl.config import DataArguments
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.processor import build_encoder
from qwenvl.data.sources.table import open_annotations
from qwenvl.data.types import DatasetSpec, Sample
from qwenvl.families import get_family
from qwenvl.utils.errors import Origin, SampleError
from tests.cli.checking import ALL, GOOD, Check, problems, sample, write_lines


def build(checkpoint: Path, max_length: int = 4096) -> SampleEncoder:
    config, processor = AutoConfig.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    family = get_family(config.model_type)
    return build_encoder(processor, config, family, DataArguments(dataset_use="d"), max_length)


def accepts(encoder: SampleEncoder, one: Sample) -> bool:
    try:
        encoder.encode([encoder.plans(one)[0]], one)[0]
    except SampleError:
        return False
    return True


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_training_takes_what_passes_and_refuses_the_rest(
    family: str, check: Check, tmp_path: Path, media: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    long, limit = sample("long", "Hi?", "word " * 5000), 4096
    write_lines(tmp_path / "set.jsonl", [*(record for _, record in ALL), long, sample("cut", image="cut.jpg")])
    model = ["--model_name_or_path", str(tiny_checkpoint(family)), "--model_max_length", str(limit)]
    code, output, _ = check("--dataset_use", "set", "--write_clean", "--decode", *model)
    assert code == 1
    assert "Not checked" not in output
    found = problems(tmp_path)
    assert found["long"] == ["overlength"]
    encoder = build(tiny_checkpoint(family), limit)
    passed = open_annotations(DatasetSpec("d", (str(tmp_path / "out" / "set_valid.jsonl"),), str(media)))
    assert [one.record["id"] for (one,) in passed] == [record["id"] for record in GOOD]
    assert all(accepts(encoder, one) for (one,) in passed)
    for (one,) in open_annotations(DatasetSpec("d", (str(tmp_path / "set.jsonl"),), str(media))):
        taken = accepts(encoder, one)
        assert taken == (set(found.get(one.record["id"], [])) <= {"tag_in_answer", "duplicate"})


words = st.sampled_from(["<image>", "<video>", "hello", "<|image_pad|>", '"bbox_2d": [1, 2, 99, 200]', "\ud83d"])
turns = st.lists(
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system", "tool", "cat"]), "value": words}),
    max_size=3,
)
names = st.sampled_from(["a.jpg", "cut.jpg", "none.jpg", "wide.png", ["a.jpg", "b.jpg"], None, 3])
records = st.fixed_dictionaries(
    {"conversations": turns},
    optional={
        "image": names,
        "video": st.just("one.mp4"),
        "system": words,
        "bbox_format": st.sampled_from(["pixel", 1]),
    },
)


@settings(max_examples=150)
@given(record=records)
@example(record={"conversations": [{"from": "gpt", "value": "<image>"}, {"from": "system", "value": "late"}]})
def test_any_record_passes_if_training_takes_it(
    record: dict[str, Any], media: Path, tiny_checkpoint: Callable[..., Path], encoders: dict[str, SampleEncoder]
) -> None:
    encoder = encoders.setdefault("qwen3_vl", build(tiny_checkpoint("qwen3_vl")))
    one = Sample(Origin("d", "f", 1), record, str(media))
    checker = SampleChecker(encoder.settings, encoder.reserved_tokens, False, decode=True, encoder=encoder)
    (finding,) = checker.check_row([one])
    found = [problem.category for problem in finding.problems]
    assert accepts(encoder, one) == (not set(found) - {"tag_in_answer"})
    alone = SampleChecker(default_settings(DataArguments(dataset_use="d")), RESERVED_TOKENS, False, decode=True)
    (finding,) = alone.check_row([one])
    assert [problem.category for problem in finding.problems] == [name for name in found if name != "template"]


@pytest.fixture(scope="module")
def encoders() -> dict[str, SampleEncoder]:
    return {}
