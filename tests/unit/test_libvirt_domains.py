"""Domains of Xen and ESXi: any guest makes XML that libvirt's own schema accepts, and that is about that guest.

The schema is that of Debian's libvirt0, checked by xmllint(1), as virt-xml-validate(1) does.
"""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from insula.machine.hypervisor import DiskConfig, GuestConfig, Interface, Kernel
from insula.machine.libvirt import elements, esx, xen
from insula.model.errors import Invalid

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
UUID = "6f1c1a52-5c8b-4a0e-9d39-6f1c2f0c6a11"
KERNEL = Kernel("/boot/vmlinuz", "/boot/initrd", "console=hvc0 root=/dev/xvda")
BASE = GuestConfig("web", UUID, 256, kernel=KERNEL)


def valid(texts: Sequence[str], directory: Path) -> list[bool]:
    """Whether the schema accepts each."""
    for old in directory.glob("*.xml"):
        old.unlink()
    names = [f"{number}.xml" for number in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        (directory / name).write_text(text)
    command = ["xmllint", "--noout", "--nonet", "--relaxng", str(SCHEMA), *names]
    said = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120).stderr.splitlines()
    assert all(f"{name} validates" in said or f"{name} fails to validate" in said for name in names), said
    return [f"{name} validates" in said for name in names]


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", fullmatch=True)
paths = st.from_regex(r"(/[A-Za-z0-9_.+-]{1,12}){1,4}", fullmatch=True).filter(lambda path: ".." not in path.split("/"))
vmdk = st.from_regex(r"\[[A-Za-z0-9_. -]{1,9}\] [A-Za-z0-9_.-]{1,9}/[A-Za-z0-9_.-]{1,9}\.vmdk", fullmatch=True)
macs = st.from_regex(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}", fullmatch=True)
parameters = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)


def interfaces(scripts: st.SearchStrategy[str]) -> st.SearchStrategy[list[Interface]]:
    one = st.builds(
        Interface,
        macs,
        st.sampled_from(["xenbr0", "net-1"]),
        st.just("") | st.from_regex("[a-z0-9]{1,15}", fullmatch=True),
        scripts,
    )
    return st.lists(one, max_size=8, unique_by=lambda each: each.mac)


def disks(path: st.SearchStrategy[str], least: int, most: int, read_only: bool) -> st.SearchStrategy[list[DiskConfig]]:
    one = st.builds(DiskConfig, path, st.booleans() if read_only else st.just(False))
    return st.lists(one, min_size=least, max_size=most, unique_by=lambda each: each.path)


@st.composite
def guests_of_xen(draw: st.DrawFn) -> GuestConfig:
    kernel = draw(st.builds(Kernel, paths, st.just("") | paths, parameters))
    how = draw(st.sampled_from(["pv", "pvh", "hvm"]))
    devices = draw(st.sampled_from(["para", "full"])) if how == "hvm" else "para"
    given = draw(disks(paths, 0, 4 if devices == "full" else 16, True))
    without = how == "hvm" and given and draw(st.booleans())
    return GuestConfig(
        draw(names),
        str(draw(st.uuids())),
        draw(st.integers(16, 1 << 20)),
        draw(st.integers(1, 128)),
        how,  # type: ignore[arg-type]
        devices,  # type: ignore[arg-type]
        None if without else kernel,
        given,
        draw(interfaces(st.just("") | paths)),
        draw(st.booleans()),
    )


@st.composite
def guests_of_esx(draw: st.DrawFn) -> GuestConfig:
    return GuestConfig(
        draw(names),
        str(draw(st.uuids())),
        4 * draw(st.integers(4, 1 << 18)),
        draw(st.integers(1, 64)),
        devices=draw(st.sampled_from(["para", "full"])),
        disks=draw(disks(vmdk, 1, 15, False)),
        interfaces=draw(interfaces(st.just(""))),
    )


