"""Runs one experiment: builds the model, trains its stages, evaluates it and saves the result."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qwenvl.cli.connector_lab.build import build_lab
from qwenvl.cli.connector_lab.recipe import DRAWN, Recipe, Run
from qwenvl.cli.evaluate.command import PAGE, EvaluateArguments, ask, write
from qwenvl.cli.inference_args import open_job
from qwenvl.cli.make_demo_data.command import make_demo_data
from qwenvl.cli.make_tiny_checkpoint.parts import PARTS, build_part
from qwenvl.config import parse_arguments
from qwenvl.config.parsing.parser import parse_class
from qwenvl.data.encoding.processor import AddedTokens, open_processor
from qwenvl.evaluate.scoring import evaluate, evaluate_views
from qwenvl.inference.answer_rows import open_row
from qwenvl.inference.generate import config_of
from qwenvl.metrics.predictions import Prediction
from qwenvl.models.loading import read_model_type
from qwenvl.models.trainable.freezing import summarize
from qwenvl.train.build.data import open_config
from qwenvl.train.build.model import open_model
from qwenvl.train.train_qwen import main as train
from qwenvl.utils.cache import replacing
from qwenvl.utils.errors import UserError

START = "start"
RESULT = "result.json"
_STAGE_KEY = "lab_stage.json"
_TINY = "tiny:"
COLLAPSED = 0.1
"""Share of empty answers, from 0 to 1, at which generation counts as collapsed."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Lab:
    """A recipe and its output folder.

    Args:
        recipe: Recipe of the experiments.
        folder: Folder for all output.
    """

    recipe: Recipe
    folder: Path

    @property
    def registry(self) -> dict[str, str]:
        """The flag of the registry of drawn datasets; empty if the recipe uses other data."""
        return {"dataset_registry": str(self.folder / "registry.py")} if self.recipe.data == DRAWN else {}

    def prepare(self) -> None:
        """Draw the data, and make the parts with random weights.

        Raises:
            UserError: A part with this name cannot be made.
        """
        if self.recipe.data == DRAWN:
            data = self.folder / "data"
            make_demo_data(data, kind="lab")
            entries = {
                f"lab_{task}{suffix}": {
                    "annotation_path": str((data / f"{task}_{split}.jsonl").resolve()),
                    "data_path": str(data.resolve()),
                }
                for task in ("captions", "questions", "chats", "texts")
                for split, suffix in (("train", ""), ("heldout", "_heldout"))
            }
            (self.folder / "registry.py").write_text(f"data_dict = {entries!r}\n", encoding="utf-8")
        for name in (self.recipe.encoder, self.recipe.language_model):
            kind = name.removeprefix(_TINY)
            if name.startswith(_TINY) and kind not in PARTS:
                raise UserError(f"{name}: the parts with random weights are {', '.join(_TINY + one for one in PARTS)}.")
            if name.startswith(_TINY) and not (self.folder / "parts" / kind / "config.json").is_file():
                build_part(kind, self.folder / "parts" / kind, size="demo")  # type: ignore[arg-type]

    def part(self, name: str) -> str:
        """Return the folder or name of a part of the recipe."""
        return str(self.folder / "parts" / name.removeprefix(_TINY)) if name.startswith(_TINY) else name

    def trained(self, run: Run) -> Path:
        """Return the folder of the trained model of a run."""
        return self.folder / run.name / (f"stage{len(run.stages)}" if run.stages else START)


def run_experiment(lab: Lab, run: Run) -> tuple[Result, bool]:
    """Return the result of a run, and whether it is new: a finished run is not repeated.

    Raises:
        UserError: Something in the recipe does not work.
    """
    folder, key = lab.folder / run.name, lab.recipe.key(run)
    done = _read_json(folder / RESULT)
    if done.get("key") == key:
        return done, False
    began = time.monotonic()
    _build(lab, run, key)
    stages = [_train(lab, run, number, key) for number in range(1, len(run.stages) + 1)]
    result = {
        "name": run.name,
        "about": run.about,
        "group": run.group,
        "connector": run.connector.connector,
        "stages": stages,
        **(_ask(lab, run) if run.shown else {}),
        "seconds": round(time.monotonic() - began, 1),
        "key": key,
    }
    with replacing(folder / RESULT) as path:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result, True


def _build(lab: Lab, run: Run, key: str) -> None:
    """Build the model, unless an earlier call has; delete the files of a run with other settings."""
    folder = lab.folder / run.name
    mark = folder / START / _STAGE_KEY
    if _read_json(mark).get("key") == key:
        return
    shutil.rmtree(folder, ignore_errors=True)
    encoder, language_model = lab.part(lab.recipe.encoder), lab.part(lab.recipe.language_model)
    drop_layers = lab.recipe.drop_layers
    if run.start is not None:
        encoder = language_model = str(lab.trained(lab.recipe.run(run.start)))
        drop_layers = None
        if (Path(encoder) / "adapter_config.json").is_file():
            raise UserError(f"run {run.name}: start {run.start} ends in adapters. Start from a run without them.")
    build_lab(encoder, language_model, run.connector, folder / START, drop_layers=drop_layers)
    mark.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")


