"""Options of `run` and `exec` as text, and the checks of their values in the API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.cli.options import Command, UsageError, parse, split_global
from insula.cli.verbs import logs, run
from insula.control.instances.drivers.container.etc_files import etc_files
from insula.control.instances.specs import check
from insula.model.errors import Conflict, Invalid
from insula.model.objects import (
    ContainerOptions,
    HostEntry,
    InstanceSpec,
    MachineOptions,
    Network,
    Port,
    TmpfsMount,
)
from tests.support import objects

COMMAND = run.COMMANDS["run"]


def spec(*words: str) -> dict[str, Any]:
    assert isinstance(COMMAND, Command)
    return run.build_spec(parse(COMMAND, "run", [*words, "busybox"], split_global([])[0]))


# -- --env-file ------------------------------------------------------------------------------------------------------


def test_a_file_of_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docker-run(1) has it: nothing is quoted, and a name alone takes the value from here."""
    monkeypatch.setenv("FROM_HERE", "here")
    monkeypatch.delenv("NOWHERE", raising=False)
    file = tmp_path / "variables"
    file.write_bytes(
        b"\xef\xbb\xbf# a comment\n\n  \nA=1\n  B= two words # kept \n"
        b'C="quoted"\nD=\nE=x=y\r\n\t# F=no\nFROM_HERE\nNOWHERE'
    )
    assert spec("--env-file", str(file))["env"] == {
        "A": "1",
        "B": " two words # kept ",
        "C": '"quoted"',
        "D": "",
        "E": "x=y",
        "FROM_HERE": "here",
    }


def test_options_count_more_than_files_and_later_files_more_than_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("A=1\nB=1\nC=1")
    (tmp_path / "2").write_text("B=2\nC=2")
    found = spec("-e", "C=3", "--env-file", str(tmp_path / "1"), "--env-file", str(tmp_path / "2"))["env"]
    assert found == {"A": "1", "B": "2", "C": "3"}


@pytest.mark.parametrize("content", [b"=x", b"A B=x", b"A =x", b"A\tB", b"A=\xff", b"A=\0", b"\0"])
def test_files_that_are_no_environment_files_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "variables"
    file.write_bytes(b"GOOD=1\n" + content)
    with pytest.raises(UsageError, match=r"line 2 of|not UTF-8"):
        run.env_lines(str(file))


def test_files_that_are_not_there_or_too_long(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        run.env_lines(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="Is a directory"):
        run.env_lines(str(tmp_path))
    (tmp_path / "long").write_text("A=" + "x" * run.MAX_ENV_FILE)
    with pytest.raises(UsageError, match="too long"):
        run.env_lines(str(tmp_path / "long"))


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]*", fullmatch=True),
        st.text(st.characters(exclude_characters="\n\r\0", codec="utf-8")),
    )
)
def test_variables_that_are_written_are_read(
    tmp_path_factory: pytest.TempPathFactory, variables: dict[str, str]
) -> None:
    file = tmp_path_factory.mktemp("env") / "variables"
    file.write_text("".join(f"{name}={value}\n" for name, value in variables.items()), newline="")
    assert run.environment([], [str(file)]) == variables


# -- --tmpfs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/x", {"path": "/x"}),
        ("/x:size=4m", {"path": "/x", "size": 4 << 20}),
        ("/x:exec,mode=755", {"path": "/x", "executable": True, "mode": 0o755}),
        (
            "/x:rw,noexec,nosuid,nodev,size=65536k",
            {"path": "/x", "executable": False, "read_only": False, "size": 64 << 20},
        ),
        (
            "/x:ro,uid=1000,gid=100,mode=01777",
            {"path": "/x", "read_only": True, "uid": 1000, "gid": 100, "mode": 0o1777},
        ),
        ("/x:exec,noexec", {"path": "/x", "executable": False}),
    ],
)
def test_options_of_a_tmpfs(text: str, expected: dict[str, object]) -> None:
    assert run.tmpfs(text) == {"type": "tmpfs", **expected}


