"""What a user is told of a launch that failed: the host is blamed only for what is the host's."""

from __future__ import annotations

import errno
import os

import msgspec
import pytest

from insula.container.service.failures import explain
from insula.model.errors import Failed


@pytest.mark.parametrize(
    ("step", "number", "hint"),
    [
        ("mount /data", errno.ENOTDIR, "what the image has at that path"),
        ("mount /etc/hosts", errno.ELOOP, "what the image has at that path"),
        ("mount /data", errno.ENOSPC, "make room"),
        ("set the sysctl net.ipv4.nope", errno.ENOENT, "look at the name"),
        ("change the user", errno.EINVAL, "--user"),
        ("enter the working directory", errno.ENOENT, "a directory of the image"),
        ("fork", errno.EAGAIN, "--pids"),
        ("attach the root", errno.ENOMEM, "--memory"),
        ("open the terminal", errno.ENOSPC, "--tty"),
        ("set RLIMIT_NOFILE", errno.EPERM, "ask for less"),
    ],
)
def test_faults_of_the_image_and_of_the_user_are_told_as_theirs(step: str, number: int, hint: str) -> None:
    error = explain({"step": step, "errno": number, "error": os.strerror(number), "path": None})
    assert step in error.message
    assert hint in (error.hint or "")
    assert "run `insula doctor`" not in (error.hint or "")


@pytest.mark.parametrize("step", ["mount /proc", "make the cgroup namespace", "load the seccomp filter"])
def test_what_the_host_lacks_the_doctor_knows(step: str) -> None:
    error = explain({"step": step, "errno": errno.EPERM, "error": "Operation not permitted", "path": None})
    assert "insula doctor" in (error.hint or "")


def test_names_of_any_bytes_fit_into_json() -> None:
    """Surrogates stand for bytes of names that are not UTF-8 (PEP 383); no JSON may hold them (RFC 8259, 8.2)."""
    error = Failed("no file 'x\udcff'", "not \udc80, but é")
    assert (error.message, error.hint) == ("no file 'x\\udcff'", "not \\udc80, but é")
    assert msgspec.json.decode(msgspec.json.encode(error.to_dict()))["message"] == error.message
