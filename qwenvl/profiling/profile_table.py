"""Table of a profile: phases of a step, and the operators or kernels that take the most time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEFT_OUT = "not a part of training"
"""Name of ranges in the trace that the table does not count."""

_ROWS = 10
_NAME = 64  # columns
_HOST_KINDS = ("cpu_op",)
_DEVICE_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, slots=True)
class Operators:
    """Times of operators or kernels.

    Args:
        seconds: Seconds by name: of each CPU operator without its children, or of each GPU kernel.
        calls: Number of calls by name.
        busy: Seconds in which at least one of them ran.
    """

    seconds: Mapping[str, float]
    calls: Mapping[str, int]
    busy: float


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile of some steps.

    Args:
        first: Number of the first step.
        last: Number of the last step.
        device: Name of the device.
        phases: Seconds of each phase, over all steps.
        operators: Operators or kernels, over all steps.
        deepspeed: Whether DeepSpeed takes the optimizer's steps.
    """

    first: int
    last: int
    device: str
    phases: Mapping[Any, float]
    operators: Operators
    deepspeed: bool = False


def measure_operators(trace: Mapping[str, Any], *, on_device: bool) -> Operators:
    """Sum up the times of operators or kernels.

    They are read from the trace, as torch's own ``key_averages`` takes minutes where this takes seconds.

    Args:
        trace: Trace in Chrome's format, from :meth:`torch.profiler.profile.export_chrome_trace`.
        on_device: Whether to count GPU kernels rather than CPU operators.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]  # events with a duration
    left_out = [_span(event) for event in events if (event.get("cat"), event["name"]) == ("user_annotation", LEFT_OUT)]
    kinds = _DEVICE_KINDS if on_device else _HOST_KINDS
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    spans = []
    for event, own in own_times([event for event in events if event.get("cat") in kinds]):
        start, end = _span(event)
        if not any(begin <= start < stop for begin, stop in left_out):
            seconds[event["name"]] = seconds.get(event["name"], 0.0) + own
            calls[event["name"]] = calls.get(event["name"], 0) + 1
            spans.append((start, end))
    return Operators(seconds, calls, covered(spans))


def own_times(events: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float]]:
    """Return each event with its seconds minus those of its direct children on the same thread.

    thread 1   |----------- linear: 10 - 6 -----------|
                    |------ addmm: 6 - 1 ------|
                         |- copy: 1 -|
    """
    found: list[Any] = []
    stacks: dict[Any, list[list[Any]]] = {}  # per thread: enclosing [event, end, own time]
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        start, end = _span(event)
        stack = stacks.setdefault((event.get("pid"), event.get("tid")), [])
        while stack and stack[-1][1] <= start:
            stack.pop()
        entry = [event, end, end - start]
        if stack:
            stack[-1][2] -= end - start
        stack.append(entry)
        found.append(entry)
    return [(event, own) for event, _, own in found]


def _span(event: Mapping[str, Any]) -> tuple[float, float]:
    """Return (start, end) in seconds."""
    return event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the total length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def format_profile(found: Profile) -> str:
    """Return the table as text: phases, which add up to the whole step, then operators or kernels."""
    steps, whole = found.last - found.first + 1, sum(found.phases.values())
    which = f"step {found.first}" if steps == 1 else f"steps {found.first} to {found.last}"
    on_device = found.device != "cpu"

    def line(name: str, seconds: float, calls: int | None = None) -> str:
        count = "" if calls is None else f"{calls / steps:,.0f}"
        share = seconds / whole if whole else 0.0
        return f"{_shorten(name):<{_NAME}}{count:>10}{1e3 * seconds / steps:>12,.2f}{share:>9.1%}"

    operators = sorted(found.operators.seconds.items(), key=lambda pair: -pair[1])[:_ROWS]
    lines = [
        f"Profile of {which} on {found.device}: means per step, including the overhead of the profiler.",
        "",
        f"{'phase':<{_NAME}}{'':>10}{'ms':>12}{'share':>9}",
        *(line(phase.value, seconds) for phase, seconds in found.phases.items()),
        line("whole step", whole),
        *([line("time in which kernels ran", found.operators.busy)] if on_device else []),
        "",
        f"{'kernel' if on_device else 'operator, without its children':<{_NAME}}{'calls':>10}{'ms':>12}{'share':>9}",
        *(line(name, seconds, found.operators.calls[name]) for name, seconds in operators),
    ]
    if found.deepspeed:
        lines += ["", "DeepSpeed clips and takes the optimizer's step within its backward call, in that row."]
    return "\n".join(lines)


def _shorten(name: str) -> str:
    return name if len(name) < _NAME else f"{name[: _NAME - 4]}..."
