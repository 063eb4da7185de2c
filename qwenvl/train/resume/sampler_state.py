"""Position of a run in its data: saved with every checkpoint, and checked against the data of the resumed run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenvl.config import TrainingArguments
from qwenvl.data.sampler import SampleOrder, Sharding
from qwenvl.models.lora.files import start_anew
from qwenvl.utils.cache import array_hash
from qwenvl.utils.distributed import world_size
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)

FILE_NAME = "sampler_state.json"

_CAUSES = {
    "indices": "samples or packs in an epoch",
    "indices_per_step": "batch size x ranks x accumulation",
    "seed": "--data_seed, or --seed without it",
    "rows": "the datasets, their content, or which of their rows are used",
    "packs": "how rows are packed (--data_packing, --packing_plan, lengths)",
    "costs": "what samples cost (lengths, --group_by_cost)",
}


def describe_order(order: SampleOrder, step_size: int, content: Mapping[str, str | None]) -> dict[str, Any]:
    """Return everything that determines which samples come at which step, in JSON values.

    Of ranks, batch size and accumulation only the product counts.

    Args:
        order: Order of the indices.
        step_size: Number of indices in one optimizer step.
        content: Hashes of the data behind the indices, by name, from ``ConversationDataset.content``.
    """
    known = [one for one in (order.costs, order.lengths) if one is not None]
    return {
        "indices": order.num_samples,
        "indices_per_step": step_size,
        "seed": order.seed,
        "costs": array_hash(*known) if known else None,
        **content,
    }


@dataclass(frozen=True, slots=True)
class Repeats:
    """Steps that a run has repeated because it restarted an epoch (``--ignore_data_skip``).

    Args:
        steps: Number of repeated optimizer steps, included in the steps taken.
        asked: Whether the run was started with ``--ignore_data_skip``.
    """

    steps: int = 0
    asked: bool = False


def write_position(
    folder: Path, described: Mapping[str, Any], sharding: Sharding, step: int, repeats: Repeats | None = None
) -> None:
    """Write ``sampler_state.json``: a description of the order, and the position after ``step`` optimizer steps.

    ``position`` counts the indices (samples, or packs) of the ``epoch`` that have been trained on.

    Args:
        folder: Folder of a checkpoint.
        described: Result of :func:`describe_order`.
        sharding: Sharding of this run, recorded for information.
        step: Number of optimizer steps taken.
        repeats: Repeated part of these steps; None for none.
    """
    repeats = repeats or Repeats()
    epoch, steps = divmod(step - repeats.steps, _steps_of_epoch(described))
    state = {
        "epoch": epoch,
        "position": steps * described["indices_per_step"],
        "repeated_steps": repeats.steps,
        "ignore_data_skip": repeats.asked,
        "batch_size": sharding.batch_size,
        "world_size": sharding.world_size,
        "accumulation": sharding.accumulation,
        "order": dict(described),
    }
    (folder / FILE_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def read_batch_size(folder: str) -> int | None:
    """Return the batch size that a checkpoint was saved with; None for one without ``sampler_state.json``."""
    state = _read(folder)
    return int(state["batch_size"]) if state else None


def count_repeats(folder: str, step: int, steps_of_epoch: int, *, again: bool) -> int:
    """Return how many of a checkpoint's steps do not advance the position in the data of the resumed run.

    Args:
        folder: Folder of the checkpoint.
        step: Number of optimizer steps taken.
        steps_of_epoch: Number of optimizer steps per epoch in the resumed run.
        again: Whether the resumed run restarts the epoch, with its own order.
    """
    state = _read(folder)
    saved = int(state.get("repeated_steps", 0)) if state else 0
    if not again:
        return saved
    same = state is not None and _steps_of_epoch(state["order"]) == steps_of_epoch
    progress = step - saved if same else step
    return step - progress // steps_of_epoch * steps_of_epoch


def begins_again(folder: str, described: Mapping[str, Any]) -> bool:
    """Whether a run with ``--ignore_data_skip`` restarts the checkpoint's epoch; logs a warning if it does.

    A checkpoint of the same command, requeued, resumes at its position: otherwise a job that is requeued often would
    never finish an epoch.
    """
    state = _read(folder)
    changed = [] if state is None else _changed(state["order"], described)
    if state is not None and state.get("ignore_data_skip") and not changed:
        return False
    because = f" What differs: {_causes(state['order'], described)}." if state is not None and changed else ""
    logger.warning("%s: the epoch begins again, as --ignore_data_skip asks for.%s", folder, because)
    return True


def _read(folder: str) -> dict[str, Any] | None:
    path = Path(folder) / FILE_NAME
    state: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return state


def _steps_of_epoch(described: Mapping[str, Any]) -> int:
    return -(-int(described["indices"]) // int(described["indices_per_step"]))


def _changed(saved: Mapping[str, Any], described: Mapping[str, Any]) -> list[str]:
    return [name for name in _CAUSES if saved.get(name) != described[name]]


def _causes(saved: Mapping[str, Any], described: Mapping[str, Any]) -> str:
    """Return the differences between two descriptions of an order, in words."""
    names = _changed(saved, described)
    return "; ".join(f"{_CAUSES[name]}{_values(saved.get(name), described[name])}" for name in names)


def require_same_order(folder: str, described: Mapping[str, Any]) -> None:
    """Check that the resumed run continues with the same samples as the saved run would have.

    A checkpoint without ``sampler_state.json``, from the stock Trainer, is accepted.

    Raises:
        UserError: Data or settings give another order; the message names the differences.
    """
    state = _read(folder)
    changed = [] if state is None else _changed(state["order"], described)
    if state is None or not changed:
        return
    if changed == ["indices_per_step"]:
        raise UserError(
            f"{folder} was saved with batch size x ranks x accumulation {_product(state)} = "
            f"{state['order']['indices_per_step']}, and this run has {described['indices_per_step']}: its steps would "
            f"hold other samples, some of them twice. {_advice(state, world_size())}; or let the epoch begin again: "
            "--ignore_data_skip True."
        )
    causes = _causes(state["order"], described)
    raise UserError(
        f"{folder} stands inside an epoch whose order was made of other data or settings, so that some samples would "
        f"be trained twice and others never. What differs: {causes}. Resume with the data and settings of "
        f"{Path(folder) / 'training_args.yaml'}; or let its epoch begin again with the new order: "
        f"--ignore_data_skip True; or {start_anew(folder)}."
    )


def _product(state: Mapping[str, Any]) -> str:
    return f"{state['batch_size']} x {state['world_size']} x {state['accumulation']}"


def _advice(state: Mapping[str, Any], ranks: int) -> str:
    """Return the flags that give a saved run's steps on another number of ranks, with its batch size if possible."""
    samples = state["order"]["indices_per_step"]
    if samples % ranks:
        return f"No setting gives steps of {samples} on {ranks} ranks: resume on a number of ranks that divides it"
    size = next(size for size in range(state["batch_size"], 0, -1) if samples // ranks % size == 0)
    accumulation = samples // ranks // size
    return f"Set --per_device_train_batch_size {size} --gradient_accumulation_steps {accumulation}"


def _values(saved: Any, now: Any) -> str:
    """Return both values for a message if they are numbers; empty for hashes."""
    return f" ({saved}, now {now})" if isinstance(saved, int) and isinstance(now, int) else ""


class SamplerPosition:
    """Position of a run in the order of its samples, saved with checkpoints and read by a resumed run.

    Args:
        order: Order of the dataset's indices.
        content: Hashes of the data behind the indices, by name, from ``ConversationDataset.content``.
        args: Settings of the run. Its ``ignore_data_skip`` may change before the run begins.
    """

    def __init__(self, order: SampleOrder, content: Mapping[str, str | None], args: TrainingArguments) -> None:
        self._order, self._content, self._args = order, content, args
        self._repeats = Repeats(asked=args.ignore_data_skip)

    def _describe(self, sharding: Sharding) -> dict[str, Any]:
        return describe_order(self._order, sharding.step_size, self._content)

    def begins_again(self, checkpoint: str, sharding: Sharding) -> bool:
        """Whether the epoch of a checkpoint is restarted (``--ignore_data_skip``).

        Otherwise the next sample of the checkpoint and of this run must be the same.

        Raises:
            UserError: It was saved with other data or other settings of the order.
        """
        if self._args.auto_find_batch_size:  # the Trainer continues with the size that it had found
            sharding = replace(sharding, batch_size=read_batch_size(checkpoint) or sharding.batch_size)
        described = self._describe(sharding)
        if self._args.ignore_data_skip:
            return begins_again(checkpoint, described)
        require_same_order(checkpoint, described)
        return False

    def take_up(self, checkpoint: str, step: int, steps_of_epoch: int) -> tuple[int, int]:
        """Return the epoch and the micro-batch in it with which a resumed run continues after ``step`` optimizer steps.

        The Trainer would compute both from all steps taken, including repeated ones.
        """
        repeated = count_repeats(checkpoint, step, steps_of_epoch, again=self._args.ignore_data_skip)
        self._repeats = replace(self._repeats, steps=repeated)
        epoch, steps = divmod(step - repeated, steps_of_epoch)
        return epoch, steps * self._args.gradient_accumulation_steps

    def write(self, folder: Path, sharding: Sharding, step: int) -> None:
        """Write the position after ``step`` optimizer steps, and the description of the order."""
        write_position(folder, self._describe(sharding), sharding, step, self._repeats)
