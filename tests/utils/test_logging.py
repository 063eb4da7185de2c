from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from transformers.utils import logging as transformers_logging

from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import setup_logging


@pytest.fixture(autouse=True)
def restored_loggers() -> Iterator[None]:
    """Leave the process's loggers as they were."""
    loggers = [logging.getLogger(name) for name in (None, "qwenvl", "transformers", "datasets")]
    before = [(logger, logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    yield
    for logger, level, handlers, propagate in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_one_line_a_message_however_often_it_is_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        setup_logging()
    logging.getLogger("qwenvl.a").info("hello %d", 3)
    logging.getLogger("qwenvl.a").debug("unseen")
    said = lines(capsys)
    assert len(said) == 1
    assert said[0].endswith(" hello 3")
    assert "\033" not in said[0]  # plain text: this is no terminal


def test_libraries_follow_without_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    for name in ("transformers.x", "datasets.x"):
        logging.getLogger(name).info("unseen")
    transformers_logging.get_logger("transformers.x").warning("careful")
    assert [line.split(" ", 1)[1] for line in lines(capsys)] == ["warning: careful"]
    setup_logging("debug")
    transformers_logging.get_logger("transformers.x").info("details")
    logging.getLogger("qwenvl.x").debug("own details")
    assert len(lines(capsys)) == 2


def test_datasets_says_a_thing_once(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    setup_logging()
    logging.getLogger("datasets.x").warning("careful")
    assert [line.split(" ", 1)[1] for line in lines(capsys)] == ["warning: careful"]


def test_other_ranks_only_warn_and_say_who_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    setup_logging("debug")
    logging.getLogger("qwenvl.a").info("unseen")
    logging.getLogger("qwenvl.a").warning("seen")
    said = lines(capsys)
    assert len(said) == 1
    assert said[0].startswith("[rank 3] ")


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("error")
    logging.getLogger("qwenvl.a").warning("unseen")
    assert lines(capsys) == []


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(UserError, match="'loud' is not one of debug"):
        setup_logging("loud")
