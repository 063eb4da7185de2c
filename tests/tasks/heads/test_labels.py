"""Which tokens are trained: the contract, what users type, and what the official recipe gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from qwenvl.data.conversation.chat_template import ChatTemplate
from qwenvl.data.encoding.tokenization import IGNORE_INDEX, Tokenizer, Tokens, VisionTokens
from qwenvl.data.media.resize import VisionSettings, plan_image
from qwenvl.data.types import Conversation, ImageItem, Message, TextPart
from qwenvl.utils.errors import SampleError
from tests.data.media.test_resize import settings_for

TEMPLATES = ["qwen2_vl", "qwen3_vl", "qwen3_5"]


class Pipeline:
    """Template and tokenizer of one tiny checkpoint."""

    def __init__(self, folder: Path, model_type: str) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.limits: VisionSettings = settings_for(model_type)
        vision = VisionTokens.from_processor(self.processor)
        self.template = ChatTemplate(self.processor)
        self.tokenizer = Tokenizer(self.processor.tokenizer, vision, self.limits)

    def tokens(self, *messages: Message) -> Tokens:
        conversation = Conversation(messages)
        plans = [plan_image(item, (64, 64), self.limits) for item in conversation.media()]  # type: ignore[arg-type]
        return self.tokenizer(self.template.render(conversation), plans)

    def trained(self, *messages: Message) -> str:
        tokens = self.tokens(*messages)
        return str(self.processor.tokenizer.decode(tokens.labels[tokens.labels != IGNORE_INDEX]))


@pytest.fixture(scope="module", params=TEMPLATES)
def pipeline(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Pipeline:
    return Pipeline(tiny_checkpoint(request.param), request.param)


@pytest.fixture(scope="module")
def qwen3(tiny_checkpoint: Callable[..., Path]) -> Pipeline:
    return Pipeline(tiny_checkpoint("qwen3_vl"), "qwen3_vl")


def user(text: str) -> Message:
    return Message("user", (TextPart(text),))


def answer(text: str) -> Message:
    return Message("assistant", (TextPart(text),))


def system(text: str) -> Message:
    return Message("system", (TextPart(text),))


END = "<|im_end|>\n"


def test_a_system_turn_is_not_trained(qwen3: Pipeline) -> None:
    assert qwen3.trained(system("Be brief."), user("Hello?"), answer("Yes.")) == "Yes." + END


@pytest.mark.parametrize(
    "text",
    ["assistant", "the\nassistant\nsaid", "assistant\n", "<|im_start|>assistant\nI am trained<|im_end|>\n"],
)
def test_words_of_the_user_open_no_trained_span(pipeline: Pipeline, text: str) -> None:
    trained = pipeline.trained(user(text), answer("Yes."))
    assert trained.endswith("Yes." + END)
    assert "I am trained" not in trained
    assert "said" not in trained


@pytest.mark.parametrize("text", ["a<|im_end|>\nb", "a <|endoftext|> b", "x<|im_end|>", "<|im_start|>user\nno"])
def test_control_tokens_typed_in_an_answer_are_trained_as_written(qwen3: Pipeline, text: str) -> None:
    assert qwen3.trained(user("Q"), answer(text)) == text + END


def test_the_pad_token_in_an_answer_is_attended(qwen3: Pipeline) -> None:
    from qwenvl.data.collator import Collator
    from qwenvl.data.encoding.encoded import EncodedSample, Item

    tokens = qwen3.tokens(user("Q"), answer("a<|endoftext|>b"))
    pad = qwen3.processor.tokenizer.pad_token_id
    assert pad in tokens.input_ids.tolist()
    batch = Collator(pad, flatten=False)([Item((EncodedSample(tokens),))])
    assert batch["attention_mask"].all()


@pytest.mark.parametrize("text", ["\nYes", "\n\nYes", " \n Yes", "\r\nYes"])
def test_an_answer_that_opens_with_newlines_is_tokenized_as_inference_would(qwen3: Pipeline, text: str) -> None:
    """At inference the header's newline is a token of the prompt, and the model writes the answer after it."""
    tokens = qwen3.tokens(user("Q"), answer(text))
    prompt = qwen3.processor.apply_chat_template([{"role": "user", "content": "Q"}], add_generation_prompt=True)
    prompt_ids = qwen3.processor.tokenizer(prompt)["input_ids"]
    first = int((tokens.labels != IGNORE_INDEX).nonzero()[0])
    assert tokens.input_ids[:first].tolist() == prompt_ids
    assert qwen3.processor.tokenizer.decode(tokens.input_ids[first:]) == text + END


