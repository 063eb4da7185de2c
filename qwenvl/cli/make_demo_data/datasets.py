"""Entries of a dataset registry for the demo's data."""

from __future__ import annotations

import os

_TASKS = ("digits", "comparisons", "grounding", "motion")
_SUFFIXES = {"train": "", "heldout": "_heldout"}


def demo_datasets() -> dict[str, dict[str, str]]:
    """Return the entries of ``demo_digits``, ``demo_digits_heldout`` and so on, for ``data_dict``.

    scripts/demo.sh, demo_masks.sh and demo_thinking.sh write the files, to the folder in the environment variable
    ``DEMO_DIR``, or else to ``demo`` beside the registry's folder.
    """
    folder = os.environ.get("DEMO_DIR", "demo")
    tasks = {
        f"demo_{task}{suffix}": {
            "annotation_path": f"{folder}/data/{task}_{split}.jsonl",
            "data_path": f"{folder}/data",
        }
        for task in _TASKS
        for split, suffix in _SUFFIXES.items()
    }
    masks = {
        f"demo_masks{suffix}": {
            "annotation_path": f"{folder}/mask_scenes/scenes_{split}.jsonl",
            "data_path": f"{folder}/mask_scenes",
        }
        for split, suffix in _SUFFIXES.items()
    }
    comparisons = {
        f"demo_{name}": {"annotation_path": f"{folder}/data/{name}.jsonl", "data_path": f"{folder}/data"}
        for name in ("compare_plain_heldout", "compare_thinking_heldout")
    }
    comparisons["demo_compare"] = {
        "annotation_path": f"{folder}/data/compare_train.jsonl",
        "data_path": f"{folder}/data",
    }
    return {**tasks, **masks, **comparisons}