def check_against_schema(configs: list[GuestConfig], domain: Callable[[GuestConfig], Element], directory: Path) -> None:
    texts = [elements.text(domain(each)) for each in configs]
    for config, text, accepted in zip(configs, texts, valid(texts, directory), strict=True):
        assert accepted, text
        read = fromstring(text)
        assert [read.findtext("name"), read.findtext("uuid")] == [config.name, config.uuid]
        assert [each.get("address") for each in read.iter("mac")] == [each.mac for each in config.interfaces]
        assert [each.get("file") or each.get("dev") for each in read.findall("./devices/disk/source")] == [
            disk.path for disk in config.disks
        ]
        assert len(read.findall("./devices/disk/readonly")) == sum(disk.read_only for disk in config.disks)
        targets = [each.get("dev") for each in read.findall("./devices/disk/target")]
        assert len({*targets}) == len(targets)
        kernel = config.kernel or Kernel("")
        found = [read.findtext(f"./os/{tag}") or "" for tag in ("kernel", "initrd", "cmdline")]
        assert found == [*kernel]


# one process of xmllint for many guests: it reads the schema for a third of a second
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(configs=st.lists(guests_of_xen(), min_size=1, max_size=40))
def test_any_guest_of_xen_is_a_domain_by_libvirts_schema(configs: list[GuestConfig], directory: Path) -> None:
    check_against_schema(configs, xen.domain, directory)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(configs=st.lists(guests_of_esx(), min_size=1, max_size=40))
