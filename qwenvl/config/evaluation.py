"""Flags of evaluations during training, besides the loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwenvl.utils.errors import UserError


@dataclass
class EvaluationArguments:
    """Flags of generated answers in evaluations. Every field is explained by its ``help``."""

    eval_generate: int = field(
        default=0,
        metadata={
            "help": "Number of samples of the evaluation data, always the same ones, that the model answers at every "
            "evaluation. Logs metrics of the answers, chosen by sample: eval_exact_match, eval_box_accuracy, ... "
            "(tools/evaluate.py --help). 0 for none."
        },
    )
    eval_generate_tokens: int = field(
        default=128, metadata={"help": "Most tokens of an answer that eval_generate asks for."}
    )
    eval_blind: bool = field(
        default=False,
        metadata={
            "help": "Also log the loss of those samples of eval_generate that have images or videos: with their own "
            "(eval_loss_shown), with blank ones (eval_loss_blank) and with those of other samples "
            "(eval_loss_swapped). The loss of a model that uses the image rises with the exchange."
        },
    )

    def check_questions(self) -> None:
        """Check these flags.

        Raises:
            UserError: one has no effect without another.
        """
        if self.eval_blind and not self.eval_generate:
            raise UserError(
                "--eval_blind True compares losses of the samples of --eval_generate: add --eval_generate 100, say."
            )
