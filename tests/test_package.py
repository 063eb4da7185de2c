"""The wheel: it builds, holds every file of the package, and works in a folder without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from qwenvl import __version__

ROOT = Path(__file__).resolve().parents[1]
REGISTRY = "from qwenvl.cli.make_demo_data.datasets import demo_datasets\n\ndata_dict = demo_datasets()\n"
DECLARED = "from qwenvl.cli.doctor.packages import declared; print('\\n'.join(declared()))"

Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build in a copy: setuptools leaves a build folder, whose old files would get into the next wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "qwenvl", source / "qwenvl", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(folder), str(source)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Start Python in an empty folder, with the unpacked wheel and without the repository."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("work")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)

    return start


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    ignored = ("__pycache__", ".ipynb_checkpoints")
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "qwenvl").rglob("*")
        if path.is_file() and not set(ignored) & set(path.parts)
    }
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in packed if ".dist-info/" not in name} == files
    assert any(name.endswith("licenses/LICENSE") for name in packed)
    assert wheel.name == f"qwenvl-{__version__}-py3-none-any.whl"


def test_the_wheel_gives_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "qwenvl = qwenvl.cli.main:run" in archive.read(name).decode().splitlines()


def test_the_doctor_reads_what_the_wheel_declares(run: Run) -> None:
    done = run("-c", DECLARED)
    assert done.returncode == 0, done.stderr
    declared = [Requirement(line) for line in done.stdout.splitlines()]
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    runtime = [requirement for requirement in declared if "extra" not in str(requirement.marker)]
    assert [requirement.name for requirement in runtime] == [Requirement(line).name for line in lines if line]


def test_it_works_in_a_folder_without_the_repository(run: Run, tiny_checkpoint: Callable[[str], Path]) -> None:
    show = ("-m", "qwenvl.cli.main", "show", "--model_name_or_path", str(tiny_checkpoint("qwen3_vl")))
    made = run("-m", "qwenvl.cli.main", "demo-data", "--output", "demo/data", "--limit", "2")
    assert made.returncode == 0, made.stderr
    folder = Path(run("-c", "import os; print(os.getcwd())").stdout.strip())

    missing = run(*show, "--dataset_use", "demo_digits")
    assert missing.returncode == 1
    assert f"{folder / 'data' / '__init__.py'} does not exist" in missing.stderr
    assert "Traceback" not in missing.stderr

    (folder / "data").mkdir()
    (folder / "data" / "__init__.py").write_text(REGISTRY)
    shown = run(*show, "--dataset_use", "demo_digits")
    assert shown.returncode == 0, shown.stderr
    assert "Which digit is written?" in shown.stdout

    train = run("-m", "qwenvl.cli.main", "train", "configs/demo.yaml")
    assert train.returncode == 1
    assert f"looked for {folder / 'configs' / 'demo.yaml'}. Correct the path" in train.stderr
