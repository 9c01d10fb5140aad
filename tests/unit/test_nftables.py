"""A handle of libnftables that another thread has closed."""

from __future__ import annotations

import os

import pytest

from insula.kernel.nftables import Nft
from insula.model.errors import Unavailable


@pytest.mark.skipif(os.geteuid() != 0, reason="nftables takes root")
def test_a_closed_handle_is_an_error_and_no_null_pointer() -> None:
    nft = Nft()
    nft.tables()
    nft.close()
    with pytest.raises(Unavailable):
        nft.run("list tables")
    nft.close()
