"""Settings of a run: what they are, and reading them from recipes and command lines."""

from qwenvl.config.data import DataArguments
from qwenvl.config.lora import AdapterArguments
from qwenvl.config.model import ModelArguments
from qwenvl.config.parsing.command_line import wants_debug
from qwenvl.config.parsing.parser import (
    ParsedArguments,
    all_settings,
    arguments_to_yaml,
    parse_arguments,
    without_secrets,
)
from qwenvl.config.tasks import TaskArguments
from qwenvl.config.training import TrainingArguments

__all__ = [
    "AdapterArguments",
    "DataArguments",
    "ModelArguments",
    "ParsedArguments",
    "TaskArguments",
    "TrainingArguments",
    "all_settings",
    "arguments_to_yaml",
    "parse_arguments",
    "wants_debug",
    "without_secrets",
]
