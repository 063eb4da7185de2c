"""How other programs than servers are told the limits of training: transformers, lmms-eval, VLMEvalKit, llama.cpp.

They ignore what a saved processor says, or open it with limits of their own. Which were tried: docs/compatibility.md.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenvl.serving.commands import Served

THINKING = "enable_thinking"
"""Template argument that turns thoughts on and off."""


@dataclass(frozen=True)
class Model:
    """What these programs have to know of a model besides its limits.

    Args:
        model_type: ``config.model_type``.
        factor: Side of an image token in pixels.
        moe: Its feed-forward layers are mixtures of experts.
    """

    model_type: str
    factor: int
    moe: bool = False


def program_lines(served: Served, model: Model) -> dict[str, str]:
    """Return a line for each program by its name; of adapters, those of the merged folder.

    Args:
        served: Model or adapters to serve.
        model: Facts of the model.
    """
    folder = "MERGED" if served.adapter else served.folder
    return {
        "transformers": _transformers(served),
        "lmms-eval": _lmms_eval(served, model, folder),
        "VLMEvalKit": _vlmevalkit(served, model, folder),
        "llama.cpp": _llama_cpp(served, model),
    }


def program_notes(served: Served, model: Model) -> list[str]:
    """Return what the lines alone do not settle, a sentence each."""
    found = []
    if served.adapter:
        found.append("MERGED is the folder of tools/merge_lora.py: only transformers takes the adapter itself.")
    if model.model_type.startswith("qwen3"):
        found.append(
            "lmms-eval writes a system turn before every question of this family; train with one, or expect other "
            "answers."
        )
    if model.model_type.startswith("qwen3_5") and THINKING not in _template_arguments(served):
        found.append(
            "lmms-eval asks all questions of this family with enable_thinking=True unless its --model_args say "
            "otherwise, and makes an answer without thoughts an empty one: name the value of your samples there."
        )
    if model.moe:
        found.append('lmms-eval takes a folder for a mixture of experts by its name alone: it has to hold "A3B" or so.')
    found.append("The lines of SGLang and VLMEvalKit follow their sources and were not run (docs/compatibility.md).")
    found += _llama_notes(served, model)
    if served.videos:
        found.append("llama.cpp samples no videos: send frames as images.")
    return found


def _llama_notes(served: Served, model: Model) -> list[str]:
    image, token = served.limits["image_processor"]["size"], model.factor**2
    found = [
        "llama.cpp fits an image into its size with black edges, and rounds a half the other way: send images that "
        "have the size of training already, or expect other answers (docs/compatibility.md)."
    ]
    if image["shortest_edge"] % token or image["longest_edge"] % token:
        side = model.factor
        found.append(
            f"llama.cpp counts limits in whole tokens of {side} x {side} pixels, which those of training are not "
            "multiples of: images at the limits may get other sizes."
        )
    return found


def _transformers(served: Served) -> str:
    words = ["processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True"]
    if served.videos and served.clips:
        words.append('processor_kwargs={"do_sample_frames": True}')
    if served.videos and served.video_template:
        words.append(f"chat_template=open({served.video_template!r}).read()")
    words += [f"{name}={value!r}" for name, value in _template_arguments(served).items()]
    return ", ".join(words) + ")"


def _lmms_eval(served: Served, model: Model, folder: str) -> str:
    image, video = served.limits["image_processor"]["size"], served.limits["video_processor"]
    names = {"qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_5_vl"}
    name = names.get(model.model_type, "qwen3_5" if model.model_type.startswith("qwen3_5") else "qwen3_vl")
    given = {"pretrained": folder, "min_pixels": image["shortest_edge"], "max_pixels": image["longest_edge"]}
    if served.videos:
        rate = {} if name == "qwen2_vl" else {"fps": f"{video['fps']:g}"}  # whose class takes none
        given |= {**rate, "max_num_frames": video["max_frames"]}
    given |= {name: value for name, value in _template_arguments(served).items() if name == THINKING}
    arguments = ",".join(f"{key}={value}" for key, value in given.items())
    # The newer of its two classes for a model gives images no limits (lmms_eval/models/chat/qwen3_vl.py of 0.7.3).
    words = ["python", "-m", "lmms_eval", "--force_simple", "--model", name, "--model_args", arguments]
    words += ["--gen_kwargs", "temperature=0"] if name == "qwen3_5" else []  # whose class samples with 0.7 by default
    return shlex.join([*words, "--tasks", "TASKS"])


def _template_arguments(served: Served) -> Mapping[str, Any]:
    """Return the template arguments that all looked at samples are asked with; none if they differ."""
    asked = [json.loads(arguments) for arguments in served.requests]
    return asked[0] if len(asked) == 1 else {}


def _vlmevalkit(served: Served, model: Model, folder: str) -> str:
    image = served.limits["image_processor"]["size"]
    name = "Qwen3VLChat" if model.model_type.startswith("qwen3") else "Qwen2VLChat"
    limits = f"min_pixels={image['shortest_edge']}, max_pixels={image['longest_edge']}"
    return f"partial({name}, model_path={folder!r}, {limits})   # an entry of vlmeval/config.py"


def _llama_cpp(served: Served, model: Model) -> str:
    image = served.limits["image_processor"]["size"]
    tokens = whole_tokens(image["shortest_edge"], image["longest_edge"], model.factor)
    return shlex.join(["llama-server", *llama_flags("MODEL.gguf", "MMPROJ.gguf", served.max_length, tokens)])


def whole_tokens(min_pixels: int, max_pixels: int, factor: int) -> tuple[int, int]:
    """Return the limits of an image in whole tokens, which llama.cpp counts them in.

    Args:
        min_pixels: Lower limit in pixels.
        max_pixels: Upper limit in pixels.
        factor: Side of a token in pixels.
    """
    return -(-min_pixels // factor**2), max_pixels // factor**2


def llama_flags(model: str, mmproj: str, context: int | None, tokens: tuple[int, int]) -> list[str]:
    """Return the arguments of llama.cpp's server.

    Args:
        model: GGUF file of the language model.
        mmproj: GGUF file of the vision tower.
        context: Most tokens of a prompt and its answer; None for the model's own context.
        tokens: Limits of an image in tokens.
    """
    limits = ["--image-min-tokens", str(tokens[0]), "--image-max-tokens", str(tokens[1])]
    length = [] if context is None else ["-c", str(context)]
    return ["-m", model, "--mmproj", mmproj, *length, *limits]
