"""Read the flags of a command line as text, and print the help page."""

from __future__ import annotations

import argparse
import enum
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import IO, Any, NoReturn

from qwenvl.config.parsing.fields import Setting
from qwenvl.config.parsing.unknown_names import advise
from qwenvl.utils.distributed import is_main_process
from qwenvl.utils.errors import UserError


@dataclass(frozen=True)
class HelpPage:
    """The top of a help page.

    Args:
        usage: Name of the program, and its arguments.
        description: Description of the program.
        unread: Fields of its dataclass that the program does not read: they are no flags of it.
    """

    usage: str
    description: str
    unread: Set[str] = frozenset()


TRAINING_PAGE = HelpPage(
    "train_qwen.py [RECIPE.yaml] [--flag VALUE ...]",
    "Fine-tune a Qwen-VL model. Settings come from flags, from a YAML or JSON recipe given first, or from both: flags "
    "override the recipe. Whole numbers may be written as expressions (--max_pixels 576*32*32).",
)
DEBUG_HELP = (
    "alone: show the traceback of errors. With names of debug options of transformers (underflow_overflow): switch "
    "these on."
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}. --help lists all flags.")

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        if is_main_process():  # one page, not one per rank
            super().print_help(file)


def read_flags(
    argv: Sequence[str], settings: Mapping[str, Setting], groups: Mapping[type, str], page: HelpPage = TRAINING_PAGE
) -> dict[str, Any]:
    """Read a command line without its recipe.

    Args:
        argv: Flags and their values. ``--some-flag`` is read as ``--some_flag``; the last of several wins.
        settings: Settings by flag.
        groups: Title on the help page of each class that owns settings, in the order of the page.
        page: Top of the help page.

    Returns:
        The texts of the given flags, by name: a list where the field takes one, ``bare`` where no value followed.

    Raises:
        UserError: a flag is unknown, a value is missing, or text belongs to no flag.
    """
    parser = build_parser(settings, groups, page)
    values, unknown = parser.parse_known_args([_with_underscores(token) for token in argv])
    if without := [name for token in unknown if (name := _name(token)) in page.unread]:
        flags = ", ".join(f"--{name}" for name in dict.fromkeys(without))
        raise UserError(
            f"{flags}: no effect here, as this command does not read such settings. Leave out what is named."
        )
    if unknown:
        raise UserError(_unknown(unknown[0], settings))
    return vars(values)


def build_parser(
    settings: Mapping[str, Setting], groups: Mapping[type, str], page: HelpPage = TRAINING_PAGE
) -> argparse.ArgumentParser:
    """Return the parser of all flags; see :func:`read_flags` for the arguments."""
    script, _, arguments = page.usage.partition(" ")
    program = sys.argv[0] if sys.argv[0].startswith("qwenvl ") else script  # the command qwenvl and its subcommand
    parser = _Parser(
        prog=program,
        usage=f"{program} {arguments}",
        description=page.description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30),
    )
    sections = {owner: parser.add_argument_group(title) for owner, title in groups.items()}
    for setting in settings.values():
        _add_flag(sections[setting.owner], setting)
    return parser


def _add_flag(section: argparse._ArgumentGroup, setting: Setting) -> None:
    options: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS, "metavar": _metavar(setting)}
    if setting.bare is not None:
        options |= {"nargs": "?", "const": setting.bare}
    elif list in setting.kinds:
        options["nargs"] = "+"
    section.add_argument(f"--{setting.name}", help=_help(setting), **options)
    if setting.default is True:  # transformers' own parser offers --no_x too
        section.add_argument(f"--no_{setting.name}", dest=setting.name, action="store_const", const=False, **_HIDDEN)


_HIDDEN: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}


def _metavar(setting: Setting) -> str:
    if setting.choices and len(setting.choices) <= 8:
        return "{" + ",".join(setting.choices) + "}"
    names = {bool: "BOOL", int: "INT", float: "NUMBER", dict: "JSON", list: "NAME", str: "TEXT"}
    return "NAME" if setting.choices else next(name for kind, name in names.items() if kind in setting.kinds)


def _help(setting: Setting) -> str:
    if setting.name == "debug":
        return DEBUG_HELP
    default = setting.default.value if isinstance(setting.default, enum.Enum) else setting.default
    if default is None or default in ("", {}, []) or "Default:" in setting.help:
        return setting.help
    return f"{setting.help} (default: {str(default).replace('%', '%%')})"


def _with_underscores(token: str) -> str:
    if not token.startswith("--"):
        return token
    name, equals, value = token[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def _name(token: str) -> str:
    """Return the name of a flag; empty for anything else."""
    return token[2:].partition("=")[0] if token.startswith("--") else ""


def _unknown(token: str, settings: Mapping[str, Setting]) -> str:
    name = token.lstrip("-").partition("=")[0]
    if token.startswith("-"):
        return f"unknown flag --{name}.{advise(name, settings)} --help lists all flags."
    return f"{token!r} on the command line belongs to no flag. A recipe comes first; each flag takes one value."


def split_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Remove ``--debug``, alone or with true or false, from a command line.

    transformers has a flag of this name for its debug options; with names of these after it, the flag stays.

    Returns:
        The rest of the command line, and whether tracebacks are wanted.
    """
    rest: list[str] = []
    debug = False
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.partition("=")
        if name != "--debug":
            rest.append(token)
        elif equals or (tokens and not tokens[0].startswith("-")):
            value = value if equals else tokens.pop(0)
            if value.lower() in ("true", "1", "yes", "false", "0", "no"):
                debug = value.lower() in ("true", "1", "yes")
            else:
                rest += [name, value]
        else:
            debug = True
    return rest, debug


def wants_debug(argv: Sequence[str] | None = None) -> bool:
    """Return whether a command line asks for tracebacks; for entry points, before anything is parsed."""
    return split_debug(sys.argv[1:] if argv is None else argv)[1]