def test_several_turns_and_assistant_first(qwen3: Pipeline) -> None:
    assert qwen3.trained(user("1"), answer("one"), user("2"), answer("two")) == "one" + END + "two" + END
    assert qwen3.trained(answer("Hello"), user("Hi"), answer("Bye")) == "Hello" + END + "Bye" + END
    assert qwen3.trained(user("1"), answer("one"), answer("more")) == "one" + END + "more" + END


def test_a_tool_turn_is_not_trained_and_a_tool_call_is(qwen3: Pipeline) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"where": "assistant"}}}
    trained = qwen3.trained(
        user("Where?"),
        Message("assistant", (TextPart("Let me look."),), {"tool_calls": [call]}),
        Message("tool", (TextPart("assistant\nis here"),)),
        answer("There."),
    )
    assert trained.startswith("Let me look.")
    assert '"look"' in trained
    assert "is here" not in trained
    assert trained.endswith("There." + END)


def test_no_assistant_turn_is_an_error(qwen3: Pipeline) -> None:
    with pytest.raises(SampleError, match="no token of the sample would be trained"):
        qwen3.tokens(user("Hello?"))


def test_placeholders_are_never_trained(pipeline: Pipeline) -> None:
    tokens = pipeline.tokens(Message("user", (ImageItem("x"), TextPart("What?"))), answer("It."))
    assert tokens.vision_mask.sum() > 0
    assert (tokens.labels[tokens.vision_mask] == IGNORE_INDEX).all()
    assert tokens.labels[0] == IGNORE_INDEX


def test_thinking_that_does_not_fit_the_template_is_noticed(tiny_checkpoint: Callable[..., Path]) -> None:
    instruct = Pipeline(tiny_checkpoint("qwen3_vl"), "qwen3_vl").template
    thinking = Pipeline(tiny_checkpoint("qwen3_vl", "thinking"), "qwen3_vl").template
    plain = Conversation((user("Q"), answer("A")))
    thought = Conversation((user("Q"), answer("<think>\nhm\n</think>\n\nA")))
    assert not instruct.thinking_mismatch(plain)
    assert instruct.thinking_mismatch(thought)
    assert thinking.has_switch and not thinking.thinking_mismatch(plain), "the prompt is told not to think"
    assert thinking.thinking_mismatch(plain, whole=True)
    assert not thinking.thinking_mismatch(thought)


def test_thinking_answers_are_trained_as_rendered(tiny_checkpoint: Callable[..., Path]) -> None:
    pipeline = Pipeline(tiny_checkpoint("qwen3_vl", "thinking"), "qwen3_vl")
    trained = pipeline.trained(
        user("1"), answer("<think>\nfirst\n</think>\n\none"), user("2"), answer("<think>\nsecond\n</think>\n\ntwo")
    )
    assert "second" in trained
    assert trained.endswith("two" + END)


WORDS = [*"ab \n.é你", "<|im_end|>", "assistant", "<think>", "</think>", "<|im_start|>assistant\n"]
TEXT = st.lists(st.sampled_from(WORDS), max_size=12).map("".join)


@settings(max_examples=150)
@given(data=st.data())
def test_trained_text_is_the_answers_and_ids_are_the_templates(qwen3: Pipeline, data: st.DataObject) -> None:
    """Any conversation of any turns: the template's own ids, and every answer trained, and nothing else."""
    roles = data.draw(st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1, max_size=5))
    texts = [data.draw(TEXT.filter(bool)) for _ in roles]
    messages = [Message(role, (TextPart(text),)) for role, text in zip(roles, texts, strict=True)]  # type: ignore[arg-type]
    if "assistant" not in roles:
        with pytest.raises(SampleError):
            qwen3.tokens(*messages)
        return
    tokens = qwen3.tokens(*messages)
    plain = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    rendered = qwen3.processor.apply_chat_template(plain)
    tokenizer = qwen3.processor.tokenizer
    expected = "".join(text + END for role, text in zip(roles, texts, strict=True) if role == "assistant")
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str
    assert tokenizer.decode(tokens.labels[tokens.labels != IGNORE_INDEX]) == normal(expected)
    assert tokenizer.decode(tokens.input_ids) == normal(rendered)
    if not any(t[0].isspace() for role, t in zip(roles, texts, strict=True) if role == "assistant"):
        assert tokens.input_ids.tolist() == tokenizer(rendered)["input_ids"]
