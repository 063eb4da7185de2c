"""Runs in an environment with vLLM: what it answers without a server. Nothing of this repository is imported.

    python tests/clients/vllm_offline.py REQUESTS.json ANSWERS.json MODEL [--flag VALUE ...]

MODEL and flags are those of ``vllm serve``, read by vLLM's own parser. REQUESTS holds messages and template arguments
of each request. ANSWERS gets the ids of each prompt, the ids of the answer and their log-probabilities.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.lora.request import LoRARequest
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    requests, answers, model, *flags = sys.argv[1:]
    given = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model, *flags])
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(given))
    asked: dict[str, Any] = {"use_tqdm": False}
    if given.chat_template:
        asked["chat_template"] = Path(given.chat_template).read_text()
    if given.lora_modules:
        (adapter,) = given.lora_modules
        asked["lora_request"] = LoRARequest(adapter.name, 1, adapter.path)
    greedy = SamplingParams(temperature=0, max_tokens=16, logprobs=0)
    found = []
    for messages, arguments in json.loads(Path(requests).read_text()):
        (output,) = llm.chat(messages, greedy, chat_template_kwargs=arguments, **asked)
        said = output.outputs[0]
        logprobs = [step[token].logprob for step, token in zip(said.logprobs, said.token_ids, strict=True)]
        found.append({"prompt": list(output.prompt_token_ids), "answer": list(said.token_ids), "logprobs": logprobs})
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
