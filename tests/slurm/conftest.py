"""The data of whole runs, as in tests/train."""

from tests.e2e.conftest import registry

__all__ = ["registry"]
