"""What is asked in evaluations during training, besides the loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwenvl.utils.errors import UserError


@dataclass
class EvaluationArguments:
    """Flags of questions to the model in training. Every field is explained by its ``help``."""

    eval_generate: int = field(
        default=0,
        metadata={
            "help": "Let the model answer so many samples of the evaluation data, always the same ones, at every "
            "evaluation, and log metrics of the answers: eval_exact_match, eval_box_accuracy, ... as the samples call "
            "for (tools/evaluate.py --help). 0 for none."
        },
    )
    eval_generate_tokens: int = field(
        default=128, metadata={"help": "Most tokens of an answer that eval_generate asks for."}
    )
    eval_blind: bool = field(
        default=False,
        metadata={
            "help": "Log the loss of the samples of eval_generate that have pictures or videos as well: with their own "
            "(eval_loss_shown), blank ones (eval_loss_blank) and those of other samples (eval_loss_swapped). A model "
            "that looks loses by the exchange."
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
