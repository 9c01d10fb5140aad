"""`insula run --vm` on Xen, by the command line in domain 0: an insulad there makes para-virtualized guests of images.

Xen, domain 0, libvirtd, insulad and the guests are real; the processor is emulated. To have Xen make a guest takes half
a minute here, so insulad has more time than on a real processor (tests/xen/insulad.py), and one guest is for all
tests, which run in the order in which they are written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.guest import CHECKOUT, Done
from tests.support.xen import Domain0

LONG = 90.0  # seconds, times the patience of `Guest`
SETUP = f"""
sed 's#@LIBRARY@#{CHECKOUT}/src#' {CHECKOUT}/packaging/insula >/usr/local/bin/insula
chmod 755 /usr/local/bin/insula
mkdir -p /etc/insula
printf '[machines]\\nhypervisor = "xen:///system"\\n' >/etc/insula/insulad.toml
chmod 600 /etc/insula/insulad.toml
"""
START = f"""
cd {CHECKOUT}
PYTHONPATH=src:. setsid python3 -m tests.xen.insulad >>/var/log/insulad.log 2>&1 </dev/null &
echo $! >/run/insulad.test
until insula status >/dev/null 2>&1; do sleep 1; done
"""
ADDRESS, PEER = "10.9.0.20", "10.9.0.30"


class Cloud:
    """insulad in domain 0."""

    def __init__(self, domain0: Domain0) -> None:
        self.domain0 = domain0

    def run(self, command: str) -> Done:
        return self.domain0.run(command, LONG)

    def ok(self, command: str) -> str:
        return self.domain0.ok(command, LONG)

    def start(self) -> None:
        self.ok(START)

    def guests(self) -> list[str]:
        """The states of guests in `xl list`, without domain 0."""
        lines = self.ok("xl list").splitlines()[2:]
        return [line.split()[4] for line in lines]

    def until(self, condition: Callable[[], Any], what: str) -> None:
        end = time.monotonic() + 8 * LONG
        while not condition():
            assert time.monotonic() < end, f"{what}; insulad says:\n{self.ok('tail -n 20 /var/log/insulad.log')}"
            time.sleep(1)


@pytest.fixture(scope="module")
def cloud(domain0: Domain0) -> Cloud:
    made = Cloud(domain0)
    made.ok(SETUP)
    made.start()
    # Xen's tools give up after 40 seconds, in which an emulated processor has to have nothing else to do: what guests
    # share is made before, and insulad has looked at everything
    made.run("insula run --vm --rm busybox true")
    made.until(lambda: json.loads(made.ok("insula --json status"))["reconciling"] == 0, "insulad has looked at all")
    return made


def test_a_program_of_an_image_runs_in_a_guest_of_xen_and_nothing_is_left(cloud: Cloud) -> None:
    script = "cat /sys/hypervisor/type /sys/hypervisor/guest_type; uname -r; exit 7"
    done = cloud.run(f"insula run --vm --rm busybox sh -c '{script}'")
    assert done.status == 7, done.out
    kind, how, release = done.out.split()[-3:]
    assert (kind, how) == ("xen", "PV") and release.endswith("-cloud-amd64")
    assert release != cloud.ok("uname -r")
    assert cloud.guests() == [] and cloud.ok("losetup -a") == ""
    assert not [name for name in cloud.ok("ls /sys/class/net").split() if name.startswith("vif")]


def test_doctor_and_explain_say_what_it_is(cloud: Cloud) -> None:
    found = {each["name"]: each for each in json.loads(cloud.run("insula --json doctor").out)}
    assert found["hypervisor"]["state"] == found["virtual machines"]["state"] == "ok"
    assert "Xen 4.17." in found["hypervisor"]["detail"] and "type 1" in found["virtual machines"]["detail"]


def test_it_is_an_instance_like_others(cloud: Cloud) -> None:
    for tenant in ("default", "globex"):
        cloud.run(f"insula tenant create {tenant}")
        cloud.ok(f"insula -T {tenant} network create net --subnet 10.9.0.0/24")
        cloud.ok(f"insula -T {tenant} run -d --name peer --network net --ip {PEER} busybox sleep 99999")
    cloud.ok(
        f"insula run -d --vm --name vm --network net --ip {ADDRESS} busybox sh -c 'echo started; exec sleep 99999'"
    )
    cloud.until(lambda: "started" in cloud.ok("insula logs vm"), "its program runs")
    assert cloud.guests() in (["r-----"], ["-b----"])
    done = cloud.run("insula exec vm sh -c 'echo in; exit 5'")
    assert (done.status, done.out) == (5, "in\n")
    seen = cloud.ok(
        "head -c 300000 /dev/urandom >/tmp/data; sha256sum </tmp/data; insula exec -i vm sha256sum </tmp/data"
    )
    assert len({*seen.splitlines()}) == 1, "every byte arrives over the console"
    assert json.loads(cloud.ok("insula --json explain vm"))["security"]["processors"].startswith("Xen gives them")


def pings(cloud: Cloud, tenant: str, instance: str, address: str) -> bool:
    return cloud.run(f"insula -T {tenant} exec {instance} ping -c 3 -W 5 {address}").status == 0


def test_its_network_is_that_of_its_tenant_alone(cloud: Cloud) -> None:
    assert pings(cloud, "default", "peer", ADDRESS)
    assert pings(cloud, "default", "vm", PEER)
    assert pings(cloud, "globex", "peer", PEER), "the control: it reaches its own network"
    assert not pings(cloud, "globex", "peer", ADDRESS)
    report = json.loads(cloud.run("insula --json verify").out)  # domain 0 has no network, which is a finding
    assert report["drift"] == [] and any("default/vm" in (each["source"], each["target"]) for each in report["matrix"])
    assert all("should reach outside" in str(each) for each in report["findings"]), report["findings"]


def test_it_stands_still_while_it_is_paused(cloud: Cloud) -> None:
    cloud.ok("insula pause vm")
    assert cloud.guests() == ["--p---"]
    assert not pings(cloud, "default", "peer", ADDRESS)
    cloud.ok("insula unpause vm")
    cloud.until(lambda: pings(cloud, "default", "peer", ADDRESS), "it goes on")
    assert cloud.ok("insula exec vm echo here") == "here"


def test_it_goes_on_when_insulad_is_killed_and_the_next_one_adopts_it(cloud: Cloud) -> None:
    cloud.ok("insula exec vm sh -c 'echo kept >/kept; sync'")
    before = cloud.ok("insula exec vm cat /proc/sys/kernel/random/boot_id")
    cloud.ok("kill -9 $(cat /run/insulad.test)")
    cloud.start()
    assert cloud.ok("insula exec vm cat /proc/sys/kernel/random/boot_id") == before
    assert pings(cloud, "default", "peer", ADDRESS)


def test_its_disk_is_kept_while_it_is_stopped(cloud: Cloud) -> None:
    cloud.ok("insula stop -t 5 vm")
    assert cloud.guests() == []
    cloud.ok("insula start vm")
    cloud.until(lambda: cloud.run("insula exec vm cat /kept").out == "kept\n", "it has what was written before")


def test_what_it_has_not_is_refused_with_one_line(cloud: Cloud) -> None:
    for verb in ("snapshot create vm now", "fork vm"):
        done = cloud.run(f"insula {verb}")
        assert done.status != 0 and done.out.startswith("error: ") and done.out.count("\n") == 1, done.out


def test_nothing_is_left_of_one_that_is_removed_or_whose_container_is_gone(cloud: Cloud) -> None:
    cloud.ok("insula rm -f vm")
    assert cloud.guests() == [] and cloud.ok("losetup -a") == ""
    cloud.ok("insula run -d --vm --name lost busybox sleep 99999")
    assert len(cloud.guests()) == 1
    cloud.ok("kill -9 $(cat /run/insulad.test)")
    cloud.ok("kill -9 $(pgrep -f -x '/usr/bin/python3.11 -ISB /shim')")
    assert len(cloud.guests()) == 1, "nobody is there to turn it off"
    cloud.start()
    cloud.until(lambda: cloud.guests() == [], "the next insulad has turned it off")
