"""Fixtures of the end-to-end tests: small data of all kinds, and a run that fails; tiny models and their batches."""

from tests.e2e.conftest import fail, labelled, publish, registry, trainer_of
from tests.models.conftest import family_name, layout, load_tiny, make_batch, mixture

__all__ = [
    "fail",
    "family_name",
    "labelled",
    "layout",
    "load_tiny",
    "make_batch",
    "mixture",
    "publish",
    "registry",
    "trainer_of",
]
