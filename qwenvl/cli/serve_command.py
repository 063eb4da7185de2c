"""Print the words of the command with which vLLM serves a trained folder, each ended by a NUL.

scripts/serve.sh runs ``python -m qwenvl.cli.serve_command OUTPUT``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from qwenvl.cli.check_serving import compare_limits, describe, open_serving, read_arguments
from qwenvl.serving.commands import vllm_words
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import setup_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Print them; return the exit code."""
    setup_logging("warning")
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if len(given) != 1:
            raise UserError("Name one folder, that of a trained model or of adapters.")
        arguments = read_arguments(["--model_name_or_path", given[0]])
        serving, adapter = open_serving(arguments)
        carried = compare_limits(serving).state == "equal"
        served = replace(describe(arguments, serving, adapter, (), carried=carried), counts={})
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if adapter and adapter.obstacle:
        sys.stderr.write(f"{adapter.obstacle}: merge the adapter (tools/merge_lora.py) and serve the merged folder.\n")
        return 1
    sys.stdout.write("".join(f"{word}\0" for word in vllm_words(served)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
