"""Where in its data a run stands: written into every checkpoint, and held against the data of the run that resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenvl.data.sampling import SampleOrder, Sharding
from qwenvl.utilities.cache import array_hash
from qwenvl.utilities.distributed import world_size
from qwenvl.utilities.errors import UserError

FILE_NAME = "sampler_state.json"

_CAUSES = {
    "indices": "samples or packs in an epoch",
    "indices_per_step": "batch size x ranks x accumulation",
    "seed": "--data_seed, or --seed without it",
    "rows": "the datasets, their content, or which of their rows are used",
    "packs": "how rows are packed (--data_packing, --packing_plan, lengths)",
    "costs": "what samples cost (lengths, --group_by_cost, which parts train)",
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


def write_position(folder: Path, described: Mapping[str, Any], sharding: Sharding, step: int) -> None:
    """Write ``sampler_state.json``: what the order is made of, and the place in it after ``step`` optimizer steps.

    ``position`` counts the indices (samples, or packs) of the ``epoch`` that have been trained on.

    Args:
        folder: a checkpoint.
        described: from :func:`describe_order`.
        sharding: of this run, for the reader's information.
        step: optimizer steps taken.
    """
    indices, step_size = described["indices"], described["indices_per_step"]
    epoch, steps = divmod(step, -(-indices // step_size))
    state = {
        "epoch": epoch,
        "position": steps * step_size,
        "batch_size": sharding.batch_size,
        "world_size": sharding.world_size,
        "accumulation": sharding.accumulation,
        "order": dict(described),
    }
    (folder / FILE_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def read_batch_size(folder: str) -> int | None:
    """Return the batch size that a checkpoint was saved with; None for one without ``sampler_state.json``."""
    path = Path(folder) / FILE_NAME
    return int(json.loads(path.read_text(encoding="utf-8"))["batch_size"]) if path.exists() else None


def require_same_order(folder: str, described: Mapping[str, Any]) -> None:
    """Check that the samples after a checkpoint's position are those that the saved run would have seen.

    A checkpoint without ``sampler_state.json``, of the stock Trainer, is taken as it is.

    Raises:
        UserError: data or settings give another order; names what differs.
    """
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return
    state = json.loads(path.read_text(encoding="utf-8"))
    saved = state["order"]
    changed = [name for name in _CAUSES if saved.get(name) != described[name]]
    if not changed:
        return
    if changed == ["indices_per_step"]:
        raise UserError(
            f"{folder} was saved with batch size x ranks x accumulation {_product(state)} = {saved[changed[0]]}, and "
            f"this run has {described[changed[0]]}: its steps would hold other samples, some of them twice. "
            f"{_advice(state, world_size())}; or let the epoch begin again: --ignore_data_skip True."
        )
    causes = "; ".join(f"{_CAUSES[name]}{_values(saved.get(name), described[name])}" for name in changed)
    raise UserError(
        f"{folder} stands inside an epoch whose order was made of other data or settings, so that some samples would "
        f"be trained twice and others never. What differs: {causes}. Resume with the data and settings of "
        f"{Path(folder) / 'training_args.yaml'}; or start anew from its weights (--model_name_or_path {folder} and "
        "another --output_dir); or let its epoch begin again with the new order: --ignore_data_skip True."
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
