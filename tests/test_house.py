"""The house rules that linters do not check: small functions and files, documented parts, no numbers of tokens."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500
DOCUMENTED = ("qwenvl", "tools")
# Qwen-VL's special tokens and the id of "assistant": a checkpoint's own tokenizer says them.
TOKEN_IDS = {*range(151643, 151659), 77091}
MODULE_NAMES = {
    *("visual", "merger", "deepstack_merger_list", "patch_embed", "language_model", "embed_tokens", "lm_head"),
    *("experts", "linear_attn"),
}


def tracked_files() -> list[Path]:
    """Every file of the product: what git knows or would add; all files where this is not a checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    if (ROOT / ".git").exists():
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]


FILES = tracked_files()
SOURCES = [path for path in FILES if path.suffix == ".py"]
PACKAGE = [path for path in SOURCES if path.relative_to(ROOT).parts[0] == "qwenvl"]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def place(path: Path, node: ast.stmt | ast.expr) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Functions and classes, and the methods of classes, that have no leading underscore."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


def has_docstring(node: ast.stmt) -> bool:
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    return ast.get_docstring(node) is not None or any("overload" in ast.dump(item) for item in node.decorator_list)


def test_the_rules_see_the_sources() -> None:
    assert ROOT / "qwenvl" / "utils" / "errors.py" in PACKAGE
    assert len(PACKAGE) >= 10


def test_functions_are_short() -> None:
    too_long = [
        f"{place(path, node)} {node.name}: {length} lines"
        for path in SOURCES
        for node in functions(path)
        if (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not too_long, "\n".join(too_long)


def test_functions_are_short_on_the_whole() -> None:
    lengths = sorted((node.end_lineno or 0) - node.lineno + 1 for path in PACKAGE for node in functions(path))
    assert lengths[len(lengths) // 2] <= 15


def test_files_are_short() -> None:
    shell = [path for path in FILES if path.suffix in (".sh", ".sbatch")]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (*SOURCES, *shell)}
    too_long = [f"{path.relative_to(ROOT)}: {count} lines" for path, count in lines.items() if count > MAX_FILE_LINES]
    assert not too_long, "\n".join(too_long)


def test_the_package_logs_and_does_not_print() -> None:
    prints = [
        place(path, node)
        for path in PACKAGE
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "breakpoint")
    ]
    assert not prints, "\n".join(prints)


def test_where_parts_of_models_are_is_said_in_one_place() -> None:
    """Modules of a family are named in its record alone, as attributes or in names of modules and tensors."""
    owners = ("qwenvl/families.py", "qwenvl/connector_lab/", "qwenvl/cli/connector_lab/")
    named = [
        f"{place(path, node)}: {name}"
        for path in PACKAGE
        if not path.relative_to(ROOT).as_posix().startswith(owners)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute | ast.Constant)
        for name in [node.attr if isinstance(node, ast.Attribute) else node.value]
        if isinstance(name, str) and re.fullmatch(r"[\w.]+", name) and not MODULE_NAMES.isdisjoint(name.split("."))
        if isinstance(node, ast.Attribute) or name not in ("merger", "experts")  # words for a group of parameters
    ]
    assert not named, "\n".join(named)


def test_no_module_knows_the_connector_lab() -> None:
    """It is found by its folder's name, as any family of one's own would be; its commands are its own."""
    owners = ("qwenvl/connector_lab/", "qwenvl/cli/connector_lab/", "qwenvl/cli/main.py")
    others = [path for path in PACKAGE if not path.relative_to(ROOT).as_posix().startswith(owners)]
    assert not [path for path in others if "connector_lab" in path.read_text(encoding="utf-8")]


def test_no_token_id_is_written_by_hand() -> None:
    written = [
        f"{place(path, node)}: {node.value}"
        for path in SOURCES
        if path != Path(__file__).resolve()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value in TOKEN_IDS
    ]
    assert not written, "\n".join(written)


def test_public_parts_are_documented() -> None:
    missing = [
        f"{place(path, node)} {name}"
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] in DOCUMENTED
        for name, node in public_definitions(parse(path).body)
        if not has_docstring(node)
    ]
    assert not missing, "\n".join(missing)


ENTRY_OPENERS = re.compile(
    r"(?i)(of|that|whose|as|how|what|which|where|from|for|in|by|with|to|when|called|is|are|on|at)\b"
)
BANNED = re.compile(
    r"(?i)\bpictures?\b(?! 1)|shared? out|\ba second\b|what trains|longest gradient|to the bit\b|whole or absent"
    r"|\bby the clock\b|\bat once\b|\botherwise than\b|\bthose that\b|\bwhat becomes of\b"
)
TEXTS_OF_DATA = (
    *("qwenvl/cli/make_demo_data", "qwenvl/cli/make_tiny_checkpoint", "qwenvl/cli/show_attention/command.py"),
    "qwenvl/data/sources/registry.py",
)
"""Where models are asked or trained with such words, or a column of a dataset has them."""


