"""What all tests share.

Before numpy is there: one thread for products of matrices. The tests' are small, and gain nothing from a second thread
but to wait for it wherever something else has the core. The kernels' threads are their own.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def few_resamples() -> Iterator[int]:
    """Fronts are compared in nearly every report, and few tests are about the intervals of it; the number as it is."""
    from sae_sweep.reports import fronts

    whole = fronts.RESAMPLED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fronts, "RESAMPLED", 40)
        yield whole


@pytest.fixture
def few_inputs_for_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted toy draws a million inputs for its mean and scale: most tests need them less exact."""
    from sae_sweep.toys import sampling

    monkeypatch.setattr(sampling, "CONSTANTS_INPUTS", 1 << 14)
