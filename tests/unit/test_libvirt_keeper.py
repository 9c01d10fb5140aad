"""A guest's life by `LibvirtKeeper`, with libvirt's own driver for tests; and calls that take too long.

That driver is in the library. It keeps states as all do, and runs nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

import pytest

from insula.machine.hypervisor import DiskConfig, GuestConfig, GuestEvent, Interface, Kernel
from insula.machine.libvirt import library, xen
from insula.machine.libvirt.connection import LibvirtConnection
from insula.machine.libvirt.errors import connection_error
from insula.machine.libvirt.keeper import XEN, Dialect, LibvirtKeeper
from insula.model.errors import Conflict, Failed, Invalid, NotFound, Unavailable
from tests.support.libvirt import load
from tests.support.wait import patiently, until

UUID = "6f1c1a52-5c8b-4a0e-9d39-6f1c2f0c6a11"
CONFIG = GuestConfig("web", UUID, 256, kernel=Kernel("/boot/vmlinuz"), disks=[DiskConfig("/disk")])


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    load()


def domain(config: GuestConfig) -> Element:
    made = xen.domain(config)
    made.set("type", "test")
    return made


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[LibvirtKeeper]:
    """One without guests: those of a file are of one connection, those of test:///default of the process."""
    file = tmp_path / "node.xml"
    file.write_text("<node/>")
    made = LibvirtKeeper(f"test://{file}", Dialect(domain, XEN.device, XEN.features))
    yield made
    made.close()


def test_it_says_what_it_is(keeper: LibvirtKeeper) -> None:
    assert keeper.check().startswith("TEST ") and ", libvirt " in keeper.check()


def test_a_guest_lives_from_its_definition_to_its_end(keeper: LibvirtKeeper) -> None:
    assert keeper.guests() == {}
    keeper.define(CONFIG)
    assert keeper.guests() == {"web": "off"}
    keeper.start("web")
    assert keeper.state("web") == "running"
    keeper.pause("web")
    assert keeper.state("web") == "paused"
    keeper.resume("web")
    assert keeper.state("web") == "running"
    keeper.shut_down("web")
    assert keeper.state("web") == "off"
    keeper.start("web")
    keeper.kill("web")
    keeper.kill("web")
    assert keeper.state("web") == "off"
    keeper.undefine("web")
    assert keeper.guests() == {}


def test_what_is_no_time_for_is_a_conflict(keeper: LibvirtKeeper) -> None:
    keeper.define(CONFIG)
    with pytest.raises(Conflict, match="has a guest web already"):
        keeper.define(CONFIG)
    for call in (keeper.pause, keeper.resume, keeper.shut_down, keeper.console):
        with pytest.raises(Conflict):
            call("web")
    keeper.start("web")
    with pytest.raises(Conflict):
        keeper.start("web")
    with pytest.raises(Conflict, match="web is running; hint: that is for a guest that is off"):
        keeper.undefine("web")
    assert keeper.state("web") == "running"


def test_a_guest_that_is_not_there_is_not_found(keeper: LibvirtKeeper) -> None:
    for call in (
        keeper.start,
        keeper.shut_down,
        keeper.kill,
        keeper.pause,
        keeper.resume,
        keeper.state,
        keeper.undefine,
    ):
        with pytest.raises(NotFound, match="has no guest absent; hint: "):
            call("absent")


def test_a_guest_that_can_not_be_is_invalid_and_nothing_is_made(keeper: LibvirtKeeper) -> None:
    with pytest.raises(Invalid):
        keeper.define(CONFIG._replace(name="a b"))
    assert keeper.guests() == {}


def test_a_definition_with_the_uuid_of_another_guest_is_a_conflict(keeper: LibvirtKeeper) -> None:
    keeper.define(CONFIG)
    with pytest.raises(Conflict, match="already"):
        keeper.define(CONFIG._replace(name="other"))
    assert "other" not in keeper.guests()


