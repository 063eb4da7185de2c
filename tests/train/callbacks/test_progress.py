"""The log line of a step."""

from __future__ import annotations

from qwenvl.train.callbacks.progress import describe


def test_the_line_has_the_losses_of_datasets_and_not_their_counts() -> None:
    logs = {"loss": 0.123456, "loss/apples": 0.5, "tokens/apples": 700, "num_input_tokens_seen": 9, "total_flos": 1e9}
    assert describe(logs) == "loss 0.1235, loss/apples 0.5, num_input_tokens_seen 9"
