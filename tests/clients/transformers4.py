"""Runs in an environment with transformers 4: what it makes of a saved folder. Nothing of this repository is imported.

    python tests/clients/transformers4.py FOLDER REQUESTS.pt ANSWERS.pt

REQUESTS holds a list of ``messages`` whose images are paths and whose videos are uint8 [n, 3, height, width], with the
``metadata`` of each, and ``media``, further arguments of the processor where there are videos. ANSWERS gets the ids of
each prompt and the log-probabilities of the token behind it.
"""

from __future__ import annotations

import sys

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata


def main() -> None:
    folder, requests, answers = sys.argv[1:]
    processor = AutoProcessor.from_pretrained(folder)
    model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    found = []
    for request in torch.load(requests):
        media = {}
        if request["metadata"]:
            media = {"video_metadata": [VideoMetadata(**one) for one in request["metadata"]], **request["media"]}
        inputs = processor.apply_chat_template(
            request["messages"],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **media,
        )
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0, -1]
        found.append({"ids": inputs["input_ids"][0].tolist(), "next": torch.log_softmax(logits.float(), -1)})
    torch.save({"version": transformers.__version__, "found": found}, answers)


if __name__ == "__main__":
    main()