def docstring_entries(path: Path) -> Iterator[str]:
    """Yield ``name: text`` of the entries of every ``Args:`` and ``Attributes:`` section."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for section in re.findall(r"(?m)^(?:Args|Attributes):\n((?:[ ]+.*\n?|\n)+)", ast.get_docstring(node) or ""):
                yield from (f"{name}: {text}" for name, text in re.findall(r"(?m)^    (\*{0,2}\w+): (.*)", section))


def test_entries_of_docstrings_are_noun_phrases() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {entry}"
        for path in PACKAGE
        for entry in docstring_entries(path)
        if ENTRY_OPENERS.match(entry.partition(": ")[2])
    ]
    assert not found, "\n".join(found)


def test_words_are_those_of_the_field() -> None:
    """In comments, docstrings and messages. CONTRIBUTING.md says what to write instead."""
    checked = [path for path in PACKAGE if not path.relative_to(ROOT).as_posix().startswith(TEXTS_OF_DATA)]
    found = [
        f"{path.relative_to(ROOT)}:{token.start[0]}: {BANNED.findall(token.string)}"
        for path in checked
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        if token.type in (tokenize.COMMENT, tokenize.STRING) and BANNED.search(token.string)
    ]
    assert not found, "\n".join(found)


def test_failures_are_not_swallowed() -> None:
    """No bare ``except``, and no ``except Exception`` whose body does nothing."""
    swallowed = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (ast.unparse(node.type) in ("Exception", "BaseException") and is_empty(node.body)))
    ]
    assert not swallowed, "\n".join(swallowed)


def is_empty(body: list[ast.stmt]) -> bool:
    return all(isinstance(node, ast.Pass | ast.Continue) for node in body)


def test_libraries_are_not_patched() -> None:
    """Nothing is assigned to an attribute of an imported module or class."""
    patched = [
        f"{place(path, node)} {ast.unparse(target)}"
        for path in PACKAGE
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and root_name(target) in imported_names(path)
    ]
    assert not patched, "\n".join(patched)


def root_name(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def imported_names(path: Path) -> set[str]:
    imports = (node for node in ast.walk(parse(path)) if isinstance(node, ast.Import | ast.ImportFrom))
    return {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}


def class_names(paths: list[Path]) -> set[str]:
    return {node.name for path in paths for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef)}


def names_in(node: ast.AST) -> set[str]:
    """The last parts of all names that stand in an expression."""
    found = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    return found | {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def test_tasks_are_asked_for_by_their_methods() -> None:
    """Outside of ``qwenvl/tasks`` nothing asks whether an object is of a class of a task."""
    tasks = ROOT / "qwenvl" / "tasks"
    classes = class_names([path for path in PACKAGE if tasks in path.parents])
    assert {"Objective", "HeadObjective", "Grounding", "LabelReader", "MaskReader"} <= classes
    asked = [
        f"{place(path, node)} {ast.unparse(node)}"
        for path in PACKAGE
        if tasks not in path.parents
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("isinstance", "issubclass")
        and names_in(node.args[1]) & classes
    ]
    assert not asked, "\n".join(asked)


def test_each_task_stands_alone() -> None:
    """What lies in ``qwenvl/tasks`` is the seam, or one task, which imports no other one and not the registry."""
    tasks, seam = ROOT / "qwenvl" / "tasks", ("objective", "files")
    mixed = []
    for path in PACKAGE:
        if tasks not in path.parents or path == tasks / "registry.py":
            continue
        own = path.relative_to(tasks).with_suffix("").parts[0]
        found = re.findall(r"qwenvl\.tasks(?:\.| import )(\w+)", "\n".join(imports_of(path)))
        mixed += [f"{path.relative_to(ROOT)}: {name}" for name in found if name not in (own, *seam)]
    assert not mixed, "\n".join(mixed)


def imports_of(path: Path) -> list[str]:
    return [ast.unparse(node) for node in ast.walk(parse(path)) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_one_trainer_stands_over_one_that_checkpoints() -> None:
    """What else a run needs is a callback or an object that the Trainer calls."""
    found = {
        node.name: [ast.unparse(base) for base in node.bases]
        for path in PACKAGE
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Trainer") for base in node.bases)
    }
    assert found == {"CheckpointingTrainer": ["transformers.Trainer"], "Trainer": ["CheckpointingTrainer"]}


def test_the_registry_example_has_its_two_keys() -> None:
    spec = importlib.util.spec_from_file_location("registry_example", ROOT / "data" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.data_dict
    for name, entry in module.data_dict.items():
        assert isinstance(name, str)
        assert {"annotation_path", "data_path"} <= entry.keys(), name


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.suffix in (".json", ".yaml", ".yml")], ids=lambda path: path.name
)
def test_configuration_parses(path: Path) -> None:
    parser = json.loads if path.suffix == ".json" else yaml.safe_load
    assert parser(path.read_text(encoding="utf-8"))


def test_transformers_range_is_said_with_its_tested_ends() -> None:
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    comment = re.search(r"# The tests passed with transformers (\S+) \(oldest\) and (\S+) \(newest\)", requirements)
    line = re.search(r"^transformers>=(\S+),<(\S+)$", requirements, re.MULTILINE)
    assert comment is not None
    assert line is not None
    assert comment[1] == line[1]
    assert f"{comment[1]} to {comment[2]}" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_requirements_name_no_host() -> None:
    for name in ("requirements.txt", "requirements-dev.txt", "Dockerfile"):
        assert "://" not in (ROOT / name).read_text(encoding="utf-8")


def test_no_file_names_one_machine() -> None:
    """Neither this checkout's own path nor anybody's home stands in what others install."""
    private = re.compile(rf"{re.escape(str(ROOT))}\b|(?<![\w.])/(?:home|Users)/\w+/")
    texts = [
        path for path in FILES if path.suffix in (".py", ".sh", ".sbatch", ".md", ".toml", ".yaml", ".txt", ".json")
    ]
    found = [str(path.relative_to(ROOT)) for path in texts if private.search(path.read_text(encoding="utf-8"))]
    assert not found, found
