"""The trainer that also asks held-out questions at every evaluation; weights and random numbers stay as they are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import EvalLoopOutput

from qwenvl.data.encoding.encoded import Item
from qwenvl.evaluate.answer_log import AnswerLog
from qwenvl.evaluate.scoring import evaluate
from qwenvl.inference.generate import Answer, Decoding, generate
from qwenvl.inference.other_images import VIEWS, View
from qwenvl.metrics.predictions import Prediction
from qwenvl.models.attention import packed as attention
from qwenvl.models.loss.causal_lm import causal_loss, tell_host, total_weight
from qwenvl.train.eval_prompts import HeldOutQuestions
from qwenvl.train.trainer import QwenVLTrainer
from qwenvl.utils.distributed import gather_objects


class AskingTrainer(QwenVLTrainer):
    """The trainer, whose evaluation also lets the model answer, and shows it blank and exchanged pictures.

    Args:
        questions: what is asked; None for the loss alone.
        options: of :class:`qwenvl.train.trainer.QwenVLTrainer`.
    """

    def __init__(self, questions: HeldOutQuestions | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.questions = questions
        self.answers = AnswerLog(Path(self.args.output_dir))

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """Compute evaluations in the type of ``--bf16_full_eval`` or ``--fp16_full_eval``; weights keep theirs."""
        contexts = ExitStack()
        contexts.enter_context(super().compute_loss_context_manager())
        dtype = torch.bfloat16 if self.args.bf16_full_eval else torch.float16 if self.args.fp16_full_eval else None
        if dtype is not None and not self.model.training:
            contexts.enter_context(torch.autocast(self.args.device.type, dtype))
        return contexts

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Return the loss, and the metrics of the answers; every rank has to call it."""
        output: Any = super().evaluation_loop(*args, **kwargs)
        if self.questions is not None:
            lines = self._answers(self.questions)
            if self.is_world_process_zero():
                self.answers.add(self.state.global_step, lines)
            found = _metrics(lines)
            if self.args.eval_blind:
                found |= self._losses(self.questions)
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return output

    def _answers(self, questions: HeldOutQuestions) -> list[Prediction]:
        """Let the model answer; each rank its share, and all in step."""
        answerer = questions.answerer(self.model)
        decoding = Decoding(self.args.eval_generate_tokens)
        batch, rank, ranks = self.args.eval_batch_size, self.args.process_index, self.args.world_size
        sharded = ranks > 1 and (self.is_fsdp_enabled or self._is_zero3())
        mine: list[tuple[int, Answer]] = []
        for one in questions.rounds(batch, rank, ranks):
            self._watchdog.watch(f"evaluation after step {self.state.global_step}, answering")
            prompts = [questions.open(number).prompt for number in one.asked]
            with self.compute_loss_context_manager(), _usual_attention(self.model):
                answers = generate(answerer, prompts, decoding=decoding, batch_size=batch, synced_gpus=sharded)
            mine += list(zip(one.asked, answers, strict=True))[: one.counted]
        return questions.answered(list(itertools.chain(*gather_objects(mine))))

    def _is_zero3(self) -> bool:
        return self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3

    def _losses(self, questions: HeldOutQuestions) -> dict[str, float]:
        """Return the loss per trained token with each view of the same samples, teacher forced."""
        totals = {view: self._loss_sums(questions, view) for view in VIEWS}
        return {f"loss_{view}": sums[0] / sums[1] if sums[1] else math.nan for view, sums in totals.items()}

    def _loss_sums(self, questions: HeldOutQuestions, view: View) -> list[float]:
        batch, ranks = self.args.eval_batch_size, self.args.world_size
        numbers, totals = questions.comparable, self._zeros(2)
        for start in range(0, len(numbers), batch * ranks):
            self._watchdog.watch(f"evaluation after step {self.state.global_step}, pictures {view}")
            mine = numbers[start : start + batch * ranks][self.args.process_index :: ranks]
            items = [Item((questions.view(number, view),)) for number in mine]
            collated = self.data_collator(items or [Item()])  # without a sample, it keeps in step
            self._receive(collated)
            totals[1] += total_weight(collated)
            inputs = self._prepare_inputs(tell_host(collated))
            with torch.no_grad(), self.compute_loss_context_manager():
                totals[0] += causal_loss(self.model, inputs, num_trained_tokens=1.0)
        sums: list[float] = self.accelerator.reduce(totals, reduction="sum").tolist()
        return sums


@contextmanager
def _usual_attention(model: Any) -> Iterator[None]:
    """Let a model attend as ``generate`` needs it where it attends by the segments of training's rows."""
    by_segments = model.config.get_text_config()._attn_implementation == attention.NAME
    if by_segments:
        model.set_attn_implementation({"text_config": "sdpa"})
    try:
        yield
    finally:
        if by_segments:
            model.set_attn_implementation({"text_config": attention.NAME})


def _metrics(lines: list[Prediction]) -> dict[str, float]:
    """Return the score of each metric over the samples of all datasets that call for it, their number, and the cut."""
    groups: dict[str, list[Any]] = {}
    for scores in evaluate(lines):
        groups.setdefault(scores.metric.name, []).append(scores)
    cut = sum(line.finish_reason == "length" for line in lines)
    found: dict[str, float] = {"answered_samples": len(lines), "cut_answers": cut}
    for name, group in groups.items():
        metric = group[0].metric
        statistics = np.array([metric.statistics(one) for scores in group for one in scores.scored])
        found[name] = metric.total(statistics.sum(axis=0), len(statistics))
    return found