def test_any_guest_of_esxi_is_a_domain_by_libvirts_schema(configs: list[GuestConfig], directory: Path) -> None:
    check_against_schema(configs, esx.domain, directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("domains")


def test_the_schema_refuses_what_is_no_domain(tmp_path: Path) -> None:
    right = elements.text(xen.domain(BASE._replace(disks=[DiskConfig("/a")])))
    wrong = [
        right.replace('bus="xen"', 'bus="yen"'),
        right.replace('domain type="xen"', 'domain type="zen"'),
        right.replace("<vcpu>", "<vcpu>x"),
    ]
    assert all(each != right for each in wrong)
    assert valid([right, *wrong], tmp_path) == [True, False, False, False]


def os_of(config: GuestConfig) -> tuple[str | None, str | None]:
    found = xen.domain(config).find("./os/type")
    assert found is not None
    return found.text, found.get("machine")


def test_each_kind_of_virtualization_is_one_of_xens() -> None:
    assert os_of(BASE._replace(virtualization="pv")) == ("linux", "xenpv")
    assert os_of(BASE._replace(virtualization="pvh")) == ("xenpvh", "xenpvh")
    assert os_of(BASE._replace(virtualization="hvm")) == ("hvm", "xenfv")


def devices_of(made: Element) -> tuple[list[str | None], list[str | None]]:
    buses = [each.get("bus") for each in made.findall("./devices/disk/target")]
    models = [
        model.get("type") if (model := each.find("model")) is not None else None for each in made.iter("interface")
    ]
    return buses, models


def test_devices_are_the_hypervisors_or_such_as_real_machines_have() -> None:
    both = BASE._replace(
        disks=[DiskConfig("/a"), DiskConfig("/dev/vg/b")], interfaces=[Interface("00:16:3e:00:00:01", "br0")]
    )
    assert devices_of(xen.domain(both)) == (["xen", "xen"], ["netfront"])
    assert devices_of(xen.domain(both._replace(devices="full"))) == (["ide", "ide"], ["e1000"])
    assert devices_of(xen.domain(both._replace(virtualization="pv"))) == (["xen", "xen"], [None])
    on_esx = both._replace(kernel=None, disks=[DiskConfig("[ds] a/a.vmdk")])
    for devices, controller, model in (("para", "vmpvscsi", "vmxnet3"), ("full", "lsilogic", "e1000")):
        made = esx.domain(on_esx._replace(devices=devices))  # type: ignore[arg-type]
        assert devices_of(made) == (["scsi"], [model])
        assert [each.get("model") for each in made.iter("controller")] == [controller]


FULL = "a guest of kind {} has no emulated devices"


@pytest.mark.parametrize(
    ("domain", "changed", "complaint"),
    [
        (xen.domain, {"virtualization": "pv", "devices": "full"}, FULL.format("pv")),
        (xen.domain, {"virtualization": "pvh", "devices": "full"}, FULL.format("pvh")),
        (xen.domain, {"virtualization": "pv", "kernel": None}, "a guest of kind pv needs a kernel"),
        (xen.domain, {"kernel": None}, "web has neither a kernel nor a disk"),
        (xen.domain, {"devices": "full", "disks": [DiskConfig(f"/{n}") for n in range(5)]}, "can't have 5 disks"),
        (xen.domain, {"disks": [DiskConfig("relative")]}, "'relative' is not the absolute path"),
        (xen.domain, {"disks": [DiskConfig("/a/../b")]}, "is not the absolute path"),
        (xen.domain, {"disks": [DiskConfig("/a"), DiskConfig("/a")]}, "twice"),
        (xen.domain, {"kernel": Kernel("/k", "", "a\nb")}, "not printable ASCII"),
        (xen.domain, {"kernel": Kernel("/k", "", "a\0b")}, "not printable ASCII"),
        (xen.domain, {"name": "a/b"}, "'a/b' is no name of a guest"),
        (xen.domain, {"name": "<name>"}, "is no name of a guest"),
        (xen.domain, {"uuid": "x"}, "'x' is no UUID"),
        (xen.domain, {"memory": 0}, "can't have 0 MiB"),
        (xen.domain, {"cpus": 0}, "0 processors"),
        (xen.domain, {"interfaces": [Interface("01:00:00:00:00:00", "br0")]}, "is no MAC address"),
        (xen.domain, {"interfaces": [Interface("00:16:3e:00:00:01", "")]}, "is no network"),
        (xen.domain, {"interfaces": [Interface("00:16:3e:00:00:01", script="vif")]}, "is not the absolute path"),
        (xen.domain, {"interfaces": [Interface("00:16:3e:00:00:01", "br0", "x" * 16)]}, "is no name of a device"),
        (esx.domain, {}, "ESXi boots its guests from a disk"),
        (esx.domain, {"kernel": None}, "can't have 0 disks"),
        (esx.domain, {"kernel": None, "disks": [DiskConfig("/a")]}, "'/a' is no disk of a datastore"),
        (esx.domain, {"kernel": None, "disks": [DiskConfig("[d] a.vmdk", True)]}, "read-only"),
        (
            esx.domain,
            {"kernel": None, "disks": [DiskConfig("[d] a.vmdk")], "memory": 258},
            "can't give a guest 258 MiB",
        ),
        (esx.domain, {"kernel": None, "virtualization": "pv"}, "ESXi boots its guests from a disk"),
    ],
)
def test_what_is_no_guest_is_refused(
    domain: Callable[[GuestConfig], Element], changed: dict[str, object], complaint: str
) -> None:
    with pytest.raises(Invalid) as caught:
        domain(BASE._replace(**changed))  # type: ignore[arg-type]
    assert complaint in str(caught.value) and caught.value.hint


def test_a_device_is_found_again_in_what_the_hypervisor_tells() -> None:
    mac = "00:16:3e:00:00:01"
    told = elements.text(
        xen.domain(BASE._replace(disks=[DiskConfig("/a"), DiskConfig("/dev/b")], interfaces=[Interface(mac, "br0")]))
    )
    assert len(elements.devices(told, "disk")) == 2
    for wanted in (DiskConfig("/a"), DiskConfig("/dev/b"), Interface(mac, "br0")):
        found = elements.find(told, wanted)
        assert found and (wanted.path if isinstance(wanted, DiskConfig) else wanted.mac) in found
    assert elements.find(told, DiskConfig("/c")) is None
    assert elements.find(told, Interface("00:16:3e:00:00:02", "br0")) is None
    assert elements.console(told) is None
    assert (
        elements.console(told.replace('<console type="pty">', '<console type="pty" tty="/dev/pts/3">')) == "/dev/pts/3"
    )


def test_uuids_are_as_python_makes_them() -> None:
    xen.domain(BASE._replace(uuid=str(uuid.uuid4())))
