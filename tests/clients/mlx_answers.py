"""Runs in an environment with mlx-vlm: what it answers. Nothing of this repository is imported.

    python tests/clients/mlx_answers.py FOLDER REQUESTS.json ANSWERS.json

REQUESTS holds messages whose images are paths, and template arguments, of each request. ANSWERS gets the ids of each
prompt, the ids of the answer and their log-probabilities.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mlx_vlm import load, stream_generate
from mlx_vlm.utils import prepare_inputs


def main() -> None:
    folder, requests, answers = sys.argv[1:]
    model, processor = load(folder)
    found = []
    for messages, arguments in json.loads(Path(requests).read_text()):
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **arguments)
        images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        ids = prepare_inputs(processor, images=images or None, prompts=prompt)["input_ids"]
        answer = stream_generate(model, processor, prompt, images or None, max_tokens=8, temperature=0.0)
        steps = list(answer)[:-1]  # behind the tokens comes a summary
        tokens = [int(step.token) for step in steps]
        logprobs = [float(step.logprobs[token]) for step, token in zip(steps, tokens, strict=True)]
        found.append({"ids": ids[0].tolist(), "answer": tokens, "logprobs": logprobs})
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
