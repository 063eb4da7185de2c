"""Parse a command line to checked arguments, and write them as a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import transformers
import yaml

from qwenvl.config.data import DataArguments
from qwenvl.config.evaluation import EvaluationArguments
from qwenvl.config.export import ExportArguments
from qwenvl.config.lora import AdapterArguments
from qwenvl.config.model import ModelArguments
from qwenvl.config.parallelism import refuse_parallelism
from qwenvl.config.parsing.command_line import HelpPage, read_flags, split_debug
from qwenvl.config.parsing.fields import Setting, convert, settings_of
from qwenvl.config.parsing.recipes import find_file, read_recipe
from qwenvl.config.parsing.unknown_names import unknown_settings
from qwenvl.config.rules.hf_arguments import refuse_unsupported
from qwenvl.config.tasks import TaskArguments
from qwenvl.config.training import TrainingArguments
from qwenvl.config.validate import check_required, check_together, log_without_effect
from qwenvl.utils.errors import UserError

T = TypeVar("T")
SETTINGS_FILES = ("deepspeed", "fsdp_config", "accelerator_config", "dataset_registry")
INHERITED = transformers.TrainingArguments
GROUPS: dict[type, str] = {
    ModelArguments: "model",
    AdapterArguments: "adapters",
    TaskArguments: "tasks",
    DataArguments: "data",
    TrainingArguments: "training",
    INHERITED: "training, as in transformers.TrainingArguments",
}


@dataclass(frozen=True)
class ParsedArguments:
    """All settings of a run.

    Args:
        model: Checkpoint and its trained parts.
        adapters: Adapters to train.
        data: Datasets and data policies.
        training: Training arguments.
        tasks: Task other than language modelling, if any.
        debug: Whether to show tracebacks of errors.
        given: Values that the user set in the recipe and by flags, by name; everything else is a default.
    """

    model: ModelArguments
    adapters: AdapterArguments
    data: DataArguments
    training: TrainingArguments
    tasks: TaskArguments
    debug: bool
    given: Mapping[str, Any]


def all_settings() -> dict[str, Setting]:
    """Return every setting by name: model, adapters, tasks, data and this trainer, then those of transformers."""
    settings = settings_of(ModelArguments, AdapterArguments, TaskArguments, DataArguments, TrainingArguments)
    named = {
        **TrainingArguments.__annotations__,
        **EvaluationArguments.__annotations__,
        **ExportArguments.__annotations__,
    }
    own = [name for name in named if name in settings]
    inherited = {
        name: replace(setting, owner=INHERITED)
        for name, setting in settings.items()
        if setting.owner is TrainingArguments and name not in own
    }
    rest = {name: setting for name, setting in settings.items() if name not in inherited and name not in own}
    return rest | {name: settings[name] for name in own} | inherited


def parse_arguments(argv: Sequence[str]) -> ParsedArguments:
    """Read settings from a command line: ``[RECIPE.yaml] [--flag VALUE ...]``.

    Flags override the recipe. A value of null, in either, means not given. Paths in a recipe start from the current
    folder, as on the command line; files of settings (``deepspeed``, ``fsdp_config``, ``accelerator_config``,
    ``dataset_registry``, the recipe itself) that are not there are searched in the repository's root.

    Args:
        argv: Command line without the program's name.

    Returns:
        The settings, checked.

    Raises:
        UserError: a setting is wrong; the message says which one and where.
        SystemExit: with status 0, after ``--help``.
    """
    rest, debug = split_debug(argv)
    settings = all_settings()
    given: dict[str, Any] = {}
    if rest and not rest[0].startswith("-"):
        recipe = rest.pop(0)
        content = read_recipe(recipe)
        if isinstance(content.get("debug"), bool):
            debug = content.pop("debug") or debug
        given = _converted(content, settings, where=f"recipe {recipe}: ")
    given |= _converted(read_flags(rest, settings, GROUPS), settings, where="--")
    given = {name: given[name] for name in settings if given.get(name) is not None}
    return _build(given, settings, debug)


def parse_class(cls: type[T], argv: Sequence[str], page: HelpPage) -> T:
    """Read the flags of a tool into its dataclass, with the rules of :func:`parse_arguments`.

    Args:
        cls: Dataclass whose fields are the flags.
        argv: Command line without the program's name.
        page: Top of its help page, and the fields that are no flags.

    Raises:
        UserError: a flag is wrong, or one of a field that the tool does not read.
        SystemExit: with status 0, after ``--help``.
    """
    settings = {name: setting for name, setting in settings_of(cls).items() if name not in page.unread}
    given = _converted(read_flags(argv, settings, {cls: "flags"}, page), settings, where="--")
    return cls(**{name: value for name, value in given.items() if value is not None})


def arguments_to_yaml(parsed: ParsedArguments) -> str:
    """Return a recipe that reruns the job: every setting that the user gave, without secrets such as hub_token.

    Values that the program derives (devices, worker counts) are left out, to be derived again in the next run.
    """
    values = without_secrets(parsed.given)
    header = f"# The settings of this run, a recipe for another: train_qwen.py FILE\n# Run from {Path.cwd()}\n"
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    if (
        yaml.safe_load(text) != values
    ):  # PyYAML writes rare separators, such as U+0085, such that they are read as spaces
        text = yaml.safe_dump(values, sort_keys=False, width=120)
    return header + text


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by name, without secrets such as hub_token."""
    return {name: value for name, value in values.items() if not name.endswith(("token", "secret", "password"))}


