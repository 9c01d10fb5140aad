"""Fixtures of tests of machines.

guests_kernel  the directory of the kernel of guests, which `scripts/kernel` fetches; all tests here are skipped without
guests         guests outside of an insulad, which are copies of one template
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guests import Guests, kernel


@pytest.fixture(autouse=True, scope="session")
def guests_kernel() -> Path:
    found = kernel()
    if found is None:
        pytest.skip("the kernel of guests is not there: scripts/kernel fetches it")
    return found


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory, guests_kernel: Path) -> Iterator[Guests]:
    made = Guests(tmp_path_factory.mktemp("guests"), guests_kernel)
    yield made
    made.close()
