"""A wrong config, or one that the kernel refuses half-way, is one line of error, and leaves nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.machine import Run
from tests.support.oci import Bundle
from tests.unit.valid_config import MISSING, changed, paths


@pytest.fixture(scope="module")
def bundle(run_: Run) -> Iterator[Bundle]:
    path = run_.path / "bad-configs"
    yield Bundle(path, f"{run_.name}bad/web")
    shutil.rmtree(path)


def test_the_valid_config_runs(bundle: Bundle) -> None:
    """The control of all below."""
    bundle.write(bundle.config)
    result = bundle.oci.run("run", "--bundle", bundle.path, "web")
    assert (result.status, result.err) == (7, "")
    assert bundle.left() == []


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("process.cwd", "tmp", "process.cwd: 'tmp' is not an absolute path"),
        ("root.path", "nowhere", "root.path: there is no directory"),
        ("linux.resources.memory.swap", 5, "linux.resources.memory.swap: 5 is below limit"),
        ("linux.namespaces", [{"type": "pid"}], "linux.namespaces: the mount namespace would be the host's"),
        ("linux.intelRdt", {}, "linux.intelRdt: Intel RDT is not supported"),
        ("linux.sysctl", {"kernel.core_pattern": "|/x"}, "linux.sysctl.kernel.core_pattern: is not of any namespace"),
    ],
)
@pytest.mark.parametrize("verb", ["create", "run"])
def test_a_wrong_config_is_refused_before_anything_is_made(
    bundle: Bundle, verb: str, path: str, value: object, complaint: str
) -> None:
    bundle.write(changed(path, value, bundle.config))
    assert bundle.oci.fails(verb, "--bundle", bundle.path, "web").startswith(complaint)
    assert bundle.left() == []


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", '{"ociVersion": "1.2.0"}'])
def test_a_file_that_is_no_config_is_refused(bundle: Bundle, text: str) -> None:
    (bundle.path / "config.json").write_bytes(text.encode("latin-1"))
    bundle.oci.fails("create", "--bundle", bundle.path, "web")
    assert bundle.left() == []


def test_unknown_capabilities_are_a_warning(bundle: Bundle) -> None:
    bundle.write(changed("process.capabilities.bounding", ["CAP_KILL", "CAP_OF_TOMORROW"], bundle.config))
    result = bundle.oci.run("run", "--bundle", bundle.path, "web")
    assert result.status == 7
    assert result.err == (
        "warning: process.capabilities.bounding: there is no capability 'CAP_OF_TOMORROW'; it is left out\n"
    )


words = st.sampled_from(["", "/", ".", "..", "/..", "rootfs", "/proc", "bind", "tmpfs", "proc", "x" * 300, "user", "ü"])
numbers = st.sampled_from([-1, 0, 1, 2, 999, 65536, (1 << 32) - 2, (1 << 63) - 1])
shapes = st.sampled_from([[], {}, None, MISSING, True, False])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.data())
def test_whatever_the_config_nothing_is_left(bundle: Bundle, data: st.DataObject) -> None:
    """The group's path stays as it is, since a test may leave nothing in the host's tree."""
    fields = [path for path in paths(bundle.config) if path not in ("linux.cgroupsPath", "linux", "root")]
    config = bundle.config
    for path in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=3)):
        try:
            config = changed(path, data.draw(words | numbers | shapes), config)
        except (KeyError, IndexError, TypeError):
            continue
    bundle.write(config)
    result = bundle.oci.run("create", "--bundle", bundle.path, "web")
    if result.status == 0:
        assert bundle.oci.status("web") == "created"
        bundle.oci.ok("delete", "--force", "web")
    else:
        assert result.status in (1, 126, 127), result
        assert result.err.startswith(("error: ", "warning: ")) and result.err.splitlines()[-1].startswith("error: ")
    assert bundle.left() == []
