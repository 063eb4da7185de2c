"""Memory, steps and hours of candidates, by the functions of ``--dry_run``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from qwenvl.cli.advise.candidates import KINDS, Candidate, parse_for
from qwenvl.cli.advise.workload import AssumedData, UserData
from qwenvl.config import ParsedArguments
from qwenvl.families import get_family
from qwenvl.profiling.activation_memory import StepMemory
from qwenvl.profiling.flops import flops_of
from qwenvl.profiling.state_memory import StateMemory, read_sharding
from qwenvl.train.build.model import model_of_shapes, prepare_model
from qwenvl.train.dry_run.preflight import count_states
from qwenvl.train.dry_run.report import count_hours, memory_parts
from qwenvl.train.schedule import plan_schedule


@dataclass(frozen=True)
class Estimate:
    """Figures of a candidate.

    Args:
        candidate: Settings.
        states: Memory of weights, gradients and optimizer.
        step: Memory of a micro-batch.
        host: Bytes of host memory for each GPU.
        steps: Optimizer steps of the run.
        hours: Hours of the run at the assumed MFU.
    """

    candidate: Candidate
    states: StateMemory
    step: StepMemory
    host: int
    steps: int
    hours: float

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of a GPU by part."""
        return memory_parts(self.states, self.step)

    @property
    def all(self) -> int:
        """Bytes of a GPU."""
        return sum(self.parts.values())


class Estimator:
    """Estimates candidates of one model and its data, and remembers what several of them share.

    Args:
        config: Config of the model.
        common: Flags of model, data and length of the run.
        tokens: Tokens of an epoch of the assumed mixture; None where the flags name data.
    """

    def __init__(self, config: PretrainedConfig, common: Mapping[str, Any], tokens: float | None = None) -> None:
        self.config = config
        self._common = common
        self._tokens = tokens
        self._models: dict[Any, PreTrainedModel] = {}
        self._steps: dict[Any, StepMemory] = {}
        self._states: dict[Any, tuple[StateMemory, int]] = {}
        self._data: dict[Any, AssumedData | UserData] = {}

    def states(self, candidate: Candidate) -> tuple[StateMemory, int]:
        """Return (memory of the state on a GPU, bytes of host memory for each GPU)."""
        key = candidate.kind, candidate.engine.name, candidate.gpus
        if key not in self._states:
            parsed = self._parse(candidate)
            sharding = read_sharding(parsed.training, candidate.gpus)
            model = self._model(candidate)
            found = count_states(model, sharding, parsed)
            kept = replace(sharding, offloads_optimizer=False, offloads_weights=False)
            whole = found if kept == sharding else count_states(model, kept, parsed)
            self._states[key] = found, whole.weights + whole.optimizer - found.weights - found.optimizer
        return self._states[key]

    def estimate(self, candidate: Candidate, speed: float) -> Estimate:
        """Return all figures of a candidate.

        Args:
            candidate: Settings.
            speed: Operations per second that a GPU reaches.

        Raises:
            UserError: The trainer would refuse its flags, or the data cannot be used.
        """
        parsed, data = self._parse(candidate), self.data(candidate)
        args, flops = parsed.training, flops_of(self._model(candidate))
        schedule = plan_schedule(data.indices, args, candidate.gpus)
        work, imbalance = data.work(flops, parsed, candidate.gpus)
        hours = count_hours(work * schedule.epochs, imbalance, candidate.gpus, speed)
        states, host = self.states(candidate)
        return Estimate(candidate, states, self.step(candidate), host, schedule.steps, hours)

    def step(self, candidate: Candidate) -> StepMemory:
        """Return the memory of a micro-batch, which no engine changes."""
        key = (*_trained(candidate), candidate.recompute, candidate.pack)
        if key not in self._steps:
            self._steps[key] = self.data(candidate).measure(self._model(candidate), self._parse(candidate))
        return self._steps[key]

    def data(self, candidate: Candidate) -> AssumedData | UserData:
        """Return the data of a candidate."""
        key = (*_trained(candidate), candidate.pack)
        if key not in self._data:
            self._data[key] = self._open(candidate)
        return self._data[key]

    def _open(self, candidate: Candidate) -> AssumedData | UserData:
        if self._tokens is not None:
            return AssumedData(self.config, candidate.pack, self._tokens)
        return UserData.open(self._parse(candidate), get_family(self.config.model_type), self.config)

    def _model(self, candidate: Candidate) -> PreTrainedModel:
        key = (*_trained(candidate), candidate.recompute)
        if key not in self._models:
            parsed, data = self._parse(candidate), self.data(candidate)
            model = model_of_shapes(parsed, self.config)
            self._models[key] = prepare_model(model, parsed, data.patchify(), data.added_tokens, data.objective)
        return self._models[key]

    def _parse(self, candidate: Candidate) -> ParsedArguments:
        return parse_for(candidate.flags(self._common), candidate.gpus)


def _trained(candidate: Candidate) -> tuple[Any, ...]:
    """Return what decides a kind's graph; quantized weights give the same one."""
    return tuple((name, value) for name, value in KINDS[candidate.kind].items() if name != "quantization_bit")
