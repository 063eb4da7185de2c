"""Where in its data a run stands: written into every checkpoint, and held against the data of the run that resumes."""

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
    """Return everything that decides which samples come at which step, in a form that JSON holds.

    The ranks are not part of it, nor is batch size or accumulation: only their product with the ranks is.

    Args:
        order: of the indices.
        step_size: indices of one optimizer step.
        content: hashes of what stands at the indices, by name: ``ConversationDataset.content``.
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
    """How often a run has begun an epoch again (``--ignore_data_skip``), so that steps are not all progress.

    Args:
        steps: Optimizer steps that are repeated: with the others, they make up the steps taken.
        asked: Whether the run was started with ``--ignore_data_skip``.
    """

    steps: int = 0
    asked: bool = False


def write_position(
    folder: Path, described: Mapping[str, Any], sharding: Sharding, step: int, repeats: Repeats | None = None
) -> None:
    """Write ``sampler_state.json``: what the order is made of, and the place in it after ``step`` optimizer steps.

    ``position`` counts the indices (samples, or packs) of the ``epoch`` that have been trained on.

    Args:
        folder: a checkpoint.
        described: from :func:`describe_order`.
        sharding: of this run, for the reader's information.
        step: optimizer steps taken.
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
    """Return how many of a checkpoint's steps are not progress in the data of the run that resumes from it.

    Args:
        folder: Checkpoint.
        step: Optimizer steps taken.
        steps_of_epoch: Optimizer steps of an epoch of the run that resumes.
        again: Whether that run begins the epoch again, with its own order.
    """
    state = _read(folder)
    saved = int(state.get("repeated_steps", 0)) if state else 0
    if not again:
        return saved
    same = state is not None and _steps_of_epoch(state["order"]) == steps_of_epoch
    progress = step - saved if same else step
    return step - progress // steps_of_epoch * steps_of_epoch


def begins_again(folder: str, described: Mapping[str, Any]) -> bool:
    """Whether a run with ``--ignore_data_skip`` begins the checkpoint's epoch again; says so if it does.

    A checkpoint of the same command, started again after a requeue, is gone on from: or no epoch would ever end.
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
    """Return what makes another order of two descriptions, in words."""
    names = _changed(saved, described)
    return "; ".join(f"{_CAUSES[name]}{_values(saved.get(name), described[name])}" for name in names)


def require_same_order(folder: str, described: Mapping[str, Any]) -> None:
    """Check that the samples after a checkpoint's position are those that the saved run would have seen.

    A checkpoint without ``sampler_state.json``, of the stock Trainer, is taken as it is.

    Raises:
        UserError: data or settings give another order; names what differs.
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
    """Say which flags give the steps of a saved run on another number of ranks, preferably with its batch size."""
    samples = state["order"]["indices_per_step"]
    if samples % ranks:
        return f"No setting gives steps of {samples} on {ranks} ranks: resume on a number of ranks that divides it"
    size = next(size for size in range(state["batch_size"], 0, -1) if samples // ranks % size == 0)
    accumulation = samples // ranks // size
    return f"Set --per_device_train_batch_size {size} --gradient_accumulation_steps {accumulation}"


def _values(saved: Any, now: Any) -> str:
    """Numbers are worth showing, hashes are not."""
    return f" ({saved}, now {now})" if isinstance(saved, int) and isinstance(now, int) else ""


class SamplerPosition:
    """Where a run stands in the order of its samples; written to checkpoints, and read by the run that resumes.

    Args:
        order: Order of the dataset's indices.
        content: Hashes of what stands at the indices, by name: ``ConversationDataset.content``.
        args: Settings of the run. Its ``ignore_data_skip`` may change before the run begins.
    """

    def __init__(self, order: SampleOrder, content: Mapping[str, str | None], args: TrainingArguments) -> None:
        self._order, self._content, self._args = order, content, args
        self._repeats = Repeats(asked=args.ignore_data_skip)

    def _describe(self, sharding: Sharding) -> dict[str, Any]:
        return describe_order(self._order, sharding.step_size, self._content)

    def begins_again(self, checkpoint: str, sharding: Sharding) -> bool:
        """Whether the epoch of a checkpoint begins again, as ``--ignore_data_skip`` asks for.

        Otherwise its next sample has to be the one that comes next here.

        Raises:
            UserError: it was saved with other data or other settings of the order.
        """
        if self._args.auto_find_batch_size:  # the Trainer goes on with the size it had found
            sharding = replace(sharding, batch_size=read_batch_size(checkpoint) or sharding.batch_size)
        described = self._describe(sharding)
        if self._args.ignore_data_skip:
            return begins_again(checkpoint, described)
        require_same_order(checkpoint, described)
        return False

    def take_up(self, checkpoint: str, step: int, steps_of_epoch: int) -> tuple[int, int]:
        """Return the epoch and its micro-batch that a resumed run goes on with, after ``step`` optimizer steps.

        The Trainer computes both from the steps taken, some of which may be repeated ones.
        """
        repeated = count_repeats(checkpoint, step, steps_of_epoch, again=self._args.ignore_data_skip)
        self._repeats = replace(self._repeats, steps=repeated)
        epoch, steps = divmod(step - repeated, steps_of_epoch)
        return epoch, steps * self._args.gradient_accumulation_steps

    def write(self, folder: Path, sharding: Sharding, step: int) -> None:
        """Write how far the data are used after ``step`` optimizer steps, and what their order is made of."""
        write_position(folder, self._describe(sharding), sharding, step, self._repeats)
