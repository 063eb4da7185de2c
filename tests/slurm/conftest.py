"""The data of whole runs, as in tests/train."""

from tests.train.conftest import registry

__all__ = ["registry"]
