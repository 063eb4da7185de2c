"""What goes to the Hugging Face hub: the model's own files, not checkpoints, curves or lists of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

_MODEL = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.yaml", "README.md"]
_OTHER = ["*/*", ".*", "manifest.json", "position.json", "trainer_state.json"]


def push_model(
    folder: Path, repository: str, args: TrainingArguments, message: str, *, token: str | None = None
) -> Any:
    """Upload the model that lies in a folder, without its subfolders, and wait for it.

    Args:
        folder: with the model.
        repository: on the hub, which exists.
        args: with token and revision.
        message: of the commit.
        token: instead of the arguments' own.
    """
    return HfApi(token=token or args.hub_token).upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message=message,
        allow_patterns=_MODEL,
        ignore_patterns=_OTHER,
        revision=args.hub_revision,
    )


def push_checkpoint(folder: Path, repository: str, args: TrainingArguments) -> None:
    """Upload a whole checkpoint as ``--hub_strategy`` asks for it, and wait for it.

    ``end``: nothing before the end; ``every_save``: the model in it; ``checkpoint``: besides, all of it as
    ``last-checkpoint``; ``all_checkpoints``: under its own name.
    """
    if args.hub_strategy == HubStrategy.END:
        return
    message = f"Training in progress, step {folder.name.rpartition('-')[2]}"
    push_model(folder, repository, args, message)
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
        HfApi(token=args.hub_token).upload_folder(
            repo_id=repository,
            folder_path=folder,
            path_in_repo=place,
            commit_message=f"{message}, checkpoint",
            revision=args.hub_revision,
        )
