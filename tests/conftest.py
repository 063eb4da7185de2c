"""Fixtures of all tests: tiny checkpoints of every family, and the shared folder where a machine has one."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before torch is imported: threads of tiny tensors only cost time, and make sums depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Processes that tests start share it; what an earlier session cached must not make a test pass.
_CACHE = tempfile.TemporaryDirectory(prefix="qwenvl-cache-")
os.environ["QWENVL_CACHE"] = _CACHE.name
os.environ["HF_DATASETS_CACHE"] = str(Path(_CACHE.name) / "datasets")

REPOSITORY = Path(__file__).resolve().parents[1]
if str(REPOSITORY) not in sys.path:  # as pytest's own `pythonpath`, for runs from other directories
    sys.path.insert(0, str(REPOSITORY))

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(1)

# No property depends on a clock (a deadline, slow drawing) or on a seed of the day. A fixture of a function that serves
# all examples of a property is a folder, or what builds things. --hypothesis-profile=search draws other examples each
# time, to look for more.
settings.register_profile(
    "same",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("search", settings.get_profile("same"), derandomize=False)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Draw the same numbers whichever tests ran before in this process."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return ``function(family, template=None) -> Path`` of a random-weight checkpoint, built once a session.

    Tests must not write into the folder; copy it first.
    """
    from qwenvl.cli.make_tiny_checkpoint.command import build_tiny_checkpoint

    built: dict[tuple[str, str | None], Path] = {}

    def checkpoint(family: str, template: str | None = None) -> Path:
        key = (family, template)
        if key not in built:
            folder = tmp_path_factory.mktemp("checkpoint") / f"{family}-{template or 'default'}"
            build_tiny_checkpoint(family, folder, template=template)  # type: ignore[arg-type]
            built[key] = folder
        return built[key]

    return checkpoint


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Return the ``shared`` folder beside the repository; a test that needs it is skipped where there is none."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    return folder
