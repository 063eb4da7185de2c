"""Settings of what is trained in a conversation, against each other."""

from __future__ import annotations

import pytest

from tests.config.flags import parsed, rejected


def test_parts_of_answers_need_their_own_contexts() -> None:
    assert parsed("--loss_on", "answers", "--history", "last").data.loss_on == "answers"
    message = rejected("--loss_on", "answers", "--history", "as_rendered")
    assert "--loss_on answers goes with --history exact or last" in message


@pytest.mark.parametrize("flags", [("--loss_on", "answers"), ("--history", "last")])
def test_tasks_learn_no_answers(flags: tuple[str, str]) -> None:
    message = rejected(*flags, "--task", "classification")
    assert f"{' '.join(flags)} is about the answers of a language model" in message
