"""The forms of a quantized copy: how each is written, and how it answers samples for the check."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qwenvl.cli.export.arguments import ExportArguments
from qwenvl.cli.export.check import Heard, answer
from qwenvl.cli.export.fp8 import require_quantizable, write_fp8
from qwenvl.cli.export.gguf import gguf_files, image_tokens, require_converter, require_convertible, write_gguf
from qwenvl.cli.export.llama_server import listen, llama_server
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.processor import open_processor
from qwenvl.data.types import VideoItem
from qwenvl.inference.generate import ChatModel, default_device
from qwenvl.inference.prompts import EvalExample
from qwenvl.models.loading import load_model
from qwenvl.models.precision import read_dtype
from qwenvl.serving.programs import llama_flags
from qwenvl.utils.errors import UserError

logger = logging.getLogger("qwenvl.export")

_COPIED = (".json", ".jinja", ".txt", ".yaml", ".model")
_NOT_COPIED = ("config.json", "model.safetensors.index.json", "trainer_state.json")

_FP8 = """The linear layers of the language model have FP8 weights (e4m3) with a scale for each block of 128 x 128, in
the form of Qwen's published FP8 checkpoints; the vision tower, embeddings and output projection are not quantized.
Servers also round activations to FP8; these figures were computed with dequantized weights and do not hold that."""

_GGUF = """GGUF files by llama.cpp's converter, compared in llama.cpp's server, which has to be told the limits of
images:

```bash
llama-server {flags}
```

It fits an image into its size with black edges, where training stretches it, and rounds a half the other way. "Images
as trained" had the size of training already; "files" were sent as they are. Videos were not compared."""


class Fp8:
    """FP8 weights, opened by transformers."""

    suffix = "safetensors"

    def __init__(self, arguments: ExportArguments) -> None:
        self.arguments = arguments
        self.folder = Path(arguments.model_name_or_path)

    def require(self, config: Mapping[str, Any]) -> None:
        """Refuse models and flags that the form is not for, before anything is opened."""
        require_quantizable(config, str(self.folder))

    def write(self, encoder: SampleEncoder, copy: Path) -> None:
        """Write the copy into a folder."""
        count = write_fp8(self.folder, copy)
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and file.suffix in _COPIED and file.name not in _NOT_COPIED:
                shutil.copy2(file, copy)
        logger.info("Quantized %d weights.", count)

    def fitting(self, examples: Sequence[EvalExample]) -> list[EvalExample]:
        """Return the samples that the copy can be asked."""
        return list(examples)

    def ask(self, encoder: SampleEncoder, copy: Path, examples: Sequence[EvalExample]) -> dict[str, list[Heard]]:
        """Return the copy's answers by the way of asking; the first is the one that decides."""
        opened = self._open(encoder, copy)
        return {"value": [answer(opened, one.prompt, self.arguments.max_new_tokens) for one in examples]}

    def about(self, encoder: SampleEncoder, output: Path) -> str:
        """Return what the model card says of the form."""
        return _FP8

    def _open(self, encoder: SampleEncoder, copy: Path) -> ChatModel:
        """Open the copy with dequantized weights, which any device computes with."""
        dtype = read_dtype(str(copy)) if self.arguments.dtype == "auto" else getattr(torch, self.arguments.dtype)
        model: Any = load_model(str(copy), dtype=dtype, attn_implementation="sdpa")
        device = self.arguments.device or default_device()
        return ChatModel(model.to(device).eval(), open_processor(str(copy)), encoder.template.kwargs)


class Gguf:
    """GGUF files, opened by llama.cpp's server."""

    suffix = "gguf"

    def __init__(self, arguments: ExportArguments) -> None:
        self.arguments = arguments
        self.folder = Path(arguments.model_name_or_path)

    def require(self, config: Mapping[str, Any]) -> None:
        """Refuse models and flags that the form is not for, before anything is opened."""
        require_convertible(config, str(self.folder))
        require_converter(self.arguments.llama_cpp)
        if shutil.which(self.arguments.llama_server) is None:
            raise UserError(
                f"--llama_server {self.arguments.llama_server} is no command here: the check needs llama.cpp's server. "
                "Name its file, as build/bin/llama-server of its folder."
            )

    def write(self, encoder: SampleEncoder, copy: Path) -> None:
        """Write the copy into a folder."""
        image_tokens(encoder.settings)
        arguments = self.arguments
        script = require_converter(arguments.llama_cpp)
        files = write_gguf(self.folder, copy, script, arguments.llama_python, arguments.gguf_type)
        logger.info("Converted to %s.", " and ".join(file.name for file in files))

    def fitting(self, examples: Sequence[EvalExample]) -> list[EvalExample]:
        """Return the samples that the copy can be asked."""
        found = [one for one in examples if not any(isinstance(plan.item, VideoItem) for plan in one.prompt.plans)]
        if left := len(examples) - len(found):
            logger.warning("Left out: %d samples with videos, which llama.cpp's server was not tried with.", left)
        if not found:
            raise UserError("All samples have videos, which llama.cpp's server was not tried with: name others.")
        return found

    def ask(self, encoder: SampleEncoder, copy: Path, examples: Sequence[EvalExample]) -> dict[str, list[Heard]]:
        """Return the copy's answers by the way of asking; the first is the one that decides."""
        tokens = self.arguments.max_new_tokens
        longest = max(len(one.encoded.tokens.input_ids) for one in examples) + tokens
        ways = (
            {"images as trained": True, "files": False}
            if any(one.prompt.plans for one in examples)
            else {"value": True}
        )
        model, mmproj = gguf_files(copy, copy.name)
        flags = llama_flags(str(model), str(mmproj), longest, image_tokens(encoder.settings))
        with llama_server(self.arguments.llama_server, flags) as server:
            return {
                way: [listen(server, encoder, one, tokens, as_trained=as_trained) for one in examples]
                for way, as_trained in ways.items()
            }

    def about(self, encoder: SampleEncoder, output: Path) -> str:
        """Return what the model card says of the form."""
        model, mmproj = gguf_files(Path(), output.name)
        flags = llama_flags(str(model), str(mmproj), None, image_tokens(encoder.settings))
        return _GGUF.format(flags=shlex.join(flags))


Form = Fp8 | Gguf
FORMS: dict[str, type[Form]] = {"fp8": Fp8, "gguf": Gguf}
