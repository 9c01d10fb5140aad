"""A tenant's own instances reach what it offers to the outside: from any of its networks, and from itself."""

from __future__ import annotations

from insula.model.objects import PublishedPort
from insula.network.intent import BalancerIntent, BalancerListener, FloatingIntent, OutsideIntent
from tests.support.external import answers, asks, forward, tells
from tests.support.lab import Instance, Lab, World, isolated, two_tenants

SHORT = 0.3
NEAR, NEAR6 = "203.0.113.77", "2001:470::77"  # attached to web
SHARED, SHARED6 = "203.0.113.78", "2001:470::78"  # of the load balancer
VIP, VIP6 = "10.0.0.200", "fd00::200"
PUBLISHED, BALANCED = 8080, 90


def offer(lab: Lab) -> None:
    """web by published ports, floating addresses and a load balancer, over TCP and UDP."""
    web = lab.instances["acme", "web"].port
    assert web.address6
    external = [None, SHARED, SHARED6]
    listeners = [BalancerListener(address=a, port=BALANCED, protocol=p) for a in external for p in ("tcp", "udp")]
    listeners += [
        BalancerListener(address=a, port=BALANCED, protocol=p, network="net")
        for a in (VIP, VIP6)
        for p in ("tcp", "udp")
    ]
    floating = [FloatingIntent(address=NEAR, target=web.address), FloatingIntent(address=NEAR6, target=web.address6)]
    floating += [FloatingIntent(address=each) for each in (SHARED, SHARED6)]
    backends = [(each, 80) for each in (web.address, web.address6)]
    published = [PublishedPort(port=PUBLISHED, target=80, protocol=p) for p in ("tcp", "udp")]
    outside = OutsideIntent(
        forwards=[forward(lab, "acme", "web", each) for each in published],
        floating=floating,
        balancers=[BalancerIntent(index=7, listeners=listeners, backends=backends)],
    )
    lab.apply("acme", outside=outside)


def both(caller: Instance, address: str, port: int, timeout: float) -> tuple[str, str]:
    return answers(caller.netns, address, port, timeout), asks(caller.netns, address, port, timeout)


@isolated
def test_hairpin() -> None:
    """From the same network, from one that no router joins with it, from one that a router does, and from itself."""
    World()
    with two_tenants() as lab:
        for name, number in (("apart", 1), ("joined", 2)):
            lab.network("acme", f"10.{number}.0.0/24", f"fd0{number}::/64", name=name)
            lab.instance("acme", name, name)
        lab.router("acme", "net", "joined")
        web, db, apart, joined = (lab.instances["acme", each] for each in ("web", "db", "apart", "joined"))
        for udp in (False, True):
            tells(web, 80, udp=udp)
        offer(lab)
        places = [(each, PUBLISHED) for each in (World.HOST, World.HOST6)]
        places += [(each, BALANCED) for each in (World.HOST, World.HOST6, SHARED, SHARED6, VIP, VIP6)]
        places += [(each, 80) for each in (NEAR, NEAR6)]
        for caller in (db, joined, apart, web):
            for address, port in places:
                own = caller.port.address6 if ":" in address else caller.port.address
                seen = {web: "fd00::1" if ":" in address else "10.0.0.1"}.get(caller, own)
                internal = caller is apart and address in (VIP, VIP6)
                found = both(caller, address, port, SHORT if internal else 5.0)
                wanted = ("", "") if internal else (seen, seen)
                assert found == wanted, f"{caller.port.instance} to {address}:{port}"
