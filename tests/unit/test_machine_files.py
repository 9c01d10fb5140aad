"""What a guest reports of a copy that has failed: it may be anything, and becomes a short error."""

from __future__ import annotations

import json

import pytest

from insula.control.instances.drivers.machine.files import error_of
from insula.model.errors import Failed, NotFound


def test_an_error_of_the_guest_is_the_error_that_a_container_would_have() -> None:
    said = json.dumps(NotFound("there is no /x in the instance", "look").to_dict()).encode()
    error = error_of(said, {"status": 1})
    assert type(error) is NotFound and (error.message, error.hint) == ("there is no /x in the instance", "look")


@pytest.mark.parametrize(
    "said", [b"", b"[]", b"7", b"null", b"\xff", b'{"error": 5}', b'{"message": ["a"]}', b"{" * 9000]
)
def test_what_is_no_error_is_a_failure(said: bytes) -> None:
    assert type(error_of(said, {"status": 1})) is Failed


def test_it_is_short() -> None:
    said = json.dumps({"error": "Failed", "message": "a" * 10_000, "hint": "b" * 10_000}).encode()
    error = error_of(said, {"status": 1})
    assert len(error.message) <= 500 and len(error.hint or "") <= 500
    assert len(error_of(b"", {"status": "c" * 10_000}).message) <= 600
