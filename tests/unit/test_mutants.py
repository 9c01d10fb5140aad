"""The mutants: the changes made to a source, and that the files in targets.toml exist."""

from __future__ import annotations

import tomllib

from tests.mutants.__main__ import CHECKOUT, TARGETS, _shown
from tests.mutants.operators import mutants


def shown(source: str) -> list[str]:
    return [_shown(mutant) for mutant in mutants(source)]


def test_modules_and_tests_are_there() -> None:
    targets: dict[str, list[str]] = tomllib.loads(TARGETS.read_text())
    paths = [CHECKOUT / "src" / module for module in targets]
    paths += [CHECKOUT / test for tests in targets.values() for test in tests]
    assert [path for path in paths if not path.is_file()] == []


def test_each_mutant_has_one_change() -> None:
    source = "def f(a, b):\n    if a < b and not b:\n        raise ValueError('too small')\n    return a + 1\n"
    assert shown(source) == [
        "a < b and not b  →  (a < b or not b)",
        "a < b  →  (a <= b)",
        "not b  →  (b)",
        "raise ValueError('too small')  →  pass",
        "return a + 1  →  return None",
        "a + 1  →  (a - 1)",
        "1  →  (2)",
    ]
    for mutant in mutants(source):
        assert mutant.source != source
        compile(mutant.source, "mutant", "exec")


def test_a_text_of_rules_loses_one_line_at_a_time() -> None:
    source = 'RULES = """\ntable a {\n    accept\n    udp dport { 53 } accept\n\n}\n"""\n'
    assert shown(source) == ["without the line  accept", "without the line  udp dport { 53 } accept"]
    first, second = (mutant.source for mutant in mutants(source))
    names: dict[str, str] = {}
    exec(first, names)
    assert names["RULES"] == "\ntable a {\n    udp dport { 53 } accept\n\n}\n"
    exec(second, names)
    assert names["RULES"] == "\ntable a {\n    accept\n\n}\n"


def test_no_mutants_of_prose() -> None:
    source = (
        '"""A docstring\n\nof lines."""\nX = 1\n"""Says\nwhat X is."""\nlog.warning("text", 1)\nhint = "do\\nthis"\n'
    )
    assert shown(source) == ["1  →  (2)"]
