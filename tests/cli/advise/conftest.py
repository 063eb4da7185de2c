"""Fixtures of these tests: data of all kinds."""

from tests.e2e.conftest import registry

__all__ = ["registry"]
