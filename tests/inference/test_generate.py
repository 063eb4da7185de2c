from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from qwenvl.cli.make_demo_data.command import make_demo_data
from qwenvl.config import DataArguments
from qwenvl.data.conversation.messages import build_conversation
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.processor import BARE_VIDEO, MARKED_VIDEO, build_encoder, limits_as_flags
from qwenvl.data.media.video.decode import choose_backend
from qwenvl.data.sources.table import open_annotations
from qwenvl.data.types import DatasetSpec, ImageItem, Message, Sample, TextPart, VideoItem
from qwenvl.families import get_family
from qwenvl.inference.generate import ChatModel, Decoding, encode_prompts, generate, open_chat_model
from qwenvl.inference.prompts import Prompt, open_example
from qwenvl.utils.errors import Origin, SampleError, UserError
from tests.data.clips import UNEVEN, encode
from tests.data.media.video.test_decode import make_video

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


Opened = tuple[ChatModel, SampleEncoder]


@pytest.fixture(scope="module")
def opened(tiny_checkpoint: Callable[..., Path]) -> Callable[[str], Opened]:
    """Function of the family: a model, and the encoder with the limits of its processor."""
    known: dict[str, Opened] = {}

    def function(family: str) -> Opened:
        if family not in known:
            chat_model = open_chat_model(str(tiny_checkpoint(family)), device="cpu")
            processor = chat_model.processor  # its published lower limit of a picture would make the tests slow
            processor.image_processor.size = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}
            video = processor.video_processor
            video.do_sample_frames, video.fps, video.min_frames, video.max_frames = True, 2, 2, 4
            limits = limits_as_flags(processor, get_family(family))
            config = chat_model.model.config
            encoder = build_encoder(processor, config, get_family(family), DataArguments(**limits), 1 << 20)
            known[family] = chat_model, encoder
        return known[family]

    return function


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_batches_give_the_answers_of_single_prompts(
    family: str, samples: list[Sample], opened: Callable[[str], Opened]
) -> None:
    chat_model, encoder = opened(family)
    prompts = [open_example(sample, encoder).prompt for sample in samples]
    short = Decoding(max_new_tokens=6)
    batched = generate(chat_model, prompts, decoding=short, batch_size=5)
    assert batched == generate(chat_model, prompts, decoding=short, batch_size=1)
    assert len(set(batched)) > 1  # random weights, but they look at the prompt