def test_what_the_hypervisor_can_not_do_is_unavailable(keeper: LibvirtKeeper) -> None:
    keeper.define(CONFIG)
    keeper.start("web")
    with pytest.raises(Unavailable, match="this hypervisor can't do that"):
        keeper.attach("web", Interface("00:16:3e:00:00:01", "br0"))
    with pytest.raises(NotFound, match="web has no device /other"):
        keeper.detach("web", DiskConfig("/other"))
    with pytest.raises(Unavailable, match="this hypervisor can't do that"):
        keeper.detach("web", DiskConfig("/disk"))
    bare = LibvirtKeeper("test:///default", Dialect(domain, XEN.device, frozenset()))
    with pytest.raises(Unavailable, match="gives no console"):
        bare.console("web")
    with pytest.raises(Unavailable, match="does not tell of changes"):
        bare.watch(lambda event: None)


def test_events_are_told_until_they_are_not_wanted_any_more(keeper: LibvirtKeeper) -> None:
    told: list[GuestEvent] = []
    end = keeper.watch(told.append)
    keeper.define(CONFIG)
    keeper.start("web")
    keeper.pause("web")
    keeper.resume("web")
    keeper.kill("web")
    keeper.undefine("web")
    wanted = [GuestEvent("web", what) for what in ("defined", "started", "paused", "resumed", "stopped", "undefined")]
    until(lambda: len(told) >= len(wanted), "six events")
    assert told == wanted
    end()
    keeper.define(CONFIG)
    marker: list[GuestEvent] = []
    end = keeper.watch(marker.append)
    keeper.start("web")
    until(lambda: marker, "the event for the second watcher")
    end()
    assert told == wanted


def test_nothing_but_the_own_modules_is_taken_from_the_directory_of_debians_python() -> None:
    assert library.DIRECTORY not in sys.path
    assert sys.modules["libvirt"].__file__ == f"{library.DIRECTORY}/libvirt.py"


def test_a_library_that_is_not_there_is_said_with_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(library, "DIRECTORY", str(tmp_path))
    monkeypatch.setattr(library, "_loaded", [])
    monkeypatch.delitem(sys.modules, "libvirtmod")
    with pytest.raises(Unavailable, match=r"is not in .*; hint: apt-get install python3-libvirt"):
        library.load()


def test_xen_without_its_daemon_is_unavailable() -> None:
    keeper = LibvirtKeeper("xen:///system", XEN)
    with pytest.raises(Unavailable, match=r"xen:///system can't be reached: .*; hint: in domain 0 of Xen, install"):
        keeper.check()
    keeper.close()


def test_a_daemon_without_a_driver_for_xen_is_as_good_as_none() -> None:
    found = connection_error(1, "internal error: libxenlight state driver is not active", "xen:///system")
    assert found and found.hint and "libvirt-daemon-driver-xen" in found.hint
    assert connection_error(1, "internal error: something else", "xen:///system") is None


def test_a_call_that_takes_too_long_is_given_up_and_the_next_one_has_another_connection() -> None:
    connection = LibvirtConnection("test:///default")
    go_on = threading.Event()
    opened: list[object] = []
    before = threading.active_count()

    def hang(_: object, conn: object) -> None:
        opened.append(conn)
        go_on.wait(patiently(60))

    with pytest.raises(Unavailable, match=r"does not answer within 0\.2 seconds"):
        connection.call(hang, seconds=0.2)
    assert connection.call(lambda _, conn: conn.getType() if opened[0] is not conn else "the same") == "TEST"
    for _ in range(3):
        with pytest.raises(Unavailable, match="does not answer"):
            connection.call(hang, seconds=0.2)
    begun = time.monotonic()
    with pytest.raises(Unavailable, match="has not answered 4 calls yet"):
        connection.call(lambda _, conn: conn.getType())
    assert time.monotonic() - begun < patiently(5), "it was refused, and did not wait"
    go_on.set()
    until(lambda: threading.active_count() <= before, "the threads end")
    assert connection.call(lambda _, conn: conn.getType()) == "TEST"
    connection.close()


def test_an_error_of_the_function_is_raised_as_it_is() -> None:
    connection = LibvirtConnection("test:///default")

    def fail(_: object, __: object) -> None:
        raise Failed("the reason")

    with pytest.raises(Failed, match="the reason"):
        connection.call(fail)
    connection.close()
