"""The cache of compiled filters: its keys, and files that others could have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from insula.control.instances.drivers.container import seccomp_default
from insula.kernel import capabilities
from insula.kernel.seccomp import cache as seccomp_cache
from insula.kernel.seccomp import compiler
from insula.model.errors import Invalid

NOTIFY: dict[str, Any] = {
    "listenerPath": "/run/agent.sock",
    "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}],
}


def default_profile(*add: str) -> dict[str, Any]:
    return seccomp_default.profile(capabilities.to_names(capabilities.adjust(capabilities.DEFAULT, add)))


def test_compiled_once(tmp_path: Path) -> None:
    file, flags = seccomp_cache.compiled_file(default_profile(), tmp_path / "cache")
    path = Path(file)
    assert flags == 0
    assert path.read_bytes() == compiler.compile(default_profile())
    stamp = path.stat().st_ino
    assert Path(seccomp_cache.compiled_file(default_profile(), path.parent)[0]).stat().st_ino == stamp
    assert seccomp_cache.compiled_file(default_profile("BPF"), path.parent)[0] != file
    assert len(list(path.parent.iterdir())) == 2


def test_the_cache_key_has_only_the_inputs_of_the_filter(tmp_path: Path) -> None:
    base: dict[str, Any] = {**default_profile(), "listenerPath": "/a", **NOTIFY}
    files = set()
    for change in ({}, {"listenerPath": "/b"}, {"listenerMetadata": "m"}, {"flags": ["SECCOMP_FILTER_FLAG_LOG"]}):
        program, flags = seccomp_cache.program({**base, **change}, tmp_path)
        assert flags == 8 | (2 if "flags" in change else 0)
        files.add(program)
    assert len(files) == len(list(tmp_path.iterdir())) == 1
    others: list[dict[str, Any]] = [{"defaultErrnoRet": 2}, {"architectures": []}, {"defaultAction": "SCMP_ACT_KILL"}]
    for change in others:
        given = {**base, **change}
        if change.get("defaultAction"):
            given["defaultErrnoRet"] = None
        files.add(seccomp_cache.program(given, tmp_path)[0])
    assert len(files) == 4


@pytest.mark.parametrize("fault", ["writable", "link", "missing"])
def test_a_cached_filter_that_others_could_write_is_not_used(tmp_path: Path, fault: str) -> None:
    profile = default_profile()
    path = Path(seccomp_cache.compiled_file(profile, tmp_path)[0])
    forged = compiler.compile({"defaultAction": "SCMP_ACT_ALLOW"})
    path.write_bytes(forged)
    assert seccomp_cache.program(profile, tmp_path)[0] == forged  # the control: it is what decides
    if fault == "writable":
        path.chmod(0o666)
    else:
        path.unlink()
    if fault == "link":
        (tmp_path / "forged").write_bytes(forged)
        path.symlink_to("forged")
    assert seccomp_cache.program(profile, tmp_path)[0] == compiler.compile(profile)
    assert path.read_bytes() == compiler.compile(profile)


def test_a_wrong_profile_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(Invalid):
        seccomp_cache.program({**default_profile(), "flags": [["x"]]}, tmp_path)
    with pytest.raises(Invalid):
        seccomp_cache.program({**default_profile(), "syscalls": object()}, tmp_path)
    assert list(tmp_path.iterdir()) == []
