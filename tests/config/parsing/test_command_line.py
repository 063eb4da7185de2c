"""The command line: switches, lists, mappings, --debug in its two meanings, and the help page."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenvl.config import parse_arguments, wants_debug
from qwenvl.config.parsing.parser import all_settings
from tests.config.flags import NEEDED, parsed, recipe


@pytest.mark.parametrize("value", ["true", "True", "1", "yes", None])
def test_switches(value: str | None) -> None:
    assert parsed("--data_flatten", *([value] if value else [])).data.data_flatten is True
    assert parsed("--no-average_tokens_across_devices").training.average_tokens_across_devices is False


def test_lists_and_mappings_on_the_command_line() -> None:
    result = parsed("--additional_tokens", "<a>", "<b>", "--chat-template-kwargs", '{"enable_thinking": true}')
    assert result.data.additional_tokens == ["<a>", "<b>"]
    assert result.data.chat_template_kwargs == {"enable_thinking": True}


@pytest.mark.parametrize(
    ("flags", "debug", "options"),
    [
        (["--debug"], True, []),
        (["--debug", "True"], True, []),
        (["--debug=true"], True, []),
        (["--debug", "False"], False, []),
        (["--debug", "--seed", "3"], True, []),
        (["--debug", "underflow_overflow"], False, ["underflow_overflow"]),
        (["--debug", "underflow_overflow", "--debug"], True, ["underflow_overflow"]),
        ([], False, []),
    ],
)
def test_debug(flags: list[str], debug: bool, options: list[str]) -> None:
    result = parsed(*flags)
    assert result.debug is debug
    assert wants_debug([*NEEDED, *flags]) is debug
    assert [option.value for option in result.training.debug] == options


def test_debug_in_a_recipe(tmp_path: Path) -> None:
    assert parse_arguments([recipe(tmp_path, debug=True), *NEEDED]).debug is True
    assert parse_arguments([recipe(tmp_path, debug="underflow_overflow"), *NEEDED]).training.debug


def test_help_explains_every_flag_ours_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    assert caught.value.code == 0
    page = capsys.readouterr().out
    places = [page.index(f"\n{title}") for title in ("model:", "data:", "training:", "training, as in transformers")]
    assert places == sorted(places)
    assert places[2] < page.index("--vision_tower_lr") < places[3] < page.index("--learning_rate ")
    assert all(f"--{name}" in page for name in all_settings())
    assert all(setting.help for setting in all_settings().values())