@pytest.mark.parametrize(
    "text",
    [
        "suid",
        "dev",
        "size=",
        "size=50%",
        "mode=8",
        "mode=",
        "mode=rwx",
        "uid=me",
        "uid=-1",
        "exec=yes",
        "",
        "x",
        "nr_inodes=0",
        "a=b=c",
    ],
)
def test_options_that_no_tmpfs_has(text: str) -> None:
    with pytest.raises(UsageError):
        run.tmpfs(f"/x:exec,{text}")


# -- --add-host, --dns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "address"),
    [
        ("db:10.0.0.7", "db", "10.0.0.7"),
        ("db=10.0.0.7", "db", "10.0.0.7"),
        ("db:fd00::7", "db", "fd00::7"),
        ("db:[fd00::7]", "db", "fd00::7"),
        ("db=[fd00::7]", "db", "fd00::7"),
    ],
)
def test_hosts(text: str, name: str, address: str) -> None:
    assert run.extra_host(text) == {"name": name, "address": address}


@pytest.mark.parametrize("text", ["db", ":10.0.0.7", "db:", "", "=", "db:host-gateway"])
def test_invalid_hosts_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        run.extra_host(text)


BASE: dict[str, Any] = {"image": "busybox"}
WRONG: list[dict[str, Any]] = [
    *(
        {"extra_hosts": [HostEntry(name="db", address=a)]}
        for a in ("", "x", "10.0.0", "10.0.0.7\nevil", "fe80::1%eth0", "10.0.0.0/8")
    ),
    *(
        {"extra_hosts": [HostEntry(name=n, address="10.0.0.7")]}
        for n in ("", "a b", "a\n10.0.0.9 b", "-a", "a..b", "a" * 64, "a." * 127 + "a", "ä", "a\t", "a#")
    ),
    {"extra_hosts": [HostEntry(name="a", address="10.0.0.7")] * 257},
    *({"dns": [a]} for a in ("", "dns.example", "10.0.0.53 evil", "fe80::1%eth0")),
    {"dns": ["10.0.0.1"] * 4},
    *({"dns_search": [d]} for d in ("", "a b", "a\noptions rotate", "..", "-", "a" * 64)),
    {"dns_search": ["a"] * 33},
    {"dns_search": ["a" * 60 + ".b"] * 20},
    {"dns_search": [".", "a"]},
    {"options": ContainerOptions(group_add=["a"] * 65)},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_values_that_the_api_refuses(wrong: dict[str, Any]) -> None:
    check(InstanceSpec(**BASE))  # the positive control
    with pytest.raises(Invalid):
        check(InstanceSpec(**BASE, **wrong))


NETWORK = Network(
    tenant="acme",
    name="default",
    index=1,
    vni=1,
    subnet="10.0.0.0/24",
    gateway="10.0.0.1",
    subnet6="fd00::/64",
    gateway6="fd00::1",
    created=0.0,
)
PORT = Port(
    tenant="acme",
    network="default",
    instance="web",
    index=1,
    mac="02:00:00:00:00:01",
    address="10.0.0.2",
    address6="fd00::2",
)


def etc(port: Port | None = PORT, **asked: Any) -> dict[str, list[str]]:
    instance = objects.instance(spec=check(InstanceSpec(**BASE, **asked)), ports=[port] if port else [])
    return {name: text.splitlines() for name, text in etc_files(instance, [NETWORK] if port else []).items()}


def test_contents_of_the_files_of_etc() -> None:
    plain = ["search acme.internal", "nameserver 10.0.0.1", "nameserver fd00::1"]
    assert etc()["resolv.conf"] == plain
    assert etc(dns=["9.9.9.9", "FD00:0::0053"])["resolv.conf"] == [
        plain[0],
        "nameserver 9.9.9.9",
        "nameserver fd00::53",
    ]
    assert etc(dns_search=["example.org", "example.com."])["resolv.conf"] == [
        "search example.org example.com.",
        *plain[1:],
    ]
    assert etc(dns_search=["."])["resolv.conf"] == plain[1:]
    assert etc(None)["resolv.conf"] == []
    assert etc(None, dns=["9.9.9.9"], dns_search=["x"])["resolv.conf"] == ["search x", "nameserver 9.9.9.9"]
    before = etc()["hosts"]
    hosts = [
        HostEntry(name="db", address="10.0.0.7"),
        HostEntry(name="db", address="FD00::0007"),
        HostEntry(name="a_b.c", address="1.2.3.4"),
    ]
    assert etc(extra_hosts=hosts)["hosts"] == [*before, "10.0.0.7\tdb", "fd00::7\tdb", "1.2.3.4\ta_b.c"]


@given(st.text(max_size=20), st.text(max_size=20))
def test_no_text_adds_a_line_of_its_own(name: str, address: str) -> None:
    for entry in (HostEntry(name=name, address="10.0.0.7"), HostEntry(name="db", address=address)):
        try:
            found = etc(extra_hosts=[entry])["hosts"]
        except Invalid:
            continue
        assert len(found) == len(etc()["hosts"]) + 1
        assert len(found[-1].split()) == 2


# -- the others ------------------------------------------------------------------------------------------------------


def test_all_of_it_becomes_a_spec() -> None:
    made = spec(
        *(
            "--shm-size",
            "1g",
            "--add-host",
            "db:10.0.0.7",
            "--dns",
            "9.9.9.9",
            "--dns-search",
            "x",
            "--group-add",
            "audio",
        ),
        *("--tmpfs", "/t:exec"),
    )
    found = msgspec.convert(made, InstanceSpec)
    assert isinstance(found.options, ContainerOptions) and found.options.shm_size == 1 << 30
    assert found.extra_hosts == [HostEntry(name="db", address="10.0.0.7")]
    assert (found.dns, found.dns_search, found.options.group_add) == (["9.9.9.9"], ["x"], ["audio"])
    assert found.mounts == [TmpfsMount(path="/t", executable=True)]
    usual = msgspec.convert(spec(), InstanceSpec).options
    assert isinstance(usual, ContainerOptions) and usual.shm_size == 64 << 20, "the default"


def test_a_virtual_machine_has_options_of_its_own() -> None:
    found = msgspec.convert(spec("--vm", "--cold", "--group-add", "audio"), InstanceSpec)
    assert found.options == MachineOptions(cold=True, group_add=["audio"]) and found.kind == "machine"
    assert msgspec.convert(spec(), InstanceSpec).kind == "container"
    for words in (("--vm", "--cap-add", "SYS_TIME"), ("--vm", "--init"), ("--vm", "--pids", "9"), ("--cold",)):
        with pytest.raises(UsageError) as refused:
            spec(*words)
        assert refused.value.hint, words


def test_the_number_of_log_lines_may_be_all() -> None:
    command = logs.COMMANDS["logs"]
    for words, expected in ((("-n", "5"), 5), (("--tail", "all"), None), (("-n0",), 0), ((), None)):
        assert parse(command, "logs", [*words, "web"], split_global([])[0]).tail == expected
    with pytest.raises(UsageError):
        parse(command, "logs", ["-n", "ALL", "web"], split_global([])[0])


def test_the_file_for_the_name_is_new_and_stays_only_if_all_goes_well(tmp_path: Path) -> None:
    path = tmp_path / "name"
    with run.IdFile(str(path)) as cidfile:
        cidfile.write("web")
    assert path.read_text() == "web"
    with pytest.raises(Conflict, match="already"), run.IdFile(str(path)):
        pass
    assert path.read_text() == "web"
    with pytest.raises(ZeroDivisionError), run.IdFile(str(tmp_path / "other")):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["name"]
    with pytest.raises(Invalid, match="can't be made"), run.IdFile(str(tmp_path / "no" / "such")):
        pass
