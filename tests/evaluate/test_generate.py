from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from qwenvl.data.annotations import open_annotations
from qwenvl.data.types import DatasetSpec, ImageItem, Origin, Sample, VideoItem
from qwenvl.data.video import choose_backend
from qwenvl.evaluate.generate import Answerer, Prompt, encode_prompts, generate, open_answerer, split_sample
from qwenvl.utilities.errors import SampleError, UserError
from tools.make_demo_data import make_demo_data

TASKS = ("digits", "comparisons", "grounding", "motion")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Pictures, pairs of pictures, videos and text, taking turns."""
    folder = tmp_path_factory.mktemp("data")
    make_demo_data(folder, limit=6)
    tables = [
        open_annotations(DatasetSpec(task, (str(folder / f"{task}_train.jsonl"),), str(folder))) for task in TASKS
    ]
    drawn = [sample for row in range(2) for table in tables for sample in table[row]]
    turns = [{"from": "human", "value": "How are you?"}, {"from": "gpt", "value": "Well."}]
    return [*drawn, Sample(Origin("text", "memory", 1), {"conversations": turns})]


@pytest.fixture(scope="module")
def answerer_of(tiny_checkpoint: Callable[..., Path]) -> Callable[[str], Answerer]:
    opened: dict[str, Answerer] = {}

    def answerer(family: str) -> Answerer:
        if family not in opened:
            opened[family] = open_answerer(str(tiny_checkpoint(family)), device="cpu")
            processor = opened[family].processor  # its published lower limit of a picture would make the tests slow
            processor.image_processor.size = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}
            video = processor.video_processor
            video.do_sample_frames, video.fps, video.min_frames, video.max_frames = True, 2, 2, 4
        return opened[family]

    return answerer


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_batches_give_the_answers_of_single_prompts(
    family: str, samples: list[Sample], answerer_of: Callable[[str], Answerer]
) -> None:
    answerer = answerer_of(family)
    prompts = [split_sample(sample)[0] for sample in samples]
    batched = generate(answerer, prompts, max_new_tokens=6, batch_size=5)
    assert batched == generate(answerer, prompts, max_new_tokens=6, batch_size=1)
    assert len(set(batched)) > 1  # random weights, but they look at the prompt


def test_padding_stands_on_the_left(samples: list[Sample], answerer_of: Callable[[str], Answerer]) -> None:
    inputs = encode_prompts(answerer_of("qwen3_vl").processor, [split_sample(sample)[0] for sample in samples])
    mask = inputs["attention_mask"]
    assert mask[:, -1].all()
    assert not mask[:, 0].all()
    assert (mask.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_inputs_are_those_of_the_processor_alone(
    family: str, samples: list[Sample], answerer_of: Callable[[str], Answerer]
) -> None:
    """Where transformers can open videos itself, it gives the same tokens and pixels."""
    if choose_backend().name != "torchcodec":
        pytest.skip("transformers opens videos with torchcodec alone")
    processor = answerer_of(family).processor
    for sample in samples:
        prompt, _ = split_sample(sample)
        ours = encode_prompts(processor, [prompt])
        turns = [
            {"role": turn.role, "content": [stock_part(part, sample) for part in turn.parts]}
            for turn in prompt.messages
        ]
        theirs = processor.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value)


def stock_part(part: object, sample: Sample) -> dict[str, object]:
    if isinstance(part, ImageItem):  # opened here: where decord is loaded too, torchcodec fails on PNG files
        return {"type": "image", "image": Image.open(f"{sample.data_path}/{part.source}")}
    if isinstance(part, VideoItem):
        return {"type": "video", "path": f"{sample.data_path}/{part.source}"}
    return {"type": "text", "text": part.text}  # type: ignore[attr-defined]


def test_the_answer_is_split_off(samples: list[Sample]) -> None:
    prompt, answer = split_sample(samples[-1])
    assert [message.text for message in prompt.messages] == ["How are you?"]
    assert answer == "Well."
    assert isinstance(prompt, Prompt)


def test_a_sample_that_ends_in_a_question_is_refused() -> None:
    values = [("human", "Hello?"), ("gpt", "Yes."), ("human", "Who?")]
    sample = Sample(Origin("d", "f.jsonl", 3), {"conversations": [{"from": f, "value": v} for f, v in values]})
    with pytest.raises(SampleError, match=r"f\.jsonl:3.*end in an answer"):
        split_sample(sample)


def test_boxes_that_training_would_convert_are_refused() -> None:
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": '{"bbox_2d": [1, 2, 3, 4]}'}]
    with pytest.raises(SampleError, match=r"f\.jsonl:3.*drop bbox_format"):
        split_sample(Sample(Origin("d", "f.jsonl", 3), {"conversations": turns}, bbox_format="pixel"))


def test_a_missing_folder_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be opened"):
        open_answerer(str(tmp_path / "none"), device="cpu")


def test_answers_are_text_alone(samples: list[Sample], answerer_of: Callable[[str], Answerer]) -> None:
    """No special token is left in an answer."""
    answerer = answerer_of("qwen3_vl")
    answers = generate(answerer, [split_sample(sample)[0] for sample in samples[:3]], max_new_tokens=4)
    for answer, token in itertools.product(answers, answerer.processor.tokenizer.all_special_tokens):
        assert token not in answer
