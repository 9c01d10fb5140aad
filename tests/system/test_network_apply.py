"""`apply` of a tenant's intent: unchanged it changes nothing, a change touches only its part, damage is repaired."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from insula.kernel import netlink, syscalls
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.model.objects import Network
from insula.network.linux import naming, sysctl
from insula.network.proof import reachability
from tests.support.lab import Instance, Lab, isolated, two_tenants
from tests.support.wait import until

Seen = dict[str, object]
OF_PACKETS = (
    "connections",
    "fragments",
    "leaving",
    "queries",
    "resolving",
    "storms",
    "visiting",
)  # sets whose elements packets add


def seen(cloud: Lab, tenant: str) -> Seen:
    """Each thing in a tenant's namespace by a name of its own: devices, addresses, neighbours, rules with handles.

    Not the link-local addresses: the kernel makes them some time after a device has got a carrier.
    """

    def look() -> Seen:
        with Rtnl() as rtnl:
            links = {link.index: link for link in rtnl.links()}
            found: Seen = {f"link {link.name}": link for link in links.values()}
            for address in rtnl.addresses():
                if not address.link_local:
                    found[f"address {address.address} of {links[address.index].name}"] = address
            for family in (socket.AF_INET, socket.AF_INET6, socket.AF_BRIDGE):
                for entry in rtnl.neighbours(family):
                    if entry.permanent and not int(entry.mac[:2] or "0", 16) & 1:  # groups are the kernel's affair
                        found[f"neighbour {entry.address} {entry.mac} of {links[entry.index].name}"] = entry
        listed = subprocess.run(["nft", "-a", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
        listed = re.sub(r"counter packets \d+ bytes \d+", "counter", listed)
        place, sets = "", re.compile(r"elements = \{(.*?)\}", re.S)
        lines = sets.sub("", listed).splitlines()
        for number, line in enumerate(line for line in lines if line.strip()):  # only sets with elements have the line
            place = line.strip() if line.strip().startswith("table") else place
            found[f"rule {number} in {place}"] = line
        for table, name, elements in _sets(listed):
            for element in () if name.startswith(OF_PACKETS) else elements:
                found[f"element {element} in {table} {name}"] = element
        return found

    netns = cloud.inside(tenant)
    try:
        return call_in(netns, look)
    finally:
        os.close(netns)


def _sets(listed: str) -> list[tuple[str, str, list[str]]]:
    found, table, name = [], "", ""
    for line in re.sub(r"\{(\s*[^{}]*?)\}", lambda m: "{" + " ".join(m[1].split()) + "}", listed).splitlines():
        words = line.split()
        if words[:1] == ["table"]:
            table = words[1]
        elif words[:1] in (["set"], ["map"]):
            name = words[1]
        elif words[:1] == ["elements"]:
            found.append((table, name, [e.strip() for e in line.partition("{")[2].rstrip("} ").split(",")]))
    return found


def generation(cloud: Lab, tenant: str) -> int:
    """How many transactions nftables has seen in a tenant's namespace (NFT_MSG_GETGEN)."""

    def ask() -> int:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as sock:
            sock.sendto(struct.pack("=IHHIIBBH", 20, 10 << 8 | 16, 1, 1, 0, 0, 0, 0), (0, 0))
            answer = sock.recv(4096)
            return int(struct.unpack_from("!I", answer, 24)[0])

    netns = cloud.inside(tenant)
    try:
        return call_in(netns, ask)
    finally:
        os.close(netns)


OF_ALL = r" in inet (judged|epoch|unknown|ranges[46]|subjects[46]|peers[46])$"
"""Sets whose elements name no device: what is taken back begins a new epoch, which no open connection notices; and
addresses have classes (network_policy/test_compiler.py)."""


def differing(before: Seen, after: Seen) -> set[str]:
    """The names of what came, went or changed."""
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


@isolated
def test_the_same_intent_again_changes_nothing() -> None:
    with two_tenants() as cloud:
        before, count = seen(cloud, "acme"), generation(cloud, "acme")
        assert any(name.startswith("element p1") or '"p1"' in name for name in before), "the control: it sees elements"
        pid = (cloud.run / "dns/acme/pid").read_text()
        for _ in range(2):
            cloud.apply("acme")
        assert differing(before, seen(cloud, "acme")) == set()
        assert generation(cloud, "acme") == count, "nftables was told nothing"
        assert (cloud.run / "dns/acme/pid").read_text() == pid
        cloud.network("acme", "10.9.0.0/24", name="more")
        assert generation(cloud, "acme") == count + 1, "the control: one transaction"
        assert differing(before, seen(cloud, "acme"))


