"""Fixtures of the end-to-end tests: small data of all kinds, and a run that fails."""

from tests.e2e.conftest import fail, labelled, publish, registry, trainer_of

__all__ = ["fail", "labelled", "publish", "registry", "trainer_of"]
