"""System turns: an empty one is none; one that a template leaves out or refuses is said by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from qwenvl.cli.check_image.command import main as check_image
from qwenvl.cli.show_sample import main as show_sample
from qwenvl.data.conversation.chat_template import ChatTemplate
from qwenvl.utils.errors import SampleError
from tests.data.records import build, reason_of

QUESTION, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}
VERBS = {
    ("qwen2_5_vl", None): "",
    ("qwen3_vl", None): "leaves out",
    ("qwen3_vl", "thinking"): "refuses",
    ("qwen3_5", None): "refuses",
    "qwen2_5vl": "",
    "qwen3vl": "leaves out",
    "qwen3_5": "refuses",
    "qwen3_5_small": "refuses",
    "qwen3_6": "refuses",
    "qwen3_8": "refuses",
}
"""What templates do with a system turn that is not first."""


@pytest.fixture(scope="module", params=VERBS, ids=str)
def template(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> tuple[ChatTemplate, str]:
    """Return a template and what it does; the published ones where the machine has them."""
    if isinstance(request.param, tuple):
        folder = tiny_checkpoint(*request.param)
    else:
        folder = request.getfixturevalue("shared_folder") / "processors" / request.param
    return ChatTemplate(AutoProcessor.from_pretrained(folder)), VERBS[request.param]


def system(text: Any) -> dict[str, Any]:
    return {"role": "system", "content": text}


@pytest.mark.parametrize(
    ("turns", "record", "late"),
    [
        ([QUESTION, ANSWER, system("be brief"), QUESTION, ANSWER], {}, "be brief"),
        ([system("A"), system("B"), QUESTION, ANSWER], {}, "B"),
        ([system("A"), QUESTION, ANSWER, system("C"), QUESTION, ANSWER], {}, "C"),
        ([QUESTION, system("B"), ANSWER], {"tools": [{"name": "look"}]}, "B"),
        ([QUESTION, system("S"), ANSWER], {"system": "S"}, "S"),
    ],
)
def test_a_system_turn_that_is_not_first_is_written_or_named(
    template: tuple[ChatTemplate, str], turns: Any, record: Any, late: str
) -> None:
    chat, verb = template
    conversation = build({"messages": turns, **record})
    if not verb and not record.get("tools"):
        assert f"<|im_start|>system\n{late}<|im_end|>" in chat.render(conversation).text
        return
    for render in (chat.render, chat.render_prompt):
        with pytest.raises(SampleError) as caught:
            render(conversation)
        assert caught.value.category == "template"
        if verb:
            assert f"chat template {verb} the system turn {late!r}, which is not the first turn" in caught.value.reason
            assert "into one system turn at the start" in caught.value.reason


@pytest.mark.parametrize("empty", ["", " \n", None, [], [{"type": "text", "text": ""}]])
def test_an_empty_system_turn_is_none(template: tuple[ChatTemplate, str], empty: Any) -> None:
    plain = build({"messages": [QUESTION, ANSWER]})
    for turns in ([system(empty), QUESTION, ANSWER], [QUESTION, system(empty), ANSWER]):
        assert build({"messages": turns}) == plain
    assert template[0].render(build({"messages": [system(empty), QUESTION, ANSWER]})) == template[0].render(plain)


def test_a_system_field_stands_for_an_empty_turn() -> None:
    wanted = build({"messages": [system("S"), QUESTION, ANSWER]})
    assert build({"messages": [system(""), QUESTION, ANSWER], "system": "S"}) == wanted
    assert build({"messages": [system("S"), QUESTION, ANSWER], "system": " "}) == wanted
    assert "differ" in reason_of({"messages": [system("T"), QUESTION, ANSWER], "system": "S"}, "bad_record")


def test_a_sample_of_system_turns_alone_has_no_answer() -> None:
    reason_of({"messages": [system("")]}, "no_answer")


@pytest.mark.parametrize("family", ["qwen3_5"])
def test_what_a_template_refuses_otherwise_keeps_its_own_words(
    family: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    """A late system turn is not blamed for what is wrong without it too."""
    chat = ChatTemplate(AutoProcessor.from_pretrained(tiny_checkpoint(family)))
    for turns in ([ANSWER], [ANSWER, system("late")]):
        with pytest.raises(SampleError, match=r"refuses this sample: No turn of the user asks anything\.$"):
            chat.render(build({"messages": turns}))


def test_arguments_that_a_template_cannot_write_are_named(shared_folder: Path) -> None:
    chat = ChatTemplate(AutoProcessor.from_pretrained(shared_folder / "processors" / "qwen3_5"))
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": "x=3"}]}
    with pytest.raises(SampleError, match=r"from a mapping\. Write the 'arguments' of 'look' as an object\.$"):
        chat.render(build({"messages": [QUESTION, call]}))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_the_tools_say_the_same(
    family: str,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    rows = [
        {"messages": [QUESTION, ANSWER, system("now be brief"), QUESTION, ANSWER]},
        {"messages": [system(""), QUESTION, ANSWER]},
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--annotation_path", str(tmp_path / "set.jsonl"), "--data_path", str(tmp_path)]
    model = ["--model_name_or_path", str(tiny_checkpoint(family))]
    verb = VERBS[family, None]
    assert show_sample([*data, *model, "--all"]) == 1
    shown = capsys.readouterr().out
    assert check_image([*data, *model, "--output", str(tmp_path / "out"), "--workers", "0"]) == 1
    (problem,) = map(json.loads, (tmp_path / "out" / "set_problems.jsonl").read_text().splitlines())
    assert problem["line"] == 1 and f"{verb} the system turn 'now be brief'" in problem["reason"]
    assert problem["reason"] in shown
