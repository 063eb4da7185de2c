"""Tiny checkpoints of the connector lab, put together from tiny parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qwenvl.cli.connector_lab.build import ConnectorSettings, build_lab
from qwenvl.cli.make_tiny_checkpoint.parts import PARTS, build_part
from tests.e2e.conftest import registry as registry  # the same small data as in the tests of training

TINY = {"num_queries": 4, "connector_hidden_size": 32, "connector_layers": 2, "connector_heads": 2}


@pytest.fixture(scope="session")
def part(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function of the name of a part (``clip``, ``qwen3``, ``qwen2_vl``, ...) that makes it, once."""
    folder = tmp_path_factory.mktemp("parts")

    def made(name: str) -> Path:
        if name not in PARTS:
            return tiny_checkpoint(name)
        if not (folder / name).exists():
            build_part(name, folder / name)
        return folder / name

    return made


@pytest.fixture(scope="session")
def lab(part: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return ``function(encoder, language_model, connector) -> Path`` of a checkpoint, built once a session.

    Tests must not write into the folder.
    """
    built: dict[tuple[str, str, str], Path] = {}

    def checkpoint(encoder: str = "clip", language_model: str = "qwen3", connector: str = "mlp") -> Path:
        key = (encoder, language_model, connector)
        if key not in built:
            built[key] = tmp_path_factory.mktemp("lab") / "-".join(key)
            settings = ConnectorSettings(connector, **TINY)  # type: ignore[arg-type]
            build_lab(str(part(encoder)), str(part(language_model)), settings, built[key])
        return built[key]

    return checkpoint
