"""``report.html`` of a run, written at every evaluation and at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwenvl.config import ParsedArguments, all_settings, without_secrets
from qwenvl.data.encoding.encoded import Event
from qwenvl.evaluate.answer_log import AnswerLog
from qwenvl.inference.other_images import Key, key_of
from qwenvl.metrics.predictions import Prediction
from qwenvl.models.lora.adapters import adapter_sizes
from qwenvl.profiling.device_specs import name_device
from qwenvl.report.answers import Medium
from qwenvl.report.run_page import LISTED, Data, Run, Setup, build_run_page
from qwenvl.train.eval_prompts import EvalPrompts
from qwenvl.train.records.run_info import UsedRows, find_versions, rerun_command, setting_text
from qwenvl.train.records.skipped_samples import BAD_SAMPLES, MEANING, DataReport, count_events
from qwenvl.train.records.summary import summarize_parts
from qwenvl.utils.cache import replacing
from qwenvl.utils.distributed import is_main_process
from qwenvl.utils.errors import SampleError

logger = logging.getLogger(__name__)

FILE_NAME = "report.html"


@dataclass(frozen=True)
class Sources:
    """Sources of the report's contents that change during a run.

    Args:
        data: Counts of skipped and cut samples.
        answers: Answers of the evaluations so far.
        prompts: Samples that are answered; None for none.
        warnings: Warnings logged so far.
    """

    data: DataReport
    answers: AnswerLog
    prompts: EvalPrompts | None
    warnings: Sequence[str]


class RunReport(TrainerCallback):
    """Writes the report, in process 0, from the data of all ranks. A failure to write it does not end the run.

    Args:
        output_dir: Output folder of the run.
        setup: Setup of the run.
        rows: Used rows of each dataset.
        sources: Sources of contents that change during the run.
    """

    def __init__(self, output_dir: str, setup: Setup, rows: Sequence[UsedRows], sources: Sources) -> None:
        self.path = Path(output_dir) / FILE_NAME
        self._setup = setup
        self._rows = rows
        self._sources = sources
        self._media: dict[Key, Sequence[Medium] | str] = {}
        self._failed = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the report after an evaluation."""
        del args, control, kwargs
        self.write(state, f"Training goes on: step {state.global_step:,} of {state.max_steps:,} is evaluated.")

    def write(self, state: TrainerState, status: str) -> None:
        """Write the report; every rank must call it.

        Args:
            state: State of the Trainer.
            status: Progress of the run, a sentence.
        """
        events = self._sources.data.gather()
        if not is_main_process():
            return
        try:
            page = build_run_page(self._run(state.log_history, status, events))
            with replacing(self.path) as path:
                path.write_text(page, encoding="utf-8", errors="replace")
        except Exception as error:  # noqa: BLE001  no failure may stop training
            self._say_failure(error)

    def log_place(self) -> None:
        """Log the path of the report, if it could be written."""
        if is_main_process() and not self._failed:
            logger.info("Report: %s", self.path)

    def _say_failure(self, error: Exception) -> None:
        """Warn once that the report could not be written."""
        if not self._failed:
            logger.warning("The report %s could not be written; the run goes on: %s", self.path, error)
            logger.debug("What happened to the report:", exc_info=error)
        self._failed = True

    def _run(self, history: Sequence[Mapping[str, Any]], status: str, events: Sequence[Event]) -> Run:
        return Run(
            title=f"Training of {self.path.parent.resolve().name}",
            status=f"{status} Written {time.strftime('%Y-%m-%d %H:%M %Z')}.",
            history=history,
            data=_data(self._rows, events),
            setup=self._setup,
            warnings=self._sources.warnings,
            answers=self._sources.answers.read(),
            open_media=self._open_media,
        )

    def _open_media(self, line: Prediction) -> Sequence[Medium] | str:
        """Return the media of a sample, decoded once; or why they cannot be shown."""
        key = key_of(line)
        if key not in self._media:
            self._media[key] = self._decode(key)
        return self._media[key]

    def _decode(self, key: Key) -> Sequence[Medium] | str:
        prompts = self._sources.prompts
        number = None if prompts is None else prompts.number_of(key)
        if prompts is None or number is None:
            return "This run does not ask this sample."
        try:
            return prompts.media(number)
        except SampleError as error:
            return error.reason


def _data(rows: Sequence[UsedRows], events: Sequence[Event]) -> Data:
    left_out = [event.record for event in events if event.record]
    return Data(
        rows=[(one.dataset, one.use, one.rows, one.available, one.samples) for one in rows],
        events=[(name, MEANING[kind], count) for (name, kind), count in sorted(count_events(events).items())],
        left_out=left_out[:LISTED],
        num_left_out=len(left_out),
        file=BAD_SAMPLES,
    )


def describe_setup(parsed: ParsedArguments, model: Any, unit: str) -> Setup:
    """Return the setup of a run; call it before the Trainer changes the arguments and an engine wraps the model.

    Args:
        parsed: Settings of the run.
        model: Model, ready for training.
        unit: Name of the units that the loss is averaged over, in the plural.
    """
    args = parsed.training
    owners = (parsed.model, parsed.adapters, parsed.tasks, parsed.data, args)
    settings = {name: getattr(owner, name) for name in all_settings() for owner in owners if name in vars(owner)}
    kind = "DeepSpeed" if args.deepspeed else "FSDP" if args.fsdp else "DDP" if args.world_size > 1 else "one process"
    return Setup(
        command=rerun_command(parsed.given),
        given={name: setting_text(value) for name, value in without_secrets(parsed.given).items()},
        settings={name: _text(value) for name, value in without_secrets(settings).items()},
        versions=find_versions(),
        devices=f"{args.world_size} x {name_device(args.device)}, {kind}",
        modules=summarize_parts(model, args),
        adapters={str(part): count for part, count in adapter_sizes(model).items()},
        unit=unit,
    )


def _text(value: Any) -> str:
    return setting_text(value.value if isinstance(value, Enum) else value)