def _train(lab: Lab, run: Run, number: int, key: str) -> Result:
    """Train one stage from the checkpoint of the previous one; return its trainable parameters and losses.

    Raises:
        UserError: Training failed; its message has been logged.
    """
    before = lab.folder / run.name / (f"stage{number - 1}" if number > 1 else START)
    output = lab.folder / run.name / f"stage{number}"
    if (before / "adapter_config.json").is_file():
        raise UserError(f"run {run.name}: stage {number - 1} ends in adapters, and another stage follows. Put it last.")
    if _read_json(output / _STAGE_KEY).get("key") != key:
        settings = {**lab.registry, **run.stages[number - 1]}
        settings |= {"model_name_or_path": str(before), "output_dir": str(output)}
        file = lab.folder / run.name / f"stage{number}.yaml"
        file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        trained = _count_trained(file)
        if train([str(file)]) != 0:
            raise UserError(f"run {run.name}, stage {number}: training stopped. Correct the recipe and run it again.")
        (output / _STAGE_KEY).write_text(json.dumps({"key": key, "trained": trained}) + "\n", encoding="utf-8")
    history = _read_json(output / "trainer_state.json")["log_history"]
    return {
        "trained": _read_json(output / _STAGE_KEY)["trained"],
        "loss": [[line["step"], line["loss"]] for line in history if "loss" in line],
        "held_out": [[line["step"], line["epoch"], line["eval_loss"]] for line in history if "eval_loss" in line],
    }


def _count_trained(settings: Path) -> dict[str, int]:
    """Return the number of trainable parameters by part, and of all parameters, without loading the weights."""
    parsed = parse_arguments([str(settings)])
    name = parsed.model.model_name_or_path
    read_model_type(name)
    model = open_model(parsed, open_processor(name), open_config(parsed), AddedTokens(), on_meta=True)
    rows = summarize(model)
    return {row.module: row.trainable for row in rows} | {"all": sum(row.total for row in rows)}


def _ask(lab: Lab, run: Run) -> Result:
    """Let the trained model answer with the samples' own images, blank ones and those of other samples."""
    output = lab.folder / run.name / "evaluation"
    limits = {} if run.stages else lab.recipe.limits  # trained folders have their own
    flags = {**lab.registry, **limits, **lab.recipe.evaluate, "model_name_or_path": lab.trained(run), "output": output}
    argv = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    arguments = parse_class(EvaluateArguments, [*argv, "--blind", "True"], PAGE)
    views = ask(arguments)
    scores = evaluate(views["shown"], arguments.metric)
    ablation = evaluate_views(scores, views)
    write(arguments, scores, ablation, views)
    job = open_job(arguments)
    example = next((one for index in range(job.num_rows) for _, one in open_row(job, index) if one is not None), None)
    tokens = int(example.encoded.tokens.vision_mask.sum()) if example is not None else 0
    config: Any = config_of(str(lab.trained(run)))
    return {
        "tokens": tokens,
        "encoder": config.vision_config.encoder_config.model_type,
        "answers": count_answers(views["shown"]),
        "scores": [one.as_dict() for one in scores],
        "blind": [one.as_dict() for one in ablation],
        "examples": [_example(views, index) for index in range(min(4, len(views["shown"])))],
    }


def count_answers(lines: Sequence[Prediction]) -> Result:
    """Return the numbers of answers, empty answers, different answers and different expected answers."""
    answers = [(line.prediction or "").strip() for line in lines if line.error is None]
    return {
        "count": len(answers),
        "empty": sum(not answer for answer in answers),
        "different": len(set(answers)),
        "expected_different": len({line.expected for line in lines if line.error is None}),
    }


def collapse_of(answers: Mapping[str, int]) -> str:
    """Return a description of collapsed generation, or an empty text; right and wrong answers count alike."""
    if not answers["count"]:
        return "nothing was answered"
    if answers["empty"] >= COLLAPSED * answers["count"]:
        return f"generation collapses: {answers['empty']} of {answers['count']} answers end before their first word"
    if answers["different"] == 1 < answers["expected_different"]:
        return "generation collapses: every question gets the same answer"
    return ""


def _example(views: Mapping[Any, Sequence[Prediction]], index: int) -> Result:
    shown = views["shown"][index]
    answers = {view: lines[index].prediction for view, lines in views.items()}
    return {"media": list(shown.media), "question": shown.question, "expected": shown.expected, **answers}


def _read_json(path: Path) -> Result:
    """Return the content of a file; empty if it does not exist."""
    found: Result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
