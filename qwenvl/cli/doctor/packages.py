"""Checks of the installed packages: tested versions, known faults, and whether they can be imported."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from qwenvl.cli.doctor.findings import Finding
from qwenvl.data.media.video.decode import backend_name, choose_backend
from qwenvl.utils.checkout import CHECKOUT
from qwenvl.utils.errors import UserError

OPTIONAL: dict[str, tuple[str, str]] = {
    "flash_attn": (
        "flash-attn",
        "torch's own varlen kernel is used on a GPU in bf16 or fp16; else SDPA, which is exact, sample by sample",
    ),
    "liger_kernel": ("liger-kernel", "only needed for --use_liger_kernel"),
    "bitsandbytes": ("bitsandbytes", "only needed for --quantization_bit and 8-bit optimizers"),
    "fla": (
        "flash-linear-attention",
        "packed rows of Qwen3.5 to 3.8 run sample by sample, exact and slow",
    ),
    "causal_conv1d": (
        "causal-conv1d",
        "packed rows of Qwen3.5 to 3.8 run sample by sample, exact and slow",
    ),
}
"""Modules that are used if installed: package, and the consequence of its absence."""

KNOWN_BAD: tuple[tuple[str, str, str], ...] = (
    (
        "deepspeed",
        "<0.19.8",
        "overlap_comm under ZeRO-1 and ZeRO-2 corrupts gradients: the loss is 0 or NaN from the second step on. "
        "pip install 'deepspeed>=0.19.8'",
    ),
    (
        "transformers",
        "<5.18",
        "stock inference rounds the frame times of Qwen2.5-VL videos and ignores transparency, unlike this trainer. "
        "pip install 'transformers>=5.18'",
    ),
    (
        "torch",
        "==2.9.*",
        "Conv3d of cuDNN is ten times slower. Stock inference uses it, this trainer does not. Install another torch",
    ),
    ("numpy", "<2", "other packages were built for numpy 2. pip install 'numpy>=2'"),
)
"""Package, versions, and the fault of these versions."""


def check_python() -> Iterator[Finding]:
    """Yield the versions of Python and the system."""
    found = f"{platform.python_version()} on {platform.platform(terse=True)}"
    old = sys.version_info < (3, 10)
    yield Finding("bad" if old else "good", "Python", found, "Python 3.10 or newer is needed" if old else "")


def check_required() -> Iterator[Finding]:
    """Yield every required package that applies to this system."""
    for line in declared():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _check(requirement)


def declared() -> list[str]:
    """Return the requirements from the repository's requirements.txt, or else from the installed wheel."""
    if CHECKOUT is None:
        return metadata.requires("qwenvl") or []
    lines = (CHECKOUT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [text for line in lines if (text := line.partition("#")[0].strip())]


def _check(requirement: Requirement) -> Finding:
    name, wanted = requirement.name, f"{requirement.name}{requirement.specifier}"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding("bad", name, "missing", f"pip install '{wanted}'")
    if requirement.specifier.contains(version, prereleases=True):
        return Finding("good", name, version)
    return Finding("warning", name, version, f"not tested; the tests passed with {requirement.specifier}: '{wanted}'")


def check_known_bad() -> Iterator[Finding]:
    """Yield installed versions with known faults."""
    for name, versions, harm in KNOWN_BAD:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if Requirement(f"{name}{versions}").specifier.contains(Version(version).base_version):
            yield Finding("bad" if name == "deepspeed" else "warning", f"{name} {version}", "known to be faulty", harm)


def check_optional() -> Iterator[Finding]:
    """Yield optional packages, for speed or single flags, and import the installed ones."""
    for module, (package, without) in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            yield Finding("note", package, "not installed", without)
            continue
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:  # built for another torch, or without a driver
            first = (str(error).splitlines() or [type(error).__name__])[0]
            yield Finding(
                "warning", package, f"cannot be imported: {first}", "built for another torch? Install it again"
            )
            continue
        yield Finding("good", package, metadata.version(package))


def check_video() -> Iterator[Finding]:
    """Yield the library that decodes videos."""
    try:
        choose_backend()
    except UserError as error:
        yield Finding("warning", "videos", "no library can decode them", str(error))
        return
    name = backend_name() or ""
    slow = "" if name == "torchcodec" else "install FFmpeg (apt install ffmpeg) to decode as transformers does"
    yield Finding("note" if slow else "good", "videos", f"decoded by {name}", slow)