@isolated
def test_a_changed_intent_touches_only_changed_parts() -> None:
    with two_tenants() as cloud:
        other = seen(cloud, "globex")
        steps: list[tuple[Callable[[], object], str]] = [
            (lambda: cloud.network("acme", "10.9.0.0/24", "fd09::/64", name="more"), r"\bbr3\b"),
            (lambda: cloud.instance("acme", "new", "more"), r"\b(p5|br3)\b"),
            (lambda: cloud.apply("acme", ports=cloud.intent("acme").ports[:2]), r"\b(p5|br3)\b"),
            (lambda: cloud.apply("acme", networks=cloud.intent("acme").networks[:1]), r"\b(p5|br3)\b"),
            (lambda: cloud.apply("acme", ports=cloud.intent("acme").ports[:1]), r"\b(p2|p5|br3|10\.0\.0\.3|fd00::3)\b"),
        ]
        for number, (step, touched) in enumerate(steps):
            before = seen(cloud, "acme")
            step()
            changed = {name for name in differing(before, seen(cloud, "acme")) if not re.search(OF_ALL, name)}
            assert changed, f"step {number}: the control"
            assert [name for name in changed if not re.search(touched, name)] == [], f"step {number}"
            assert seen(cloud, "globex") == other
        assert cloud.instances["acme", "web"].pings("10.0.0.1") and cloud.instances["acme", "web"].pings("fd00::1")
        assert not cloud.instances["acme", "db"].pings("10.0.0.1", 0.3)


def damages(cloud: Lab) -> dict[str, Callable[[], object]]:
    """Kinds of damage to the tenant acme, by name. It has two instances on a network of both families."""
    inside, web = cloud.inside("acme"), cloud.instances["acme", "web"].port
    rtnl = call_in(inside, Rtnl)
    on, index = naming.bridge_index(1), naming.port_index(web.index)

    def run(command: str) -> None:
        call_in(inside, lambda: subprocess.run(command.split(), check=True))

    def uplink() -> int:
        link = rtnl.link(naming.UPLINK)
        assert link
        return link.index

    def killed() -> None:
        os.kill(int((cloud.run / "dns/acme/pid").read_text()), signal.SIGKILL)
        tenant = cloud.tenants["acme"]
        until(lambda: "the resolver does not run" in cloud.fabric.installed(tenant).drift, "it is gone")

    def other_device() -> None:
        rtnl.execute(netlink.delete_link(index=on))
        run("ip link add br1 type veth peer name other")

    def no_names() -> None:
        for path in (cloud.run / "dns/acme/hosts").iterdir():
            path.unlink()

    return {
        "bridge gone": lambda: rtnl.execute(netlink.delete_link(index=on)),
        "bridge down": lambda: rtnl.execute(netlink.set_link(on, up=False)),
        "bridge with another MAC address": lambda: rtnl.execute(netlink.set_link(on, mac="02:01:00:00:00:99")),
        "bridge without IPv6": lambda: call_in(inside, lambda: sysctl.write({"ipv6/conf/br1/disable_ipv6": "1"})),
        "gateway gone": lambda: rtnl.execute(netlink.delete_address(on, "10.0.0.1/24")),
        "gateway of IPv6 gone": lambda: rtnl.execute(netlink.delete_address(on, "fd00::1/64")),
        "one gateway more": lambda: rtnl.execute(netlink.add_address(on, "10.0.0.99/24")),
        "another device in the bridge's place": other_device,
        "uplink gone": lambda: rtnl.execute(netlink.delete_link(name=naming.UPLINK)),
        "uplink down": lambda: rtnl.execute(netlink.set_link(uplink(), up=False)),
        "address of the uplink gone": lambda: rtnl.execute(netlink.delete_address(uplink(), "100.64.0.3/31")),
        "one address of the uplink more": lambda: rtnl.execute(netlink.add_address(uplink(), "100.64.9.9/31")),
        "port off its bridge": lambda: rtnl.execute(netlink.set_link(index, master=0)),
        "port down": lambda: rtnl.execute(netlink.set_link(index, up=False)),
        "port that learns": lambda: rtnl.execute(netlink.set_bridge_port(index, learning=True, flood=True)),
        "forwarding entry gone": lambda: run(f"bridge fdb del {web.mac} dev p1 master"),
        "neighbour gone": lambda: rtnl.execute(netlink.delete_neighbour(on, "10.0.0.2")),
        "neighbour with another's MAC address": lambda: rtnl.execute(
            netlink.add_neighbour(on, "fd00::2", cloud.instances["acme", "db"].port.mac)
        ),
        "table gone": lambda: run("nft delete table bridge lab"),
        "all tables gone": lambda: run("nft flush ruleset"),
        "rules gone": lambda: run("nft flush chain inet lab input"),
        "a rule more": lambda: run("nft insert rule inet lab forward drop"),
        "all elements gone": lambda: run("nft flush set bridge lab ipv6"),
        "an element gone": lambda: run(f"nft delete element bridge lab macs {{ p1 . {web.mac} }}"),
        "an element more": lambda: run("nft add element bridge lab ipv4 { p1 . 02:10:00:00:00:09 . 10.0.0.9 }"),
        "elements of nobody": lambda: run("nft add element inet lab paths { br1 . br7 }"),
        "epoch gone": lambda: run("nft flush set inet lab judged"),
        "epochs of two kinds": lambda: run("nft add element inet lab judged { 7 }"),
        "a network of nobody": lambda: rtnl.execute(
            netlink.bridge("br7", index=naming.bridge_index(7), mac="02:01:00:00:00:07", mtu=1500)
        ),
        "router's settings": lambda: call_in(inside, lambda: sysctl.write({"ipv4/ip_forward": "0"})),
        "resolver dead": killed,
        "names gone": no_names,
    }


