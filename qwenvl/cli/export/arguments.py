"""Flags of tools/export.py."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from qwenvl.cli.inference_args import NOT_ASKED, AskArguments
from qwenvl.config.parsing.command_line import HelpPage
from qwenvl.utils.errors import UserError

PAGE = HelpPage(
    "export.py --to fp8|gguf --model_name_or_path FOLDER --output DIR --dataset_use NAMES [--flag VALUE ...]",
    "Write a quantized copy of a trained model, checked on held-out samples against the model that it was made from: "
    "its answers, and the log-probabilities of their tokens. The figures stand in its model card.",
    NOT_ASKED | {"base", "batch_size", "temperature", "top_p", "seed"},
)
_OF_GGUF = ("gguf_type", "llama_cpp", "llama_python", "llama_server")


@dataclass
class ExportArguments(AskArguments):
    """Flags of this tool, besides those of the tools that ask a model."""

    to: Literal["fp8", "gguf"] | None = field(default=None, metadata={"help": "Form of the copy."})
    output: str = field(default="", metadata={"help": "Folder to write; it must be new or empty."})
    samples: int = field(default=32, metadata={"help": "Held-out samples to compare, evenly spread; 0 for all."})
    max_difference: float | None = field(
        default=None,
        metadata={
            "help": "Largest accepted mean difference of a token's log-probability, in nats: a copy above it is not "
            "kept. Default: no limit, as none suits every model; judge the reported figures."
        },
    )
    gguf_type: Literal["f32", "f16", "bf16", "q8_0"] = field(
        default="q8_0",
        metadata={"help": "Type of the weights, with --to gguf; of q8_0, those of the vision tower are f16."},
    )
    llama_cpp: str | None = field(
        default=None, metadata={"help": "Folder of llama.cpp's source, whose convert_hf_to_gguf.py writes the files."}
    )
    llama_python: str | None = field(
        default=None, metadata={"help": "Python that the converter runs with. Default: the one that runs this tool."}
    )
    llama_server: str = field(
        default="llama-server", metadata={"help": "Command of llama.cpp's server, which opens the files for the check."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to is None or not self.output:
            raise UserError("Name the form and the folder of the copy: --to fp8 --output DIR, or --to gguf.")
        if self.samples < 0 or (self.max_difference is not None and self.max_difference <= 0):
            raise UserError("--samples must be 0 or more, and --max_difference above 0.")
        changed = {one.name for one in fields(self) if getattr(self, one.name) != one.default}
        for name in [name for name in _OF_GGUF if name in changed and self.to != "gguf"]:
            raise UserError(f"--{name} has no effect with --to {self.to}. Leave it out, or write --to gguf.")
