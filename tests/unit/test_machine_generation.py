"""The record of a machine's generation: whether the machine has answered with the number that it was given."""

from __future__ import annotations

from pathlib import Path

import pytest

from insula.control.instances.drivers.machine.readiness import Generation
from insula.model.errors import Failed


def test_only_the_number_that_was_given_counts(tmp_path: Path) -> None:
    generation = Generation(tmp_path / "generation")
    generation.give("a1")
    assert not generation.is_taken
    for other in ("", "a", "a2", "None", "a1 ready"):
        with pytest.raises(Failed):
            generation.take(other)
        assert not generation.is_taken
    generation.take("a1")
    assert Generation(tmp_path / "generation").is_taken, "another daemon finds it"
    generation.give("a2")
    assert not generation.is_taken


def test_a_record_that_is_missing_or_damaged(tmp_path: Path) -> None:
    generation = Generation(tmp_path / "generation")
    assert generation.is_taken, "machines that older daemons have started have none"
    with pytest.raises(Failed):
        generation.take("a1")
    (tmp_path / "generation").write_bytes(b"\xff ready")
    assert not generation.is_taken
