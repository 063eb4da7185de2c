"""Upload to the Hugging Face hub: the model's own files, without checkpoints, curves and lists of samples."""

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
    """Upload the model in a folder, without its subfolders, and wait for the upload.

    Args:
        folder: Folder of the model.
        repository: Existing repository on the hub.
        args: Arguments of the run, with token and revision.
        message: Commit message.
        token: Token to use instead of the arguments' one.
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
    """Upload a complete checkpoint according to ``--hub_strategy``, and wait for the upload.

    ``end``: nothing before the end; ``every_save``: its model; ``checkpoint``: its model, and the whole checkpoint as
    ``last-checkpoint``; ``all_checkpoints``: its model, and the whole checkpoint under its own name.
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