def works(cloud: Lab) -> list[str]:
    """The parts of the tenant acme that don't work."""
    web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
    tests: dict[str, Callable[[], bool]] = {
        f"{name} pings {address}": lambda one=one, address=address: one.pings(address)  # type: ignore[misc]
        for name, one, address in (
            ("web", web, "10.0.0.3"),
            ("db", db, "fd00::2"),
            ("web", web, "10.0.0.1"),
            ("db", db, "fd00::1"),
        )
    }
    hosts = cloud.run / "dns/acme/hosts"
    lines = "".join(path.read_text() for path in hosts.iterdir())
    failed = [text for text, test in tests.items() if not test()]
    return failed + [f"no name {name}" for name in ("web", "db") if f" {name} " not in lines]


@isolated
def test_any_damage_is_repaired_and_nothing_else_is_touched() -> None:
    """Each damage is one that the test sees: as drift, as what is not wanted, or as what doesn't work."""
    with two_tenants() as cloud:
        tenant = cloud.tenants["acme"]
        intent = cloud.intent("acme")

        def wrong() -> list[str]:
            found = cloud.fabric.installed(tenant)
            return [*found.drift, *reachability.differences(found, intent.networks, intent.ports)]

        before = _without_neighbours_in_doubt(seen(cloud, "acme"))
        assert wrong() == [] and works(cloud) == []
        for name, damage in damages(cloud).items():
            damage()
            damaged = _without_neighbours_in_doubt(seen(cloud, "acme"))
            silent = name in ("router's settings", "resolver dead", "names gone", "bridge without IPv6")
            assert silent or differing(before, damaged), f"{name}: the control"
            assert wrong() or works(cloud) or differing(before, damaged), f"{name}: the control"
            cloud.apply("acme")
            assert wrong() == [], name
            assert works(cloud) == [], name
            again = seen(cloud, "acme")
            cloud.apply("acme")
            assert differing(again, seen(cloud, "acme")) == set(), f"{name}: once is enough"


def _without_neighbours_in_doubt(found: Seen) -> Seen:
    """Without the entries of bridges' own addresses, which the kernel makes and takes by itself."""
    return {name: each for name, each in found.items() if not name.startswith("neighbour None")}


@isolated
def test_a_namespace_that_is_gone_is_made_again_and_what_was_in_it_is_plugged_in_again() -> None:
    with two_tenants() as cloud:
        syscalls.umount2(cloud.fabric.naming.namespace("acme"), syscalls.MNT_DETACH)
        cloud.fabric.unplug(cloud.tenants["acme"], cloud.networks["acme", "net"], cloud.instances["acme", "web"].port)
        cloud.apply("acme")
        assert cloud.fabric.installed(cloud.tenants["acme"]).ports == []
        for name in ("web", "db"):
            cloud.plug(cloud.instances["acme", name])
        assert works(cloud) == [] and cloud.fabric.installed(cloud.tenants["acme"]).drift == []


@isolated
def test_one_network_that_fails_does_not_prevent_others() -> None:
    cloud = Lab()
    cloud.tenant("acme")
    good = cloud.network("acme", "10.1.0.0/24")
    bad = cloud.network("acme", "10.2.0.0/24", name="bad")
    cloud.apply("acme", networks=[])
    errors = cloud.fabric.apply(cloud.intent("acme", networks=[_too_small(bad), good]))
    assert set(errors) == {"network bad"} and "bad" in str(errors["network bad"])
    assert [n.index for n in cloud.fabric.installed(cloud.tenants["acme"]).networks if n.up] == [good.index]
    assert cloud.fabric.apply(cloud.intent("acme")) == {}, "the control"
    assert cloud.fabric.installed(cloud.tenants["acme"]).drift == []


