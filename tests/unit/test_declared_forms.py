"""Objects as documents and back: what is dumped declares the same object; and what the command line shows of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from insula.cli.main import main
from insula.control.declared.documents import read
from insula.control.declared.kinds.base import DeclaredKind, ObjectReference, Verbs
from insula.control.declared.kinds.instance import InstanceKind
from insula.control.declared.kinds.network import NetworkKind
from insula.control.declared.kinds.registry import KINDS
from insula.control.declared.yaml12 import write
from insula.control.identities.authority import OPERATOR, Authority
from insula.model.declared import DeclaredFile, DeclaredItem
from insula.model.errors import Invalid
from tests.unit.conftest import StubDaemon

NO_VERBS = cast(Verbs, None)  # forms of instances and networks need none
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
WORD = (
    st.sampled_from(["NO", "on", "22:22", "1e3", "0x1f", "~", "null", "- a", "a: b", "# c", "\x1b[2J", "x" * 300])
    | TEXT
)
NAMES = st.from_regex("[A-Z_]{1,8}", fullmatch=True)
SPEC = st.fixed_dictionaries(
    {"image": st.sampled_from(["busybox", "busybox:latest", "a/b:1e3"])},
    optional={
        "networks": st.lists(
            st.sampled_from([{"network": "back"}, {"network": "front", "mac": "02-42-AC-11-00-02"}]), max_size=2
        ),
        "command": st.lists(WORD, max_size=3),
        "entrypoint": st.none() | st.lists(WORD, max_size=2),
        "env": st.dictionaries(NAMES, WORD, max_size=3),
        "user": st.none() | st.sampled_from(["root", "1000:1000", "0"]),
        "stop_signal": st.sampled_from(["term", "SIGINT", "9"]),
        "stop_timeout": st.floats(0, 100),
        "tty": st.booleans(),
        "read_only": st.booleans(),
        "resources": st.fixed_dictionaries(
            {}, optional={"cpus": st.floats(0.01, 64), "memory": st.integers(1 << 24, 1 << 40), "pids": st.none()}
        ),
        "restart": st.fixed_dictionaries({"name": st.sampled_from(["no", "always", "on-failure"])}),
        "healthcheck": st.none()
        | st.fixed_dictionaries({}, optional={"test": st.just(["NONE"]), "interval": st.floats(1, 60)}),
        "mounts": st.lists(st.fixed_dictionaries({"type": st.just("tmpfs"), "path": st.just("/a")}), max_size=1),
        "options": st.fixed_dictionaries(
            {}, optional={"init": st.booleans(), "sysctls": st.just({"net.core.somaxconn": "1"})}
        ),
        "wanted": st.sampled_from(["running", "stopped"]),
    },
)
LABELS = st.dictionaries(
    st.from_regex("[a-z][a-z0-9]{0,6}", fullmatch=True),
    st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=6),
    max_size=3,
)


@given(SPEC, LABELS)
def test_a_dumped_instance_declares_the_same(spec: dict[str, Any], labels: dict[str, str]) -> None:
    kind, ref = InstanceKind(), ObjectReference("Instance", "acme", "web")
    try:
        full = kind.full(ref, {"spec": spec, "labels": labels})
    except Invalid:
        assume(False)
    short = kind.short(NO_VERBS, ref, full)
    (again,) = read([DeclaredFile(text=write([kind.to_document(ref, short, None)]))], "acme")
    assert again.full == full and again.form == short
    assert kind.full(ref, full) == full, "it is in canonical form"


@given(
    st.sampled_from(["10.0.0.0/24", "172.16.0.0/12"]),
    st.none() | st.just("fd00:0:1::/64"),
    st.integers(576, 9216),
    LABELS,
)
def test_a_dumped_network_declares_the_same(subnet: str, subnet6: str | None, mtu: int, labels: dict[str, str]) -> None:
    kind, ref = NetworkKind(), ObjectReference("Network", "acme", "back")
    assume(subnet6 is None or mtu >= 1280)
    full = kind.full(ref, {"spec": {"subnet": subnet, "subnet6": subnet6, "mtu": mtu}, "labels": labels})
    document = kind.to_document(ref, kind.short(NO_VERBS, ref, full), "acme")
    (again,) = read([DeclaredFile(text=write([document]))], None)
    assert again.full == full and document["metadata"]["tenant"] == "acme"


def test_variables_are_hidden_from_those_who_can_not_read_them() -> None:
    kind, form = InstanceKind(), {"labels": {}, "spec": {"image": "x", "env": {"PASSWORD": "secret"}}}
    viewer = Authority(proof="x", tenants={"acme": "viewer"})
    auditor = Authority(proof="x", host=frozenset({"auditor"}))
    member = Authority(proof="x", tenants={"acme": "member"})
    for sender in (viewer, auditor):
        assert kind.masked(form, sender, "acme")["spec"]["env"] == {"PASSWORD": "…"}
        assert "env" not in kind.masked(form, sender, "acme", omit=True)["spec"]
    for sender in (member, OPERATOR):
        assert kind.masked(form, sender, "acme") == kind.masked(form, sender, "acme", omit=True) == form
    assert form["spec"]["env"] == {"PASSWORD": "secret"}, "the form itself is as it was"


# -- the command line, in front of a hostile server --------------------------------------------------------------------


class HostileServer:
    """Its names, reasons, differences and dumps have control sequences."""

    ITEM = DeclaredItem(
        kind="Net\x1b[2Jwork",
        name="a\nInstance b  created",
        tenant="acme",
        operation="update",
        state="refused",
        reason="\x9b2Jno",
        advice="\u202e--force",
        diff=["+\x1b]0;owned\x07"],
    )

    async def apply(self, *_: object) -> AsyncIterator[DeclaredItem]:
        yield self.ITEM

    async def diff(self, *_: object) -> list[DeclaredItem]:
        return [self.ITEM]

    async def dump(self, *_: object) -> AsyncIterator[bytes]:
        yield b"a: b\n\x1b]0;owned\x07\xc2\x9b2J\n"


@pytest.mark.parametrize("verb", ["apply", "diff", "dump"])
def test_a_hostile_server_can_not_control_the_terminal(
    verb: str, stub: StubDaemon, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Any
) -> None:
    stub.plane.declared = cast(Any, HostileServer())
    file = tmp_path / "f.yaml"
    file.write_text("a: b")
    words = ["--socket", str(stub.path), "-T", "acme", verb]
    status = main(words if verb == "dump" else [*words, "-f", str(file)])
    out = capfdbinary.readouterr().out
    assert status == (0 if verb == "dump" else 1)
    assert all(32 <= byte < 127 or byte == 10 for byte in out), out
    if verb != "dump":
        assert out.startswith(b"Net\\x1b[2Jwork a\\nInstance b  created  "), "one line for each"
        assert b"\\x1b]0;owned\\x07" in out


def test_a_kind_has_all_verbs() -> None:
    """Python refuses one without a verb that every kind has; those with fields to change have `update` too."""

    class Incomplete(NetworkKind):
        remove = DeclaredKind.remove

    with pytest.raises(TypeError, match="abstract method remove"):
        Incomplete()
    for kind in KINDS.values():
        assert (type(kind).update is not DeclaredKind.update) == bool(kind.in_place), kind.name
