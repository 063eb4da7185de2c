"""Packages of ``--report_to`` whose newer releases transformers cannot talk to."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

from qwenvl.utils.errors import UserError

UNSUPPORTED_REPORTERS = {"swanlab": "0.8"}
"""The first release of each that ends in an error when training starts, with transformers 5.23."""


def require_known_version(reporter: str) -> None:
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
