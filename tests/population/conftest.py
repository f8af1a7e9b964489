"""Small data sets get a fifth of the draws that they get in earnest: every claim here has a tolerance that knows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nlme_sbi.population.estimators import exact, laplace_draws


@pytest.fixture(autouse=True, scope="session")
def _fewer_draws() -> Iterator[None]:
    patched = pytest.MonkeyPatch()
    patched.setattr(exact, "_DRAWS_ALL", 20_000)
    patched.setattr(laplace_draws, "_CHECKED_ALL", 20_000)
    yield
    patched.undo()
