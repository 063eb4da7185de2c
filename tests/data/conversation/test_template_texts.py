"""No template that looks into a text is taken for one that does not; those of the models that do not are recognized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import AutoProcessor
from transformers.utils.chat_template_utils import render_jinja_template

from qwenvl.data.conversation.chat_template import ChatTemplate
from qwenvl.data.conversation.template_texts import HOLE, writes_texts_as_they_are
from qwenvl.data.types import Conversation, Message, TextPart
from qwenvl.utils.errors import SampleError, UserError

WRITES = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}{%- for part in message.content %}{%- if 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}"""

HARMLESS = [
    WRITES,
    "{% for m in messages %}{{ m.content if m.content else 'none' }}{% endfor %}",
    "{% for m in messages %}{{ m['content'] or '' }}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ 'a' + m.content + 'b' }}{% endfor %}",
    "{% for m in messages %}{{ 'a' ~ m.content ~ 'b' }}{% endfor %}",
    "{% macro w(x) %}[{{ x }}]{% endmacro %}{% for m in messages %}{{ w(m.content) ~ w(m.role) }}{% endfor %}",
    "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}",
    "{% set n = namespace(x=messages[0].content) %}{{ n.x }}{% set y = n.x %}{{ y }}",
    "{% for m in messages %}{% if loop.first or messages[loop.index0 - 1].role != m.role %}{{ m.content }}{% endif %}"
    "{% endfor %}",
]

# Each looks into the text of a message m, and most write something else for some texts.
LOOKING = [
    "{% if 'x' in m.content %}X{% endif %}{{ m.content }}",
    "{% if m.content in 'xyz' %}X{% endif %}{{ m.content }}",
    "{% if m.content not in ['x'] %}X{% endif %}{{ m.content }}",
    "{% if 'a' != m.content == 'x' %}X{% endif %}{{ m.content }}",
    "{% if m.content == 'x' %}X{% endif %}{{ m.content }}",
    "{% if 'x' == m.content %}X{% endif %}{{ m.content }}",
    "{% if m.content < 'y' %}X{% endif %}{{ m.content }}",
    "{% if m.content is eq('x') %}X{% endif %}{{ m.content }}",
    "{% if m.content is lower %}X{% endif %}{{ m.content }}",
    "{% if m.content | length > 3 %}X{% endif %}{{ m.content }}",
    "{% if m.content.startswith('x') %}X{% endif %}{{ m.content }}",
    "{% if m.content[0] == 'x' %}X{% endif %}{{ m.content }}",
    "{% if m.content[:1] == 'x' %}X{% endif %}{{ m.content }}",
    "{% if {'x': 1}[m.content] %}X{% endif %}{{ m.content }}",
    "{% if {'x': 1}[m.content + ''] %}X{% endif %}{{ m.content }}",
    "{% if [m.content] == ['x'] %}X{% endif %}{{ m.content }}",
    "{% if m == {'role': 'user', 'content': 'x'} %}X{% endif %}{{ m.content }}",
    "{% if (m.content ~ '') == 'x' %}X{% endif %}{{ m.content }}",
    "{% if (m.content + '') == 'x' %}X{% endif %}{{ m.content }}",
    "{% if ('' + m.content) == 'x' %}X{% endif %}{{ m.content }}",
    "{% if 'x' in (m.content + m.content) %}X{% endif %}{{ m.content }}",
    "{% if 'x' in m.content | string %}X{% endif %}{{ m.content }}",
    "{% if 'x' in m | tojson %}X{% endif %}{{ m.content }}",
    "{% set t = m | tojson %}{% if 'x' in t %}X{% endif %}{{ m.content }}",
    "{% set t %}{{ m.content }}{% endset %}{% if 'x' in t %}X{% endif %}{{ m.content }}",
    "{% macro w(x) %}{{ x }}{% endmacro %}{% if 'x' in w(m.content) %}X{% endif %}{{ m.content }}",
    "{% macro w(x) %}{{ x }}{% endmacro %}{% set t = w(m.content) %}{% if 'x' in t %}X{% endif %}{{ m.content }}",
    "{% macro w(x) %}{% if 'x' in x %}X{% endif %}{{ x }}{% endmacro %}{{ w(m.content) }}",
    "{% macro w(x) %}{{ x }}{% endmacro %}{% set v = w %}{% if 'x' in v(m.content) %}X{% endif %}{{ m.content }}",
    "{% set n = namespace(t=m.content) %}{% if 'x' in n.t %}X{% endif %}{{ m.content }}",
    "{% set n = namespace(m.content) %}{{ m.content }}",
    "{% for c in m.content %}{% if loop.last %}{{ c }}{% endif %}{% endfor %}{{ m.content }}",
    "{% for c in m.content %}{% if c == 'x' %}X{% endif %}{% endfor %}{{ m.content }}",
    "{% for k, v in m.items() %}{% if v == 'x' %}X{% endif %}{% endfor %}{{ m.content }}",
    "{% for v in m.values() %}{% if 'x' in v %}X{% endif %}{% endfor %}{{ m.content }}",
    "{% if loop is defined %}{% endif %}{% if messages | map(attribute='content') | first == 'x' %}X{% endif %}"
    "{{ m.content }}",
    "{{ m.content | trim }}",
    "{{ m.content | upper }}",
    "{{ m.content | tojson }}",
    "{{ m.content | e }}",
    "{{ m.content | replace('x', 'X') }}",
    "{{ m.content * 2 if m.content % 1 else '' }}",
    "{{ '%s' % m.content }}{% if '%s' % m.content == 'x' %}X{% endif %}",
    "{{ '%5s' | format(m.content) }}",
    "{{ m }}",
    "{{ messages }}",
    "{% filter upper %}{{ m.content }}{% endfilter %}",
    "{% call(x) n() %}{% endcall %}{{ m.content }}",
    "{{ m.content.split('x')[-1] }}",
    "{% if m.content.x is defined %}X{% endif %}{{ m.content }}",
    "{% if m[m.content] %}X{% endif %}{{ m.content }}",
    "{% for i in messages %}{% if loop[m.content + ''] %}X{% endif %}{% endfor %}{{ m.content }}",
    "{% if range(3) and m.content == 'x' %}X{% endif %}{{ m.content }}",
]


