"""Choose and check the reporters of metrics (``--report_to``)."""

from __future__ import annotations

import logging
from importlib import metadata

from packaging.version import Version

from qwenvl.utils.errors import UserError, nearest

logger = logging.getLogger(__name__)

UNSUPPORTED_REPORTERS = {"swanlab": "0.8"}
"""The first release of each that ends in an error when training starts, with transformers 5.23."""


def choose_reporters(report_to: str | list[str] | None) -> str | list[str]:
    """Return the reporters of metrics, checked; by default tensorboard where it is installed.

    Raises:
        UserError: a name that transformers does not know, or whose package is missing.
    """
    from transformers.integrations import integration_utils  # slow to import, and only needed here

    known = integration_utils.INTEGRATION_TO_CALLBACK
    available = integration_utils.get_available_reporting_integrations()
    if not report_to:
        if "tensorboard" not in available:
            logger.warning("tensorboard is not installed: no curves are written (pip install tensorboard).")
        return "tensorboard" if "tensorboard" in available else "none"
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name not in (*known, "all", "none"):
            options = f"{', '.join(known)}, all or none"
            raise UserError(f"--report_to {name!r} is not known: {options}.{nearest(name, known)}")
        _require_known_version(name)
        if name not in ("all", "none", "flyte", *available):  # transformers cannot detect flyte
            raise UserError(f"--report_to {name} needs a package that is missing: pip install {name}, or choose none.")
    return report_to


def _require_known_version(reporter: str) -> None:
    """Refuse a package of ``--report_to`` that transformers' callback cannot talk to.

    Raises:
        UserError: Its release is one of these.
    """
    limit = UNSUPPORTED_REPORTERS.get(reporter)
    try:
        found = metadata.version(reporter) if limit is not None else None
    except metadata.PackageNotFoundError:
        return
    if limit is not None and found is not None and Version(found) >= Version(limit):
        raise UserError(
            f"--report_to {reporter}: {reporter} {found} is installed, and transformers' callback works with releases "
            f"before {limit} alone: pip install '{reporter}<{limit}', or choose another."
        )
