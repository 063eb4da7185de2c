"""The scoring pass: the loss of each sample with its own images, blank ones and another sample's."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qwenvl.cli.data_args import chosen_datasets
from qwenvl.cli.inference_args import open_asking_encoder, open_model, progress_bar
from qwenvl.cli.rank_samples.arguments import RankArguments
from qwenvl.data.dataset import open_tables
from qwenvl.inference.answer_rows import Job, answer_rows, measure
from qwenvl.inference.generate import Decoding
from qwenvl.inference.other_images import VIEWS, View, find_partners
from qwenvl.metrics.predictions import Prediction
from qwenvl.utils.errors import UserError


def score_views(arguments: RankArguments, folder: Path) -> Mapping[View, Sequence[Prediction]]:
    """Compute the losses that are not in the folder yet; every process has to call it.

    Raises:
        UserError: Model, data or output cannot be used.
    """
    tables = open_tables(chosen_datasets(arguments), arguments.data_seed, arguments.data_cache_dir)
    encoder = open_asking_encoder(arguments)
    if encoder.targets is not None:
        raise UserError(
            "--model_name_or_path has the head of a task, whose losses training alone computes: train with "
            "--log_sample_losses True, and give --sample_losses."
        )
    job = Job(
        arguments.model_name_or_path,
        tables,
        encoder,
        Decoding(1),
        arguments.batch_size,
        arguments.seed,
        with_loss=True,
    )
    model = functools.cache(lambda: open_model(arguments, encoder))
    views: dict[View, Sequence[Prediction]] = {}
    for view in VIEWS:
        partners = find_partners(views["shown"], arguments.seed) if view == "swapped" else {}
        viewed = replace(job, view=view, partners=partners)
        told = progress_bar(f"Scoring, images {view}")
        views[view] = answer_rows(viewed, folder / f"losses_{view}.jsonl", model, told, measure)
    return views