def _too_small(network: Network) -> Network:
    return msgspec.structs.replace(network, mtu=67)  # less than an IPv4 packet's least MTU, 68


@isolated
def test_an_incomplete_intent_removes_only_parts_of_an_earlier_one() -> None:
    with two_tenants() as cloud:
        cloud.network("acme", "10.5.0.0/24", name="old")
        whole = cloud.intent("acme")
        inside = cloud.inside("acme")
        with call_in(inside, Rtnl) as rtnl:
            rtnl.execute(netlink.bridge("br7", index=naming.bridge_index(7), mac="02:01:00:00:00:07", mtu=1500))
            cloud.apply("acme", networks=whole.networks[:1], complete=False)
            assert {link.name for link in rtnl.links()} >= {"br1", "br7"}
            assert rtnl.link("br3") is None, "this one was in an intent"
            cloud.apply("acme", networks=whole.networks[:1])
            assert rtnl.link("br7") is None, "the control"


NAMES = st.sampled_from(["a", "b", "c", "d"])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["network", "no network", "plug", "unplug", "forget", "damage", "new fabric"]), NAMES, NAMES
    ),
    max_size=12,
)


@isolated
def test_after_any_intents_the_last_one_is_installed() -> None:
    """Against a model: a set of networks, and of ports that are plugged in."""
    cloud = Lab()
    instances: list[Instance] = []

    # a failing example is short as it is, and making it shorter takes more time than a test has
    @settings(
        max_examples=25,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(STEPS)
    def check(steps: list[tuple[str, str, str]]) -> None:
        model = Model(cloud, instances)
        for step in steps:
            model.do(*step)
        model.check()
        model.end()

    check()


class Model:
    """The desired state of the tenant, while the lab changes it."""

    def __init__(self, cloud: Lab, instances: list[Instance]) -> None:
        self.cloud = cloud
        self.spare = instances
        self.plugged: set[str] = set()
        cloud.tenants.pop("acme", None)
        cloud.tenant("acme")

    def do(self, what: str, network: str, name: str) -> None:
        cloud, there = self.cloud, [n for (_, n) in self.cloud.networks]
        used = {port.port.network for port in cloud.instances.values()}
        if what == "network" and network not in there:
            number = ord(network) - ord("a") + 1
            cloud.networks.pop(("acme", network), None)
            cloud.network("acme", f"10.{number}.0.0/24", f"fd0{number}::/64" if number % 2 else None, name=network)
        elif what == "no network" and network in there and network not in used:
            del cloud.networks["acme", network]
            cloud.apply("acme")
        elif what == "plug" and network in there and ("acme", name) not in cloud.instances:
            cloud.apply("acme")  # as control does when a bridge that was damaged refuses the port
            cloud.instance("acme", name, network, host=2 + ord(name) - ord("a"))
            self.plugged.add(name)
        elif what == "unplug" and name in self.plugged:
            cloud.unplug(cloud.instances["acme", name])
            self.plugged.discard(name)
        elif what == "forget" and ("acme", name) in cloud.instances:
            cloud.instances.pop(("acme", name)).remove()
            self.plugged.discard(name)
            cloud.apply("acme")
        elif what == "damage":
            with call_in(cloud.inside("acme"), Rtnl) as rtnl:
                for link in rtnl.links():
                    if link.kind == "bridge":
                        rtnl.execute(netlink.delete_link(index=link.index))
        elif what == "new fabric":
            cloud.fabric.close()
            cloud.fabric.open()

    def check(self) -> None:
        self.cloud.apply("acme")
        found = self.cloud.fabric.installed(self.cloud.tenants["acme"])
        intent = self.cloud.intent("acme")
        ports = [port for port in intent.ports if port.instance in self.plugged]
        assert found.drift == []
        assert reachability.differences(found, intent.networks, ports) == []
        assert {port.index for port in found.ports} == {port.index for port in ports}
        before = seen(self.cloud, "acme")
        self.cloud.apply("acme")
        assert differing(before, seen(self.cloud, "acme")) == set()

    def end(self) -> None:
        cloud = self.cloud
        for instance in cloud.instances.values():
            instance.remove()
        cloud.fabric.remove(cloud.tenants["acme"])
        cloud.instances.clear()
        cloud.networks.clear()
        assert not Path("/run/netns/lab-acme").exists()
