"""Fixtures of the end-to-end tests, which the tests of the trainer's parts use too."""

from tests.e2e.conftest import fail, labelled, publish, registry, trainer_of

__all__ = ["fail", "labelled", "publish", "registry", "trainer_of"]