def test_padding_stands_on_the_left(samples: list[Sample], opened: Callable[[str], Opened]) -> None:
    chat_model, encoder = opened("qwen3_vl")
    inputs = encode_prompts(chat_model, [open_example(sample, encoder).prompt for sample in samples])
    mask = inputs["attention_mask"]
    assert mask[:, -1].all()
    assert not mask[:, 0].all()
    assert (mask.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_inputs_are_those_of_the_processor_alone(
    family: str, samples: list[Sample], opened: Callable[[str], Opened]
) -> None:
    """Where transformers can open videos itself, it gives the same tokens and pixels."""
    if choose_backend().name != "torchcodec":
        pytest.skip("transformers opens videos with torchcodec alone")
    chat_model, encoder = opened(family)
    for sample in samples:
        prompt = open_example(sample, encoder).prompt
        ours = encode_prompts(chat_model, [prompt])
        turns = [
            {"role": turn.role, "content": [stock_part(part, sample) for part in turn.parts]}
            for turn in prompt.messages
        ]
        template = chat_model.processor.chat_template
        theirs = chat_model.processor.apply_chat_template(
            turns,
            chat_template=template.replace(MARKED_VIDEO, BARE_VIDEO) if family == "qwen3_vl" else template,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert set(ours) - {"position_ids"} == set(theirs)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_prompts_have_the_tokens_of_training(
    family: str, samples: list[Sample], opened: Callable[[str], Opened]
) -> None:
    chat_model, encoder = opened(family)
    for sample in samples:
        (plan,) = encoder.plans(sample)
        asked = encode_prompts(chat_model, [open_example(sample, encoder).prompt])["input_ids"][0]
        assert asked.tolist() == plan.tokens.input_ids[: plan.tokens.starts[-1]].tolist()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_prompts_with_clips_have_the_positions_of_training(
    family: str, tmp_path: Path, opened: Callable[[str], Opened]
) -> None:
    """Of a clip that lasts longer than it is wide: what stands behind it goes on behind its last second."""
    make_video(tmp_path / "a.mp4", frames=20, fps=1)
    Image.new("RGB", (70, 90)).save(tmp_path / "a.png")
    chat_model, encoder = opened(family)
    answer = {"from": "gpt", "value": "Well."}
    records = [
        {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>When?"}, answer]},
        {"conversations": [{"from": "human", "value": "How?"}, answer]},
        {
            "video": ["a.mp4", "a.mp4"],
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<video>and<image>then<video>?"}, answer],
        },
    ]
    trained = [
        open_example(Sample(Origin("d", "f", number), record, str(tmp_path)), encoder)
        for number, record in enumerate(records)
    ]
    inputs = encode_prompts(chat_model, [one.prompt for one in trained])
    for number, one in enumerate(trained):
        kept = inputs["attention_mask"][number].bool()
        length = int(kept.sum())
        wanted = one.encoded.tokens.position_ids[:, :length]
        assert torch.equal(inputs["position_ids"][:, number, kept], wanted), number
    assert "position_ids" not in encode_prompts(chat_model, [trained[1].prompt])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_uneven_frames_have_the_times_of_training(family: str, tmp_path: Path, opened: Callable[[str], Opened]) -> None:
    """Of a video without a constant rate: the prompt has the timestamps of training."""
    encode(tmp_path / "a.mp4", "libx264", UNEVEN)
    turns = [{"from": "human", "value": "<video>When?"}, {"from": "gpt", "value": "Late."}]
    sample = Sample(Origin("d", "f", 1), {"video": "a.mp4", "conversations": turns}, str(tmp_path))
    chat_model, encoder = opened(family)
    asked = encode_prompts(chat_model, [open_example(sample, encoder).prompt])["input_ids"][0]
    decode = chat_model.processor.tokenizer.decode
    times = [
        re.findall(r"<(\d+\.\d) seconds>", decode(ids)) for ids in (asked, encoder.plans(sample)[0].tokens.input_ids)
    ]
    assert times[0] == times[1] == (["0.4", "9.7"] if family == "qwen3_vl" else [])


def stock_part(part: object, sample: Sample) -> dict[str, object]:
    if isinstance(part, ImageItem):
        return {"type": "image", "image": Image.open(f"{sample.data_path}/{part.source}")}
    if isinstance(part, VideoItem):
        return {"type": "video", "path": f"{sample.data_path}/{part.source}"}
    return {"type": "text", "text": part.text}  # type: ignore[attr-defined]


def test_the_answer_is_split_off(samples: list[Sample], opened: Callable[[str], Opened]) -> None:
    example = open_example(samples[-1], opened("qwen3_vl")[1])
    assert [message.text for message in example.prompt.messages] == ["How are you?"]
    assert example.prompt.question == "How are you?"
    assert example.expected == "Well."


def test_a_sample_that_ends_in_a_question_is_refused(opened: Callable[[str], Opened]) -> None:
    values = [("human", "Hello?"), ("gpt", "Yes."), ("human", "Who?")]
    sample = Sample(Origin("d", "f.jsonl", 3), {"conversations": [{"from": f, "value": v} for f, v in values]})
    with pytest.raises(SampleError, match=r"f\.jsonl:3.*end in an answer"):
        open_example(sample, opened("qwen3_vl")[1])


@pytest.mark.parametrize(("family", "box"), [("qwen3_vl", [0, 0, 500, 1000]), ("qwen2_5_vl", [])])
def test_boxes_are_as_the_family_writes_them(
    family: str, box: list[int], tmp_path: Path, opened: Callable[[str], Opened]
) -> None:
    """A picture of 20 x 10 pixels, which is enlarged, and its left half."""
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": '{"bbox_2d": [0, 0, 10, 10]}'}]
    record = {"image": "a.png", "conversations": turns}
    sample = Sample(Origin("d", "f.jsonl", 3), record, str(tmp_path), bbox_format="pixel")
    example = open_example(sample, opened(family)[1])
    found = json.loads(example.expected)["bbox_2d"]
    height, width = example.prompt.plans[0].resized
    assert found == (box if family == "qwen3_vl" else [0, 0, width // 2, height - 1])


def test_a_missing_folder_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder|cannot open"):
        open_chat_model(str(tmp_path / "none"), device="cpu")


def test_what_ended_an_answer_is_known(
    samples: list[Sample], opened: Callable[[str], Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each row of a batch alone: one ends at its first token, which is made one that ends answers."""
    chat_model, encoder = opened("qwen3_vl")
    prompts = [open_example(sample, encoder).prompt for sample in samples]
    short = Decoding(max_new_tokens=3)
    cut = generate(chat_model, prompts, decoding=short)
    assert {answer.finish_reason for answer in cut} == {"length"} and not any(answer.thinking for answer in cut)
    inputs = encode_prompts(chat_model, prompts)
    first = chat_model.model.generate(**inputs, max_new_tokens=1)[:, -1].tolist()
    for ends in ([first[0]], first[0]):
        monkeypatch.setattr(chat_model.model.generation_config, "eos_token_id", ends)
        ended = [answer.finish_reason == "stop" for answer in generate(chat_model, prompts, decoding=short)]
        assert ended[0] and not all(ended)
        assert all(stopped for stopped, token in zip(ended, first, strict=True) if token == first[0])


def test_a_cut_thought_is_known(tiny_checkpoint: Callable[..., Path]) -> None:
    chat_model = open_chat_model(str(tiny_checkpoint("qwen3_vl", "thinking")), device="cpu")
    prompt = Prompt((Message("user", (TextPart("Which?"),)),))
    (answer,) = generate(chat_model, [prompt], decoding=Decoding(max_new_tokens=3))
    assert (answer.finish_reason, answer.thinking) == ("length", True)
    closed = replace(chat_model, template_kwargs={"enable_thinking": False})
    assert not generate(closed, [prompt], decoding=Decoding(max_new_tokens=3))[0].thinking


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "left"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def agent(*last: dict[str, object]) -> Sample:
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    return Sample(Origin("d", "f.jsonl", 3), {"messages": [*turns, *last], "tools": [TOOL]})


def test_a_template_without_tools_is_refused_as_in_training(opened: Callable[[str], Opened]) -> None:
    conversation = build_conversation(agent(), ())
    prompt = Prompt(conversation.messages[:-1], tools=conversation.tools)
    with pytest.raises(SampleError, match="leaves out the tool 'look'"):
        generate(opened("qwen2_5_vl")[0], [prompt])


def test_prompts_are_written_as_in_training(opened: Callable[[str], Opened]) -> None:
    chat_model, encoder = opened("qwen3_vl")
    sample = agent({"role": "tool", "content": "a cat"}, {"role": "assistant", "content": "Left."})
    example = open_example(sample, encoder)
    ids = encode_prompts(chat_model, [example.prompt])["input_ids"][0].tolist()
    tokens = example.encoded.tokens
    assert tokens.input_ids[: len(ids)].tolist() == ids
    assert chat_model.processor.decode(tokens.input_ids[len(ids) :]) == "Left.<|im_end|>\n"


@pytest.mark.parametrize("trained", [True, False])
def test_an_answer_that_is_a_call_is_expected_as_the_template_writes_it(
    trained: bool, opened: Callable[[str], Opened]
) -> None:
    expected = '<tool_call>\n{"name": "look", "arguments": {"at": "left"}}\n</tool_call>'
    assert open_example(agent(), opened("qwen3_vl")[1]).expected == expected
    more = ({"role": "user", "content": "Again."}, {"role": "assistant", "tool_calls": [CALL, CALL], "loss": trained})
    assert open_example(agent(*more), opened("qwen3_vl")[1]).expected == f"{expected}\n{expected}"


def test_answers_are_text_alone(samples: list[Sample], opened: Callable[[str], Opened]) -> None:
    """No special token is left in an answer."""
    chat_model, encoder = opened("qwen3_vl")
    prompts = [open_example(sample, encoder).prompt for sample in samples[:3]]
    answers = generate(chat_model, prompts, decoding=Decoding(max_new_tokens=4))
    for answer, token in itertools.product(answers, chat_model.processor.tokenizer.all_special_tokens):
        assert token not in answer.text
