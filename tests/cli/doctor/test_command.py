"""The doctor on this machine, and on machines that lack something."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwenvl.cli.doctor import command as doctor
from qwenvl.cli.doctor import machine, packages
from qwenvl.cli.doctor.findings import Finding

ROOT = Path(__file__).resolve().parents[3]


def test_this_machine_is_ready_and_the_verdict_says_with_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert re.search("^ok +training +two steps", printed, re.MULTILINE)  # two steps on a tiny model
    verdict = printed[printed.index("Verdict: ready") :]
    assert "torch 2." in verdict and "transformers 5." in verdict and "Python 3." in verdict


def test_what_is_known_to_do_harm_makes_it_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"deepspeed": "0.18.3", "transformers": "5.17.1", "torch": "2.9.1+cu128", "numpy": "2.1"}
    monkeypatch.setattr(packages.metadata, "version", versions.__getitem__)
    found = {finding.what: finding for finding in packages.check_known_bad()}
    assert found.keys() == {"deepspeed 0.18.3", "transformers 5.17.1", "torch 2.9.1+cu128"}
    assert found["deepspeed 0.18.3"].level == "bad"
    assert "overlap_comm" in doctor.verdict([*found.values()]) and "not ready" in doctor.verdict([*found.values()])


def test_a_missing_package_and_an_untested_one_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements.txt").write_text("# Data\n\nnothing-of-this-name>=1\nnumpy<1  # old\npytest\n")
    monkeypatch.setattr(packages, "CHECKOUT", tmp_path)
    assert [finding.level for finding in packages.check_required()] == ["bad", "warning", "good"]


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = next(finding for finding in packages.check_optional() if finding.what == "flash-attn")
    assert found.level == "warning" and "undefined symbol" in found.found


def test_missing_compilers_of_offload_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "CUDA_HOME", None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    (found,) = machine.check_compilers()
    assert found.found == "missing: a C++ compiler (no-such-compiler), nvcc of CUDA 13.0"
    assert "configs/zero3_offload.json" in found.advice


def test_failing_training_is_bad(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def failing() -> Iterator[Finding]:
        yield Finding("bad", "training", "two steps on a tiny model fail: out of memory", "smaller")

    monkeypatch.setattr(doctor, "check_training", failing)
    assert doctor.main([]) == 1
    assert "Verdict: not ready" in capsys.readouterr().out


@pytest.mark.slow
def test_ranks_are_tried_under_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "tools/doctor.py", "--skip_training"], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Verdict: ready") == 1
    assert "2 ranks over gloo" in " ".join(done.stdout.split())
