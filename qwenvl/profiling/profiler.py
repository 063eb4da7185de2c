"""Profile a few optimizer steps: the time of each phase, and a trace."""

from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwenvl.models.parts import language_model, vision_tower
from qwenvl.profiling.device_specs import name_device
from qwenvl.profiling.profile_table import LEFT_OUT, Profile, format_profile, measure_operators
from qwenvl.utils.distributed import from_main_process, is_main_process

logger = logging.getLogger(__name__)

_WARM_UP = 2  # steps that are slower, as kernels are chosen and memory is allocated


class Phase(str, Enum):
    """Phase of a step; the value is its name in the table and the trace."""

    DATA = "waiting for data"
    VISION = "vision tower, forward"
    LANGUAGE = "language model, forward"
    LOSS = "vocabulary and loss, with its gradients"
    BACKWARD = "backward"
    OPTIMIZER = "clipping and optimizer"
    OTHER = "other (copies, waiting for other ranks, logging)"


class PhaseClock:
    """Measures phases that follow each other without a gap.

    On a GPU the boundaries are CUDA events, so that a phase has the GPU's time, including idle time, without any
    synchronisation.

    Args:
        device: Device that does the work.
        clock: Function that returns seconds since an arbitrary moment, for other devices than a GPU.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock
        self._borders: list[tuple[Phase | None, Any]] = []

    def enter(self, phase: Phase | None) -> None:
        """Begin a phase, which ends the previous one; None for time that is not measured."""
        if self._device.type == "cuda":
            border: Any = torch.cuda.Event(enable_timing=True)
            border.record()
        else:
            border = self._clock()
        self._borders.append((phase, border))

    def read(self) -> dict[Phase, float]:
        """Return the seconds of every phase, 0 for phases that did not occur; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = dict.fromkeys(Phase, 0.0)
        for (phase, start), (_, end) in pairwise(self._borders):
            if phase is not None:
                seconds[phase] += start.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - start
        return seconds


class StepProfile(TrainerCallback):
    """Profiles steps of process 0, and writes ``trace.json.gz`` and ``table.txt``; other steps have no overhead.

    Args:
        steps: Number of steps; 0 for none.
        folder: Output folder.
        device: Device of this rank.
        paused: Function that returns a context whose time other measurements exclude, for writing the files.
    """

    def __init__(
        self, steps: int, folder: Path, device: torch.device, paused: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._wanted, self._folder, self._device, self._paused = steps, folder, device, paused
        self._profiler: profile | None = None
        self._first = self._last = 0  # numbers of steps, from 1
        self._phases: PhaseClock | None = None  # while a step is profiled
        self._range: record_function | None = None
        self._handles: list[RemovableHandle] = []

    def enter(self, phase: Phase) -> None:
        """Set the current phase of this process."""
        if self._phases is not None:
            self._phases.enter(phase)
            self._name_range(None if phase is Phase.OTHER else phase.value)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Exclude the time inside of the context, which is not part of a step."""
        phases, self._phases = self._phases, None
        if phases is not None:
            phases.enter(None)
            self._name_range(LEFT_OUT)
        try:
            yield
        finally:
            self._phases = phases
            self.enter(Phase.OTHER)

    def _name_range(self, name: str | None) -> None:
        """End the open range of the trace, and begin another one."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._range = None if name is None else record_function(name)
        if self._range is not None:
            self._range.__enter__()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the steps."""
        del args, control
        self._stop()  # if training restarts with a smaller batch
        if not self._wanted:
            return
        remaining = state.max_steps - state.global_step
        warm_up = max(0, min(_WARM_UP, remaining - self._wanted))
        self._first = state.global_step + warm_up + 1
        self._last = min(self._first + self._wanted - 1, state.max_steps)
        if not is_main_process():
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        self._profiler = profile(
            activities=activities,
            schedule=lambda step: ProfilerAction.WARMUP if step < warm_up else ProfilerAction.RECORD,
        )
        self._profiler.start()
        if not warm_up:
            self._begin(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin the profile before its first step, and end it after its last."""
        del control
        self.enter(Phase.OTHER)
        if state.global_step == self._last:
            self._finish(state.global_step, deepspeed=bool(args.deepspeed))
        elif self._profiler is not None:
            self._profiler.step()
            if state.global_step == self._first - 1:
                self._begin(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the steps so far, if training ends before the last step of the profile."""
        del control, kwargs
        if self._first <= state.global_step < self._last:
            self._finish(state.global_step, deepspeed=bool(args.deepspeed))
        self._stop()

    def _begin(self, model: nn.Module) -> None:
        """Start measuring the phases of the model."""
        self._phases = PhaseClock(self._device)
        parts = ((vision_tower(model), Phase.VISION, Phase.OTHER), (language_model(model), Phase.LANGUAGE, Phase.LOSS))
        for module, before, after in parts:
            self._handles.append(module.register_forward_pre_hook(lambda *_, phase=before: self.enter(phase)))
            self._handles.append(module.register_forward_hook(lambda *_, phase=after: self.enter(phase)))
        self.enter(Phase.OTHER)

    def _stop(self) -> profile | None:
        """Remove all hooks; stop and return the profiler, if there was one."""
        self._name_range(None)
        for handle in self._handles:
            handle.remove()
        self._handles, self._phases = [], None
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
        return profiler

    def _finish(self, last: int, *, deepspeed: bool) -> None:
        """Write in process 0 while the others wait, so that no process counts this as training time."""
        self._last = 0
        with self._paused():
            from_main_process(lambda: self._write(last, deepspeed=deepspeed))

    def _write(self, last: int, *, deepspeed: bool) -> None:
        assert self._phases is not None, "the steps of the profile have begun"
        seconds = self._phases.read()
        profiler = self._stop()
        assert profiler is not None
        trace = _export(profiler, self._folder)
        operators = measure_operators(json.loads(trace), on_device=self._device.type == "cuda")
        found = Profile(self._first, last, name_device(self._device), seconds, operators, deepspeed=deepspeed)
        table = format_profile(found)
        (self._folder / "table.txt").write_text(table + "\n", encoding="utf-8")
        logger.info("%s\n\nSaved in %s, with trace.json.gz for ui.perfetto.dev.", table, self._folder)


def _export(profiler: profile, folder: Path) -> bytes:
    """Write a compressed trace, and return its JSON; torch itself compresses line by line, which takes far longer."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / "trace.json"
    profiler.export_chrome_trace(str(plain))
    trace = plain.read_bytes()
    (folder / "trace.json.gz").write_bytes(gzip.compress(trace))
    plain.unlink()
    return trace
