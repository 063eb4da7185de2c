"""Reporters of metrics are checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenvl.config.rules.reporters import choose_reporters
from tests.config.flags import rejected


@pytest.mark.parametrize(("release", "refused"), [("0.7.20", False), ("0.8.0", True), ("0.10.3", True)])
def test_a_release_that_the_callback_cannot_talk_to_is_refused(
    release: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded: transformers would end in a traceback at the first step."""
    (tmp_path / "swanlab").mkdir()
    (tmp_path / "swanlab" / "__init__.py").write_text("")
    (tmp_path / f"swanlab-{release}.dist-info").mkdir()
    text = f"Metadata-Version: 2.1\nName: swanlab\nVersion: {release}\n"
    (tmp_path / f"swanlab-{release}.dist-info" / "METADATA").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    if refused:
        assert f"swanlab {release} is installed" in rejected("--report_to", "swanlab")
        assert "pip install 'swanlab<0.8'" in rejected("--report_to", "swanlab")
    else:
        assert choose_reporters("swanlab") == "swanlab"
