"""Runs the tests in a machine of their own, before anything else happens (see tests.support.machine)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import machine

TESTS = Path(__file__).parent
MACHINE = ("system", "peer")
"""The suites that need one."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="only files with tests marked `long`, which are left out otherwise"
    )
    parser.addoption("--runtime", default="insula-oci", help="the OCI runtime of tests/peer: insula-oci, runc")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: more of the same, for `scripts/test long`; the short form always runs")
    wanted = any(_wants_machine(Path(argument.split("::")[0]).resolve()) for argument in config.args)
    if not wanted or machine.inside() or config.option.collectonly or not machine.possible():
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.stop_global_capturing()  # standard output and error are files of pytest's until then
    machine.enter("pytest")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = {item for item in items if item.get_closest_marker("long")}
    files = {item.path for item in marked}
    left_out = {item for item in items if item.path not in files} if config.getoption("--long") else marked
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _wants_machine(path: Path) -> bool:
    return any((TESTS / suite).is_relative_to(path) or path.is_relative_to(TESTS / suite) for suite in MACHINE)


def pytest_report_header() -> str:
    uname = os.uname()
    return f"kernel {uname.release}, {os.cpu_count()} CPUs, " + (
        "in namespaces of its own" if machine.inside() else "on the host itself"
    )
