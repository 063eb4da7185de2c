from __future__ import annotations

from pathlib import Path

import pytest

from qwenvl.config.parsing.recipes import find_file, read_recipe
from qwenvl.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def written(folder: Path, name: str, text: str | bytes) -> str:
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(file)


@pytest.mark.parametrize("name", ["a.yaml", "a.yml", "a.json", "A.YAML"])
def test_reads_every_kind(tmp_path: Path, name: str) -> None:
    text = '{"seed": 3, "report_to": ["wandb"]}'  # JSON is YAML too
    assert read_recipe(written(tmp_path, name, text)) == {"seed": 3, "report_to": ["wandb"]}


def test_an_empty_file_gives_nothing(tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path, "a.yaml", "# nothing\n")) == {}


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path, "a.yaml", b"\xef\xbb\xbfseed: 3\n")) == {"seed": 3}


def test_dates_stay_text(tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path, "a.yaml", "run_name: 2026-01-02\n")) == {"run_name": "2026-01-02"}


def test_numbers_without_a_dot_are_numbers_within_mappings_and_lists(tmp_path: Path) -> None:
    """At the top they stay text, which the setting's own type decides on: a run may be named 1e5."""
    text = (
        "run_name: 1e5\na: {b: 1e-6, c: '1e-6', d: 2E+3, e: .5e1, f: 1.e2, g: 1e, h: 5, i: [3e-4, x], j: {k: -1e-2}}\n"
    )
    assert read_recipe(written(tmp_path, "a.yaml", text)) == {
        "run_name": "1e5",
        "a": {
            "b": 1e-6,
            "c": "1e-6",
            "d": 2e3,
            "e": 5.0,
            "f": 100.0,
            "g": "1e",
            "h": 5,
            "i": [3e-4, "x"],
            "j": {"k": -0.01},
        },
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "seed: 1\nbf16: true\nseed: 2\n", "line 3: 'seed' is given twice"),
        ("a.yaml", "fsdp_config:\n  a: 1\n  a: 2\n", "line 3: 'a' is given twice"),
        ("a.json", '{"seed": 1, "seed": 2}', "'seed' is given twice"),
        ("a.json", '{"seed": 1', "line 1"),
        ("a.yaml", "seed: [1\nbf16: x\n", "line 2"),
        ("a.yaml", "- seed\n", "found a list"),
        ("a.yaml", "1: 2\n", "the name 1 is not text"),
        ("a.yaml", b"seed: \xff\n", "utf-8"),
        ("a.yaml", "seed: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("a.yaml", "a: " + "[" * 5000, "recipe"),
        ("a.toml", "seed = 1", "is a .yaml, .yml, .json file"),
    ],
)
def test_one_clear_error(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    path = written(tmp_path, name, text)
    with pytest.raises(UserError, match=name) as caught:
        read_recipe(path)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml"):
        read_recipe(str(tmp_path / "none.yaml"))


def test_files_of_settings_are_looked_for_here_then_in_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_file("configs/zero3.json", "x").resolve() == ROOT / "configs" / "zero3.json"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "zero3.json").write_text("{}")
    assert find_file("configs/zero3.json", "x").resolve() == (tmp_path / "configs" / "zero3.json").resolve()
    with pytest.raises(UserError, match=r"--deepspeed 'scripts/zero3\.json' is not a file"):
        find_file("scripts/zero3.json", "--deepspeed")
