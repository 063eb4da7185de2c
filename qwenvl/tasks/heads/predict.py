"""Open a model folder with the head of a task, on stock transformers, and predict.

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

from qwenvl.inference.generate import ChatModel, encode_prompts, open_chat_model
from qwenvl.inference.prompts import Prompt
from qwenvl.models.parts import language_model
from qwenvl.tasks import files as task_files
from qwenvl.tasks.heads.head import HeadSpec, TaskHead
from qwenvl.tasks.heads.objective import describe_scores
from qwenvl.tasks.heads.pooling import pooled_rows, token_places

USAGE = """from qwenvl.tasks.heads.predict import open_task_model  # from this trainer

# Without the head, the model opens with AutoModelForImageTextToText as usual.

model = open_task_model("{name}")
turn = {{"role": "user", "content": [{{"type": "image", "image": "a.jpg"}}, {{"type": "text", "text": "..."}}]}}
predictions = model.predict([[turn]])"""
"""Lines of a model card."""


@dataclass(frozen=True)
class TaskModel:
    """A stock model with a head on its hidden states.

    Args:
        chat_model: Model and processor.
        head: Head of the task; ``head.spec`` holds its classes, pooling and layer.
    """

    chat_model: ChatModel
    head: TaskHead

    def predict(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Return the prediction for each conversation.

        Args:
            conversations: Turns in the form that the processor's ``apply_chat_template`` takes, up to the question;
                with the answer if the head was trained with ``--keep_answer``.

        Returns:
            Dicts as from :func:`qwenvl.tasks.heads.objective.describe_scores`.
        """
        inputs = self.chat_model.processor.apply_chat_template(
            [list(turns) for turns in conversations],
            tokenize=True,
            add_generation_prompt=not self.head.spec.keep_answer,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
            **self.chat_model.template_kwargs,
        )
        return [describe_scores(self.head.spec, scores) for scores in self.scores(inputs)]

    def predict_prompts(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Return the prediction for each prompt of the data path; see :meth:`predict`."""
        inputs = encode_prompts(self.chat_model, prompts, answered=self.head.spec.keep_answer)
        return [describe_scores(self.head.spec, scores) for scores in self.scores(inputs)]

    def scores(self, inputs: Mapping[str, Any]) -> list[np.ndarray]:
        """Return the scores of each row, [units of the sample, outputs]: one unit, or one for each image to rank.

        Args:
            inputs: Output of the processor: ``input_ids`` and ``attention_mask`` int64 [B, T], padded on either side,
                and the tensors of media.
        """
        model = self.chat_model.model
        stock = getattr(model, "get_base_model", lambda: model)()
        ids: Tensor = inputs["input_ids"]
        tokens = {1: stock.config.image_token_id, 2: stock.config.video_token_id}
        kinds = sum((kind * (ids == token).long() for kind, token in tokens.items()), torch.zeros_like(ids))
        moved = {name: value.to(model.device) for name, value in inputs.items() if torch.is_tensor(value)}
        moved["mm_token_type_ids"] = kinds.to(model.device)
        places = token_places({"attention_mask": inputs["attention_mask"].cpu()})
        mask, spec = (kinds > 0).flatten().cpu().numpy(), self.head.spec
        units = [pooled_rows(spec.pooling, [one], mask, by_image=spec.task == "ranking") for one in places]
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
    """Open the head without its model.

    Raises:
        UserError: the folder holds no head, or a damaged one.
    """
    head = TaskHead(HeadSpec.from_record(task_files.read_record(folder)))
    task_files.load(head, folder)
    return head.eval()


def open_task_model(folder: str, *, device: str | None = None, dtype: torch.dtype | None = None) -> TaskModel:
    """Open a folder saved by a run with ``--task``, with full weights or adapters.

    Args:
        folder: Output folder, or a checkpoint.
        device: Device such as ``cpu`` or ``cuda:1``; None for the accelerator if there is one.
        dtype: Dtype of the model's weights; None for the dtype that they are saved in. The head computes in float32.

    Raises:
        UserError: it holds no head of a task, or cannot be opened.
    """
    head = open_head(folder)
    chat_model = open_chat_model(folder, device=device, dtype=dtype)
    return TaskModel(chat_model, head.to(chat_model.model.device))


def add_head(chat_model: ChatModel, folder: str) -> TaskModel:
    """Return an open model with the head in its folder.

    Raises:
        UserError: the folder holds no head, or a damaged one.
    """
    return TaskModel(chat_model, open_head(folder).to(chat_model.model.device))


def saved_scores(folder: str, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the scores of one sample from a stock model with the saved head: [units, outputs]."""
    return torch.from_numpy(add_head(ChatModel(model, None), folder).scores(inputs)[0])
