"""A folder of a model with the head of a task, opened by one call, on stock transformers.

from qwenvl.tasks.heads.predict import open_task_model

model = open_task_model("output/apples-classifier")
question = [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "Ripe?"}]}]
model.predict([question])   # [{"label": "ripe", "probabilities": {"ripe": 0.98, "unripe": 0.02}}]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwenvl.inference.generate import Answerer, encode_prompts, open_answerer
from qwenvl.inference.prompts import Prompt
from qwenvl.models.parts import language_model
from qwenvl.tasks import files as task_files
from qwenvl.tasks.heads.head import HeadSpec, TaskHead
from qwenvl.tasks.heads.objective import describe_scores
from qwenvl.tasks.heads.pooling import pooled_rows, token_places

USAGE = """from qwenvl.tasks.heads.predict import open_task_model  # of this trainer

# The model alone opens as usual, with AutoModelForImageTextToText.

model = open_task_model("{name}")
turn = {{"role": "user", "content": [{{"type": "image", "image": "a.jpg"}}, {{"type": "text", "text": "..."}}]}}
print(model.predict([[turn]]))"""
"""Lines of a model card."""


@dataclass(frozen=True)
class TaskModel:
    """A stock model and the head that reads its hidden states.

    Args:
        answerer: the model with its processor.
        head: of its task; ``head.spec`` says which, with classes, pooling and layer.
    """

    answerer: Answerer
    head: TaskHead

    def predict(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Return what each conversation is, in words.

        Args:
            conversations: turns in the form that the processor's ``apply_chat_template`` takes, up to the question;
                with the answer, where the head was trained with ``--keep_answer``.

        Returns:
            As :func:`qwenvl.tasks.heads.objective.describe_scores`.
        """
        inputs = self.answerer.processor.apply_chat_template(
            [list(turns) for turns in conversations],
            tokenize=True,
            add_generation_prompt=not self.head.spec.keep_answer,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
            **self.answerer.template_kwargs,
        )
        return [describe_scores(self.head.spec, scores) for scores in self.scores(inputs)]

    def predict_prompts(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Return what each sample of the data path is; see :meth:`predict`."""
        inputs = encode_prompts(self.answerer, prompts, answered=self.head.spec.keep_answer)
        return [describe_scores(self.head.spec, scores) for scores in self.scores(inputs)]

    def scores(self, inputs: Mapping[str, Any]) -> list[np.ndarray]:
        """Return the scores of each row, [units of the sample, outputs]: one unit, or one for each picture to rank.

        Args:
            inputs: of the processor: ``input_ids`` and ``attention_mask`` int64 [B, T], padded on either side, and the
                media's tensors.
        """
        model = self.answerer.model
        stock = getattr(model, "get_base_model", lambda: model)()
        ids: Tensor = inputs["input_ids"]
        tokens = {1: stock.config.image_token_id, 2: stock.config.video_token_id}
        kinds = sum((kind * (ids == token).long() for kind, token in tokens.items()), torch.zeros_like(ids))
        moved = {name: value.to(model.device) for name, value in inputs.items() if torch.is_tensor(value)}
        moved["mm_token_type_ids"] = kinds.to(model.device)
        places = token_places({"attention_mask": inputs["attention_mask"].cpu()})
        mask, spec = (kinds > 0).flatten().cpu().numpy(), self.head.spec
        units = [pooled_rows(spec.pooling, [one], mask, by_picture=spec.task == "ranking") for one in places]
        rows = torch.cat([one.rows for one in units]).to(model.device)
        lengths = [length for one in units for length in one.lengths]
        handles = self.head.watch(language_model(stock))
        try:
            with torch.no_grad():
                self.head.start({})
                found = self.head(stock.model(**moved, use_cache=False), {"rows": rows, "lengths": lengths})
        finally:
            for handle in handles:
                handle.remove()
        edges = np.cumsum([len(one.lengths) for one in units])[:-1]
        return np.split(found.double().cpu().numpy(), edges)


def open_head(folder: str) -> TaskHead:
    """Open the head alone.

    Raises:
        UserError: the folder holds none, or a damaged one.
    """
    head = TaskHead(HeadSpec.from_record(task_files.read_record(folder)))
    task_files.load(head, folder)
    return head.eval()


def open_task_model(folder: str, *, device: str | None = None, dtype: torch.dtype | None = None) -> TaskModel:
    """Open a folder that a run with ``--task`` has saved, whole or adapters.

    Args:
        folder: the output folder, or a checkpoint.
        device: such as ``cpu`` or ``cuda:1``; None for the accelerator where there is one.
        dtype: of the model's weights; None for the one they are saved in. The head computes in float32.

    Raises:
        UserError: it holds no head of a task, or cannot be opened.
    """
    head = open_head(folder)
    answerer = open_answerer(folder, device=device, dtype=dtype)
    return TaskModel(answerer, head.to(answerer.model.device))


def add_head(answerer: Answerer, folder: str) -> TaskModel:
    """Return an open model with the head in its folder.

    Raises:
        UserError: the folder holds none, or a damaged one.
    """
    return TaskModel(answerer, open_head(folder).to(answerer.model.device))


def saved_scores(folder: str, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return what the saved head says of one sample with a stock model: [units, outputs]."""
    return torch.from_numpy(add_head(Answerer(model, None), folder).scores(inputs)[0])
