"""Evaluation by generation: answer prompts of held-out samples, and measure the loss with other images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import Trainer

from qwenvl.config.rules.best_metric import OF_DATASET
from qwenvl.data.collator import for_model
from qwenvl.data.encoding.encoded import Item
from qwenvl.evaluate.answer_log import AnswerLog
from qwenvl.evaluate.scoring import evaluate
from qwenvl.inference.generate import Answer, Decoding, generate
from qwenvl.inference.other_images import VIEWS, View
from qwenvl.metrics.predictions import Prediction
from qwenvl.models.attention.packed import stock_attention
from qwenvl.models.loss.causal_lm import prepare_inputs, total_weight
from qwenvl.tasks.objective import losses_of_samples, run_with_unit_losses
from qwenvl.train.callbacks.watchdog import Watchdog
from qwenvl.train.dataset_losses import DatasetLosses, by_dataset
from qwenvl.train.eval_prompts import EvalPrompts
from qwenvl.utils.distributed import gather_objects, zeros_for_sums


class GenerationEval:
    """Generates answers with a trainer's model, without changes to weights or random number generators.

    Args:
        prompts: Samples to answer at every evaluation.
        answers: Log file of the answers.
        watchdog: Watchdog of the run.
    """

    def __init__(self, prompts: EvalPrompts, answers: AnswerLog, watchdog: Watchdog) -> None:
        self.prompts = prompts
        self._answers = answers
        self._watchdog = watchdog

    def run(self, trainer: Trainer) -> dict[str, float]:
        """Return metrics by name; every rank must call it."""
        lines = self._answer(trainer)
        if trainer.is_world_process_zero():
            self._answers.add(trainer.state.global_step, lines)
        found = _metrics(lines) | by_dataset(((line.dataset, line) for line in lines), _metrics)
        if trainer.args.eval_blind:
            for view in VIEWS:
                found |= self._losses(trainer, view)
        return found

    def _answer(self, trainer: Trainer) -> list[Prediction]:
        """Generate answers; each rank generates its share, all ranks in lockstep."""
        args = trainer.args
        chat_model = self.prompts.chat_model(trainer.model)
        decoding = Decoding(args.eval_generate_tokens)
        batch, rank, ranks = args.eval_batch_size, args.process_index, args.world_size
        sharded = ranks > 1 and (trainer.is_fsdp_enabled or _is_zero3(trainer))
        mine: list[tuple[int, Answer]] = []
        for one in self.prompts.rounds(batch, rank, ranks):
            trainer.leave_if_asked_to_stop()
            self._watchdog.watch(f"evaluation after step {trainer.state.global_step}, answering")
            prompts = [self.prompts.open(number).prompt for number in one.asked]
            with trainer.compute_loss_context_manager(), stock_attention(trainer.model):
                answers = generate(chat_model, prompts, decoding=decoding, batch_size=batch, synced_gpus=sharded)
            mine += list(zip(one.asked, answers, strict=True))[: one.counted]
        return self.prompts.answered(list(itertools.chain(*gather_objects(mine))))

    def _losses(self, trainer: Trainer, view: View) -> dict[str, float]:
        """Return the loss of one view of the samples, and that of each dataset, with teacher forcing."""
        batch, ranks = trainer.args.eval_batch_size, trainer.args.world_size
        numbers, totals = self.prompts.comparable, zeros_for_sums(2, trainer.args.device)
        losses = DatasetLosses(self.prompts.compared, "tokens", trainer.args.device)
        for start in range(0, len(numbers), batch * ranks):
            trainer.leave_if_asked_to_stop()
            self._watchdog.watch(f"evaluation after step {trainer.state.global_step}, images {view}")
            mine = numbers[start : start + batch * ranks][trainer.args.process_index :: ranks]
            items = [Item((self.prompts.view(number, view),)) for number in mine]
            whole = trainer.data_collator(items or [Item()])  # an empty batch keeps ranks in lockstep
            collated = for_model(whole)
            totals[1] += total_weight(collated)
            prepared = prepare_inputs(collated)
            losses.count(prepared, whole["origins"])
            inputs = trainer._prepare_inputs(prepared)
            with torch.no_grad(), trainer.compute_loss_context_manager():
                output = run_with_unit_losses(trainer.model, inputs)
            totals[0] += output.logits
            losses.add(losses_of_samples(output, inputs), inputs)
        losses.end_step(taken=True)
        sum_over_ranks = partial(trainer.accelerator.reduce, reduction="sum")
        loss, tokens = sum_over_ranks(totals).tolist()
        of_single = losses.take(sum_over_ranks)
        named = {key: value for key, value in of_single.items() if key.startswith(f"loss{OF_DATASET}")}
        named["loss"] = loss / tokens if tokens else math.nan
        return {key.replace("loss", f"loss_{view}", 1): value for key, value in named.items()}


def _is_zero3(trainer: Trainer) -> bool:
    return trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3


def _metrics(lines: Sequence[Prediction]) -> dict[str, float]:
    """Return each metric over the samples that have it, the number of answers, and the number of truncated ones."""
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
