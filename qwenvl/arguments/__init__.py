"""Settings of a run: what they are, and reading them from recipes and command lines."""

from qwenvl.arguments.adapters import AdapterArguments
from qwenvl.arguments.command_line import wants_debug
from qwenvl.arguments.data import DataArguments
from qwenvl.arguments.model import ModelArguments
from qwenvl.arguments.parsing import ParsedArguments, all_settings, arguments_to_yaml, parse_arguments, without_secrets
from qwenvl.arguments.tasks import TaskArguments
from qwenvl.arguments.training import TrainingArguments

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
