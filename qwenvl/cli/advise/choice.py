"""Choose the settings that fit, and find what would where none do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qwenvl.cli.advise.candidates import KINDS, Candidate, candidates
from qwenvl.cli.advise.estimate import Estimate, Estimator
from qwenvl.families import get_family
from qwenvl.profiling.activation_memory import StepMemory
from qwenvl.profiling.device_specs import GpuSet
from qwenvl.profiling.state_memory import StateMemory
from qwenvl.train.dry_run.report import gib, memory_parts

_SHORTEST_PACK = 1024
_MOST_GPUS = 4096
_SMALLER = {"all parts": ("LoRA", "QLoRA"), "language, merger": ("LoRA", "QLoRA"), "LoRA": ("QLoRA",)}


@dataclass(frozen=True, slots=True)
class Limits:
    """What settings may take, and how many of them are wanted.

    Args:
        gpus: GPUs.
        mfu: Assumed share of their peak.
        pack: Tokens of the longest pack.
        step_tokens: Tokens of an optimizer step over all GPUs, about.
        reserve: Bytes of a GPU that stay free.
        host: Bytes of host memory for each GPU.
        options: Settings of each kind of training.
    """

    gpus: GpuSet
    mfu: float
    pack: int
    step_tokens: int
    reserve: int
    host: int
    options: int = 1

    @property
    def room(self) -> int:
        """Bytes of a GPU that a run may take."""
        return self.gpus.usable - self.reserve


@dataclass(frozen=True)
class Advice:
    """Settings that fit, and kinds of training that do not.

    Args:
        fitting: Estimates by kind, best first.
        missing: Advice on what would fit, by kind.
    """

    fitting: Mapping[str, Sequence[Estimate]]
    missing: Mapping[str, str]


def choose(estimator: Estimator, limits: Limits, kinds: Sequence[str] = tuple(KINDS)) -> Advice:
    """Return the best settings of each kind of training.

    Raises:
        UserError: The data cannot be used.
    """
    found = {kind: [*_fitting(kind, limits.gpus.count, estimator, limits)] for kind in kinds}
    missing = {kind: _what_would(kind, estimator, limits) for kind, fitting in found.items() if not fitting}
    return Advice({kind: fitting for kind, fitting in found.items() if fitting}, missing)


def _fitting(kind: str, count: int, estimator: Estimator, limits: Limits) -> Iterator[Estimate]:
    """Yield the first settings of a kind that fit, each with another engine, all with packs of one length."""
    used: list[Candidate] = []
    for candidate in _candidates(kind, count, estimator, limits):
        if len(used) == limits.options or (used and used[0].pack != candidate.pack):
            return
        if candidate.engine not in (one.engine for one in used) and _fits(candidate, estimator, limits):
            used.append(candidate)
            yield estimator.estimate(candidate, limits.gpus.peak * limits.mfu)


def _candidates(kind: str, count: int, estimator: Estimator, limits: Limits) -> Iterator[Candidate]:
    """Yield the candidates of a kind, with shorter packs only as far as they hold the longest row."""
    sharded = get_family(estimator.config.model_type).layout.sharded
    first = next(candidates(kind, count, [limits.pack], limits.step_tokens, sharded=sharded))
    shortest = max(_SHORTEST_PACK, estimator.data(first).longest)
    packs, length = [limits.pack], limits.pack // 2
    while length >= shortest:
        packs.append(length)
        length //= 2
    return candidates(kind, count, packs, limits.step_tokens, sharded=sharded)


def _fits(candidate: Candidate, estimator: Estimator, limits: Limits) -> bool:
    states, host = estimator.states(candidate)
    if host > limits.host or _all(states, StepMemory(0, 0)) > limits.room:
        return False  # the step need not be measured
    if not candidate.recompute and not _fits(replace(candidate, recompute=True), estimator, limits):
        return False  # nor this one, which takes longer to measure
    return _all(states, estimator.step(candidate)) <= limits.room


def _all(states: StateMemory, step: StepMemory) -> int:
    return sum(memory_parts(states, step).values())


def _what_would(kind: str, estimator: Estimator, limits: Limits) -> str:
    """Return what would fit in the place of settings that do not."""
    found = [*_more_gpus(kind, estimator, limits), *_more_host_memory(kind, estimator, limits)]
    smaller = (one for one in _SMALLER.get(kind, ()) if any(_fitting(one, limits.gpus.count, estimator, limits)))
    found += itertools.islice(smaller, 1)
    return "; or ".join(found) or "GPUs of more memory"


def _more_gpus(kind: str, estimator: Estimator, limits: Limits) -> Iterator[str]:
    count = 2 * limits.gpus.count
    while count <= _MOST_GPUS:
        found = next(_fitting(kind, count, estimator, limits), None)
        if found is not None:
            yield f"{count} GPUs of this kind with {found.candidate.engine.name}"
            return
        count *= 2


def _more_host_memory(kind: str, estimator: Estimator, limits: Limits) -> Iterator[str]:
    """Yield the host memory with which offloading would fit."""
    for candidate in _candidates(kind, limits.gpus.count, estimator, limits):
        if candidate.engine.offloads and candidate.recompute:
            estimate = estimator.estimate(candidate, limits.gpus.peak * limits.mfu)
            if estimate.all <= limits.room:
                yield f"{candidate.engine.name} with {gib(estimate.host)} of host memory for each GPU"
                return
