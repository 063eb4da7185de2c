"""Speed of a run: throughput on every log line, and a profile of a few steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as StockArguments

from qwenvl.config import TrainingArguments
from qwenvl.profiling.device_specs import known_peak, name_device
from qwenvl.profiling.flops import flops_of
from qwenvl.profiling.profiler import Phase, StepProfile
from qwenvl.profiling.throughput import Throughput

logger = logging.getLogger(__name__)


class SpeedMonitor(TrainerCallback):
    """Measures a trainer's speed; the trainer reports the phases of its steps.

    Args:
        model: Model that is ready for training.
        args: Settings of the run.

    Attributes:
        profile: Profiler of a few steps, a callback of its own.
    """

    def __init__(self, model: PreTrainedModel, args: TrainingArguments) -> None:
        self.flops = flops_of(model)
        self.throughput = Throughput(self.flops, _peak(args), args.device)
        folder = Path(args.output_dir) / "profile"
        self.profile = StepProfile(args.profile_steps, folder, args.device, self.throughput.paused)

    def on_train_begin(self, args: StockArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start counting, also when ``--auto_find_batch_size`` restarts with a smaller batch."""
        del args, state, control, kwargs
        self.throughput.start_over()

    def watch(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the batches of an optimizer step, and measure the time spent waiting for them."""
        self.throughput.run()
        while True:
            self.profile.enter(Phase.DATA)
            with self.throughput.waiting():
                batch = next(batches, None)
            self.profile.enter(Phase.OTHER)
            if batch is None:
                return
            yield batch

    def count(self, batches: Sequence[dict[str, Any]]) -> None:
        """Count micro-batches that are trained on."""
        for batch in batches:
            self.throughput.count(batch)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside of the context from the measurements."""
        with self.throughput.paused(), self.profile.left_out():
            yield


def _peak(args: TrainingArguments) -> float | None:
    """Return the peak operations per second of the device: the given value, else the known one."""
    if args.device_peak_tflops is not None:
        return 1e12 * args.device_peak_tflops
    name = name_device(args.device)
    peak = known_peak(name)
    if peak is None:
        logger.info("MFU is left out: the peak of this device, %s, is not known (--device_peak_tflops).", name)
    return peak