def by_transformers(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    return str(render_jinja_template([messages], chat_template=template, **variables)[0][0])


def is_proven(template: str, messages: list[dict[str, Any]]) -> bool:
    """Ask as rendering does; where transformers cannot render the template, with nothing to compare to."""
    variables = {"tools": None, "documents": None, "add_generation_prompt": False}
    try:
        expected = by_transformers(template, messages)
    except (TemplateError, TypeError, ValueError):
        expected = ""
    return writes_texts_as_they_are(template, messages, variables, expected)


MESSAGES = [{"role": "user", "content": HOLE}, {"role": "assistant", "content": HOLE}]
PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": HOLE}]}]


@pytest.mark.parametrize("template", HARMLESS)
def test_templates_that_write_texts_as_they_are(template: str) -> None:
    assert is_proven(template, MESSAGES)


class Processor:
    """The part of a processor that rendering needs, with a template of its own."""

    def __init__(self, template: str) -> None:
        self.chat_template = template
        self.tokenizer = SimpleNamespace(special_tokens_map={}, chat_template=None)

    def apply_chat_template(self, conversation: Any, tokenize: bool = False, **variables: Any) -> str:
        return by_transformers(self.chat_template, conversation, **variables)


@pytest.mark.parametrize("template", LOOKING)
def test_templates_that_look_into_texts_are_rendered(template: str) -> None:
    """Whatever the text says, the rendering is the template's own, or the sample is refused."""
    whole = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}" + template + "{{ '<|im_end|>\n' }}{% endfor %}"
    )
    whole += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    try:
        renderer = ChatTemplate(Processor(whole))
    except (UserError, TemplateError, TypeError, ValueError):  # not even a chat template
        assert not is_proven(whole, MESSAGES)
        return
    for text in ("abc", "x", "xx", "axb", "X", "role", "index", " x ", 'a "', "<", "1", "ab" * 9):
        conversation = Conversation((Message("user", (TextPart("Q"),)), Message("assistant", (TextPart(text),))))
        messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": text}]
        try:
            rendering = renderer.render(conversation)
        except SampleError as error:
            assert error.category == "template"
        else:
            assert rendering.text == by_transformers(whole, messages)


@pytest.mark.parametrize("attribute", ["upper", "upper is defined", "nothing"])
def test_what_asks_for_an_attribute_of_a_text_is_not_proven(attribute: str) -> None:
    """Even where its answer is the same for every text."""
    template = "{% for m in messages %}{% if m.content." + attribute + " %}X{% endif %}{{ m.content }}{% endfor %}"
    assert not is_proven(template, MESSAGES)
    assert is_proven(template.replace("content." + attribute, "content"), MESSAGES)


def test_parts_of_turns() -> None:
    assert is_proven(WRITES, PARTS)
    assert not is_proven(WRITES.replace("'text' in part", "'text' in part and 'x' in part.text"), PARTS)
    assert not is_proven(WRITES.replace("'text' in part", "part.text != 'x'"), PARTS)


def test_what_is_not_a_template_is_not_proven() -> None:
    assert not is_proven("{% if %}", MESSAGES)
    assert not is_proven("{{ raise_exception('no') }}", MESSAGES)
    assert not is_proven("{% generation %}{{ messages[0].content }}{% endgeneration %}", MESSAGES)
    assert not writes_texts_as_they_are(WRITES, MESSAGES, {}, "something else")


@pytest.mark.parametrize(
    ("family", "template", "proven"),
    [("qwen2_vl", None, True), ("qwen3_vl", None, True), ("qwen3_vl", "thinking", False), ("qwen3_5", None, False)],
)
def test_the_templates_of_the_families(
    family: str, template: str | None, proven: bool, tiny_checkpoint: Callable[..., Path]
) -> None:
    processor = AutoProcessor.from_pretrained(tiny_checkpoint(family, template))
    rendered = processor.apply_chat_template(MESSAGES, tokenize=False)
    variables = {**processor.tokenizer.special_tokens_map, "add_generation_prompt": False}
    assert writes_texts_as_they_are(processor.chat_template, MESSAGES, variables, rendered) is proven


@pytest.mark.parametrize("folder", ["qwen3vl", "qwen2_5vl"])
def test_the_real_templates(folder: str, shared_folder: Path) -> None:
    template = json.loads((shared_folder / "processors" / folder / "chat_template.json").read_text())["chat_template"]
    assert is_proven(template, MESSAGES)
    assert is_proven(template, PARTS)
