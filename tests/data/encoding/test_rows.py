"""Every trained answer stands behind exactly the ids that a server sends for it, in as few rows as that allows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl.cli.data_args import ToolArguments, open_encoder
from qwenvl.data.conversation.chat_template import ChatTemplate
from qwenvl.data.encoding.encoded import Plan
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.tokenization import IGNORE_INDEX
from qwenvl.data.types import Conversation, ImageItem, Message, Sample, TextPart, VideoItem
from qwenvl.utils.errors import Origin, SampleError

PUBLISHED = ["qwen2_5vl", "qwen3vl", "qwen3_5", "qwen3_5_small", "qwen3_6", "qwen3_8"]
TINY = [("qwen2_vl", None), ("qwen3_vl", None), ("qwen3_vl", "thinking"), ("qwen3_5", None)]


@cache
def opened(folder: str) -> tuple[SampleEncoder, Any]:
    return open_encoder(ToolArguments(model_name_or_path=folder), 1 << 20)


def published(shared_folder: Path, name: str, **settings: Any) -> tuple[SampleEncoder, Any]:
    folder = shared_folder / "processors" / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not here")
    return (
        opened(str(folder))
        if not settings
        else open_encoder(ToolArguments(model_name_or_path=str(folder), **settings), 1 << 20)
    )


def sample(messages: list[dict[str, Any]], **fields: Any) -> Sample:
    return Sample(Origin("d", "f.jsonl", 1), {"messages": messages, **fields})


def stock_ids(processor: Any, messages: list[dict[str, Any]], **arguments: Any) -> list[int]:
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def as_client_sends(messages: list[dict[str, Any]], thinks: bool) -> list[dict[str, Any]]:
    """Turns with thoughts apart, where the template takes them so: as servers give them and clients send them back."""
    sent = []
    for message in messages:
        content = message["content"]
        if thinks and message["role"] == "assistant" and "</think>" in content:
            thought, _, content = content.partition("</think>")
            message = {
                **message,
                "reasoning_content": thought.replace("<think>", "").strip(),
                "content": content.lstrip(),
            }
        sent.append({key: value for key, value in message.items() if key != "loss"})
    return sent


def check_rows(encoder: SampleEncoder, processor: Any, messages: list[dict[str, Any]], **fields: Any) -> list[Plan]:
    """Compare every prompt with the stock one, and see that every answer is trained once."""
    plans = encoder.plans(sample(messages, **fields))
    sent = as_client_sends(messages, encoder.template.writes_thoughts)
    trained = []
    for plan in plans:
        ids, labels = plan.tokens.input_ids.tolist(), plan.tokens.labels.tolist()
        rendering = plan.rendering
        for (start, stop), turn, first, arguments in zip(
            rendering.spans, rendering.turns, plan.tokens.starts, rendering.arguments, strict=True
        ):
            tools = {"tools": fields["tools"]} if "tools" in fields else {}
            assert ids[:first] == stock_ids(processor, sent[:turn], **tools, **arguments)
            target = rendering.text[start:stop]
            own = processor.tokenizer(target, add_special_tokens=False)["input_ids"]
            assert labels[first : first + len(own)] == own
            trained.append((turn, len(own)))
        assert sum(label != IGNORE_INDEX for label in labels) == sum(
            length for turn, length in trained if turn in rendering.turns
        )
    wanted = [n for n, one in enumerate(messages) if one["role"] == "assistant" and one.get("loss", True)]
    assert sorted(turn for turn, _ in trained) == wanted
    return plans


answers = st.sampled_from(
    ["Yo", "\nYo", "  Yo  ", "a\n\nb", "<think>\nsum\n</think>\n\n4", "sum</think>4", "assistant\n", "5 < 6", "Ünï 图"]
)
questions = st.sampled_from(["Hi", "Hi\n", " two  words ", "<tool_response>x", "assistant", "2+2?\n\n", "图 one"])


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": "Be brief."}] * draw(st.integers(0, 1))
    for _ in range(draw(st.integers(1, 4))):
        messages = [*messages, {"role": "user", "content": draw(questions)}]
        answer = {"role": "assistant", "content": draw(answers)}
        messages.append(answer | ({"loss": False} if draw(st.integers(0, 5)) == 5 else {}))
    return [*messages, {"role": "user", "content": "And?"}, {"role": "assistant", "content": draw(answers)}]


@pytest.mark.parametrize("checkpoint", TINY, ids=str)
@given(messages=conversations())
def test_prompts_of_tiny_checkpoints_are_the_stock_ones(
    checkpoint: tuple[str, str | None], messages: list[dict[str, Any]], tiny_checkpoint: Callable[..., Path]
) -> None:
    encoder, processor = opened(str(tiny_checkpoint(*checkpoint)))
    check_rows(encoder, processor, messages)


@pytest.mark.parametrize("name", PUBLISHED)
@given(messages=conversations())
def test_prompts_of_published_checkpoints_are_the_stock_ones(
    name: str, messages: list[dict[str, Any]], shared_folder: Path
) -> None:
    check_rows(*published(shared_folder, name), messages)


TWO = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "<think>\nfirst\n</think>\n\n2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\nsecond\n</think>\n\n4"},
]
PLAIN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


@pytest.mark.parametrize(
    ("name", "settings", "rows"),
    [
        ("qwen2_5vl", {}, 1),
        ("qwen3vl", {}, 1),
        ("qwen3_5", {}, 2),
        ("qwen3_6", {}, 2),
        ("qwen3_6", {"chat_template_kwargs": {"preserve_thinking": True}}, 1),
        ("qwen3_8", {}, 1),
    ],
    ids=str,
)
def test_a_conversation_is_as_few_rows_as_its_contexts_allow(
    name: str, settings: dict[str, Any], rows: int, shared_folder: Path
) -> None:
    encoder, processor = published(shared_folder, name, **settings)
    plans = encoder.plans(sample(TWO))
    assert len(plans) == rows
    texts = [plan.rendering.text[start:stop] for plan in plans for start, stop in plan.rendering.spans]
    assert "first" in texts[0] and "second" in texts[1], "no thought is lost"
    kwargs = settings.get("chat_template_kwargs", {})
    sent = as_client_sends(TWO, encoder.template.writes_thoughts)
    for plan in plans:
        for turn, first, arguments in zip(
            plan.rendering.turns, plan.tokens.starts, plan.rendering.arguments, strict=True
        ):
            assert plan.tokens.input_ids[:first].tolist() == stock_ids(
                processor, sent[:turn], **{**kwargs, **arguments}
            )


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_small", "qwen3_6", "qwen3_8"])
def test_an_answer_without_a_thought_is_trained_behind_the_closed_block(name: str, shared_folder: Path) -> None:
    encoder, _ = published(shared_folder, name)
    (plan,) = encoder.plans(sample(PLAIN))
    ((start, stop),) = plan.rendering.spans
    assert plan.rendering.text[:start].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert plan.rendering.text[start:stop] == "Yo<|im_end|>\n"
    assert plan.rendering.arguments == ({"enable_thinking": False},)
    assert "Reasoning effort" not in plan.rendering.text
    thinking = [PLAIN[0], {"role": "assistant", "content": "Yo", "reasoning_content": "Hm."}]
    (plan,) = encoder.plans(sample(thinking))
    ((start, stop),) = plan.rendering.spans
    assert plan.rendering.text[:start].endswith("<|im_start|>assistant\n<think>\n")
    assert plan.rendering.text[start:stop] == "Hm.\n</think>\n\nYo<|im_end|>\n"


@pytest.mark.parametrize("writes_empty", [True, False])
def test_a_prompt_that_always_opens_a_thought_has_an_empty_one_closed(
    writes_empty: bool, tiny_checkpoint: Callable[..., Path]
) -> None:
    """As Qwen3-VL Thinking has it, whose template has no switch."""
    encoder, processor = open_encoder(
        ToolArguments(model_name_or_path=str(tiny_checkpoint("qwen3_vl", "thinking"))), 1 << 20
    )
    template = processor.chat_template.replace("if enable_thinking is defined and enable_thinking is false", "if false")
    if not writes_empty:
        template = template.replace("if loop.index0 > last.question", "if reasoning and loop.index0 > last.question")
    processor.chat_template = template
    encoder = replace(encoder, template=ChatTemplate(processor))
    assert not encoder.template.has_switch
    (plan,) = encoder.plans(sample(PLAIN))
    ((start, stop),) = plan.rendering.spans
    assert plan.rendering.text[:start].endswith("<|im_start|>assistant\n<think>\n")
    assert plan.rendering.text[start:stop] == "\n</think>\n\nYo<|im_end|>\n"
    assert [event.kind for event in plan.events] == ["thinking_mismatch"]


def test_arguments_of_sample_dataset_and_run_in_this_order(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = str(tiny_checkpoint("qwen3_5"))
    encoder, _ = opened(folder)
    assert encoder.template.has_switch
    own = sample(PLAIN, chat_template_kwargs={"enable_thinking": True})
    (plan,) = encoder.plans(own)
    assert plan.rendering.arguments == ({"enable_thinking": True},)
    assert plan.rendering.text.endswith("<think>\n\n</think>\n\nYo<|im_end|>\n")
    of_dataset = Sample(own.origin, {"messages": PLAIN}, options={"chat_template_kwargs": {"enable_thinking": True}})
    assert encoder.plans(of_dataset)[0].rendering == plan.rendering
    thought = [PLAIN[0], {"role": "assistant", "content": "Yo", "reasoning_content": "Hm."}]
    with pytest.raises(SampleError, match="enable_thinking is false"):
        encoder.plans(sample(thought, chat_template_kwargs={"enable_thinking": False}))
    with pytest.raises(SampleError, match="'add_generation_prompt' is set by the trainer"):
        encoder.plans(sample(PLAIN, chat_template_kwargs={"add_generation_prompt": True}))


def trained_text(plan: Plan, processor: Any) -> list[str]:
    ids, labels = plan.tokens.input_ids, plan.tokens.labels
    return [processor.tokenizer.decode(ids[labels != IGNORE_INDEX])]


@pytest.mark.parametrize(
    ("loss_on", "trained"),
    [
        ("all", ["first\n</think>\n\n2<|im_end|>\n", "second\n</think>\n\n4<|im_end|>\n"]),
        ("last_turn", ["second\n</think>\n\n4<|im_end|>\n"]),
        ("answers", ["2<|im_end|>\n", "4<|im_end|>\n"]),
        ("thoughts", ["first\n</think>\n\n", "second\n</think>\n\n"]),
    ],
)
def test_parts_of_answers_are_trained_as_asked(
    loss_on: str, trained: list[str], tiny_checkpoint: Callable[..., Path]
) -> None:
    encoder, processor = opened(str(tiny_checkpoint("qwen3_5")))
    plans = encoder.plans(sample(TWO, loss_on=loss_on))
    assert [text for plan in plans for text in trained_text(plan, processor)] == trained
    everything = encoder.plans(sample(TWO, loss_on="all"))
    assert [plan.tokens.input_ids.tolist() for plan in plans] == [
        plan.tokens.input_ids.tolist() for plan in everything[-len(plans) :]
    ], "the context of what is trained stays"


@pytest.mark.parametrize(("history", "rows"), [("exact", [(1,), (3,)]), ("last", [(3,)]), ("as_rendered", [(1, 3)])])
def test_history_decides_the_rows(
    history: str, rows: list[tuple[int, ...]], tiny_checkpoint: Callable[..., Path]
) -> None:
    encoder, _ = opened(str(tiny_checkpoint("qwen3_5")))
    one = replace(sample(TWO), options={"history": history})
    plans = encoder.plans(one)
    assert [plan.rendering.turns for plan in plans] == rows
    measured = encoder.measure(one)
    assert measured.samples == 1
    assert measured.tokens == sum(len(plan.tokens) for plan in plans)
    assert measured.trained_tokens == sum(int((plan.tokens.labels != IGNORE_INDEX).sum()) for plan in plans)
    assert measured.tokens_squared == sum(len(plan.tokens) ** 2 for plan in plans)
    with pytest.raises(SampleError, match="'history' is 'lst', not one of exact, last, as_rendered"):
        encoder.plans(replace(one, options={"history": "lst"}))


def test_a_conversation_as_rendered_trains_all_of_its_answers(tiny_checkpoint: Callable[..., Path]) -> None:
    encoder, _ = opened(str(tiny_checkpoint("qwen3_5")))
    with pytest.raises(SampleError, match="'loss_on' is 'answers', but its conversation is trained as rendered"):
        encoder.plans(replace(sample(TWO, loss_on="answers"), options={"history": "as_rendered"}))


def test_tool_loops_share_one_row(shared_folder: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "reasoning_content": "call", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2.", "reasoning_content": "done"},
    ]
    for name in ("qwen3_5", "qwen3_6", "qwen3_8"):
        plans = check_rows(*published(shared_folder, name), messages, tools=tools)
        assert len(plans) == 1, name


def test_an_answer_that_nobody_asked_for_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    encoder, _ = opened(str(tiny_checkpoint("qwen3_vl")))
    first = [{"role": "assistant", "content": "Hello."}, *PLAIN]
    with pytest.raises(SampleError, match="begins with an answer, which no server would ask for"):
        encoder.plans(sample(first))
    (plan,) = encoder.plans(sample([{**first[0], "loss": False}, *PLAIN]))
    assert plan.rendering.turns == (2,)


def as_conversation(messages: list[dict[str, Any]], tools: list[Any] | None) -> Conversation:
    kinds = {"image": ImageItem("a.png"), "video": VideoItem("a.mp4")}
    turns = []
    for message in messages:
        content = message["content"]
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        parts = tuple(TextPart(one["text"]) if one["type"] == "text" else kinds[one["type"]] for one in items)
        extra = {key: value for key, value in message.items() if key not in ("role", "content")}
        turns.append(Message(message["role"], parts, extra))
    return Conversation(tuple(turns), tuple(tools or ()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_golden_prompts_of_all_templates(name: str, shared_folder: Path) -> None:
    """Those with a thought in the text are left out: it is sent apart, as a server gives it."""
    golden = json.loads((shared_folder / "golden" / "templates" / "rendered.json").read_text())
    _, processor = published(shared_folder, name)
    seen = 0
    for entry in golden:
        kwargs = dict(entry["kwargs"])
        if entry["processor"] != name or not kwargs.pop("add_generation_prompt") or entry.get("error"):
            continue
        if "</think>" in json.dumps(entry["messages"]):
            continue
        template = ChatTemplate(processor, kwargs)
        try:
            rendering = template.render_prompt(as_conversation(entry["messages"], entry["tools"]))
        except SampleError as error:
            assert "leaves out" in error.reason, entry["name"]
            continue
        assert rendering.text == entry["text"], entry["name"]
        seen += 1
    assert seen > 15
