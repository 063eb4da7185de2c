"""The tokens that the MTP layer is trained on, and what logs and evaluations get of its loss."""

from __future__ import annotations

import torch

from qwenvl.tasks.multi_token import MultiTokenObjective, mtp_inputs


def test_the_worked_example() -> None:
    found = mtp_inputs({"labels": torch.tensor([[-100, -100, 7, 8, 9, -100], [-100, 5, 6, -100, -100, -100]])})
    assert found["positions"].tolist() == [0, 1, 2, 6]
    assert found["targets"].tolist() == [7, 8, 9, 6], "5 is a second token, which has no position for it"
    assert "weights" not in found


def test_nothing_is_predicted_across_samples() -> None:
    """Samples of three, one and four tokens; trained from the second on, and the one, which no collator would do."""
    batch = {
        "labels": torch.tensor([[-100, 11, 12, 20, -100, 31, 32, 33]]),
        "cu_seq_lens_q": torch.tensor([0, 3, 4, 8], dtype=torch.int32),
        "loss_weights": torch.tensor([[0, 1, 0.5, 1, 0, 1, 0.25, 2.0]]),
    }
    found = mtp_inputs(batch)
    assert found["positions"].tolist() == [0, 4, 5] and found["targets"].tolist() == [12, 32, 33]
    assert found["weights"].dtype == torch.int32
    assert found["weights"].view(torch.float32).tolist() == [0.5, 0.25, 2.0]


def test_samples_without_a_third_token_give_nothing() -> None:
    for labels in ([[-100]], [[-100, 3]]):
        found = mtp_inputs({"labels": torch.tensor(labels)})
        assert found["positions"].tolist() == found["targets"].tolist() == []


def test_inputs_go_beside_those_of_the_language_model() -> None:
    batch = MultiTokenObjective(0.1).prepare({"labels": torch.tensor([[-100, -100, 7, 8]])})
    assert batch["kept_positions"].tolist() == [1, 2] and batch["targets"].tolist() == [7, 8]
    assert batch["mtp_inputs"]["positions"].tolist() == [0, 1]