def _converted(values: Mapping[str, Any], settings: Mapping[str, Setting], where: str) -> dict[str, Any]:
    """Return values in the types of their fields; None stays None."""
    if unknown := unknown_settings(values, settings):
        raise UserError(where + unknown)
    result: dict[str, Any] = {}
    for written, value in values.items():
        name = written.replace("-", "_")
        if name in result:
            raise UserError(f"{where}{written} is given twice; keep one.")
        try:
            result[name] = None if value in (None, "null") else convert(settings[name], value)
        except UserError as error:
            raise UserError(f"{where}{name}: {error}") from error
    return result


def _build(given: Mapping[str, Any], settings: Mapping[str, Setting], debug: bool) -> ParsedArguments:
    values = {name: _found(name, value) for name, value in given.items()}
    by_class: dict[type, dict[str, Any]] = {owner: {} for owner in GROUPS}
    for name, value in values.items():
        owner = settings[name].owner
        by_class[TrainingArguments if owner is INHERITED else owner][name] = value
    model = ModelArguments(**by_class[ModelArguments])
    adapters = AdapterArguments(**by_class[AdapterArguments])
    tasks = TaskArguments(**by_class[TaskArguments])
    data = DataArguments(**by_class[DataArguments])
    check_required(model, data, values.get("output_dir"))
    refuse_unsupported(given)
    refuse_parallelism(values.get("deepspeed"))
    training = _training(by_class[TrainingArguments])
    if given.get("do_eval") is False and training.eval_strategy != "no":
        raise UserError(
            f"--do_eval False and --eval_strategy {training.eval_strategy} contradict each other: keep one."
        )
    check_together(model, adapters, data, training, tasks)
    log_without_effect(model, adapters, data, training, tasks, frozenset(given))
    return ParsedArguments(model, adapters, data, training, tasks, debug, dict(given))


def _found(name: str, value: Any) -> Any:
    if name in SETTINGS_FILES and isinstance(value, str):
        return str(find_file(value, f"--{name}"))
    return value


def _training(values: Mapping[str, Any]) -> TrainingArguments:
    try:
        return TrainingArguments(**values)
    except UserError:
        raise
    except (ValueError, ImportError) as error:  # raised by transformers itself
        raise UserError(f"training arguments: {error}") from error
