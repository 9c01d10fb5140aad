"""A client, a router with the rules of egress by name, and an internet, for tests of `insula.network.names`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.netns import OWN, call_in, call_in_new
from insula.kernel.nftables import Nft
from insula.model.objects import Tenant
from insula.network.linux import name_rules, sysctl
from insula.network.linux.gates import NameGates
from insula.network.linux.host_rules import FIRST_DNS_PORT
from insula.network.names.rules import ClientRules, EgressRules, NameRule
from tests.support.internet import DNS4, DNS6, NameServer

CLIENT4, CLIENT6, GATEWAY4, GATEWAY6 = "10.0.0.2", "fd00::2", "10.0.0.1", "fd00::1"
_OTHERS = ("198.41.0.4/31", "2001:500::1/127", "198.41.0.5/31", "2001:500::/127")
SITES = [f"93.184.216.{n}" for n in range(1, 101)] + [f"2606:2800::{n:x}" for n in range(1, 101)]
_CHAINS = """
table inet t {
    chain grant { meta priority set 0xffff0001; }
    chain input {
        type filter hook input priority 0; policy drop;
        iifname "lo" accept
        ct state established,related accept
        TO_GATE
        meta l4proto { tcp, udp } th dport 53 accept
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
    }
    chain forward {
        type filter hook forward priority 0; policy drop;
        ct state established,related accept
        jump by_name
        meta priority 0xffff0001 accept
        ip saddr @open4 accept
        reject with icmpx admin-prohibited
    }
    set open4 { type ipv4_addr; }
    set bridges { type ifname; elements = { "br1" }; }
    SETS
    set queries4 { type ipv4_addr; size 65535; flags dynamic; }
    set queries6 { type ipv6_addr; size 65535; flags dynamic; }
    NAMES
}
"""


def link(near: int, far: int, names: tuple[str, str], addresses: tuple[Sequence[str], Sequence[str]]) -> None:
    """Join two namespaces by a veth pair."""
    with call_in(near, Rtnl) as one, call_in(far, Rtnl) as other:
        one.execute(netlink.veth(names[0], names[1], far, mtu=1500))
        for rtnl, name, own in ((one, names[0], addresses[0]), (other, names[1], addresses[1])):
            index = rtnl.index(name)
            assert index is not None
            rtnl.execute(
                netlink.set_link(1, up=True),
                netlink.set_link(index, up=True),
                *(netlink.add_address(index, each) for each in own),
            )
        one.sync_carrier(names[0])
        other.sync_carrier(names[1])


def route(netns: int, device: str, *gateways: str) -> None:
    with call_in(netns, Rtnl) as rtnl:
        index = rtnl.index(device)
        assert index is not None
        for gateway in gateways:
            everything = "::/0" if ":" in gateway else "0.0.0.0/0"
            rtnl.execute(netlink.add_route(everything, index=index, gateway=gateway))


class NamesWorld:
    """The namespaces `client`, `router` and `internet`, and the gate of the tenant in the router's."""

    def __init__(self, run: Path = Path("/run"), *, served: bool = True) -> None:
        """`run` is a directory for the gate's files. Without `served` no name server runs yet."""
        self.run = run
        self.client, self.router, self.internet = (
            call_in_new(lambda: os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)) for _ in range(3)
        )
        for netns in (self.router, self.internet):
            call_in(netns, lambda: sysctl.write({"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}))
        inside = [f"{GATEWAY4}/24", f"{GATEWAY6}/64"]
        link(self.client, self.router, ("eth0", "br1"), ([f"{CLIENT4}/24", f"{CLIENT6}/64"], inside))
        link(self.router, self.internet, ("uplink", "up"), (_OTHERS[:2], [*_OTHERS[2:3], "2001:500::/127"]))
        route(self.client, "eth0", GATEWAY4, GATEWAY6)
        route(self.router, "uplink", "198.41.0.5", "2001:500::")
        route(self.internet, "up", "198.41.0.4", "2001:500::1")
        with call_in(self.internet, Rtnl) as rtnl:
            lengths = ((each, 128 if ":" in each else 32) for each in (DNS4, DNS6, *SITES))
            rtnl.execute(*(netlink.add_address(1, f"{each}/{length}") for each, length in lengths))
        with call_in(self.router, Nft) as nft:
            nft.run(
                _CHAINS.replace("TO_GATE", name_rules.TO_GATE)
                .replace("NAMES", name_rules.chains("limit rate over 400/second burst 400 packets"))
                .replace("SETS", name_rules.sets())
            )
            nft.run(
                'table inet t { chain nat { type nat hook postrouting priority 100; oifname "uplink" masquerade; }; }'
            )
        self.nft = call_in(self.router, Nft)
        self.nftables = call_in(self.router, NftablesSocket)
        if served:
            self.server = NameServer(self.internet, port=FIRST_DNS_PORT)
            self.own = NameServer(self.router, (GATEWAY4, GATEWAY6))
        self.tenant = Tenant(name="acme", index=7, id_base=7 << 16, created=0.0)
        self.gates = NameGates(run / "gates", "t")
        self.rules = EgressRules()

    def allow(self, *rules: NameRule, addresses: Sequence[str] = (CLIENT4, CLIENT6)) -> None:
        """Put the client's rules in force."""
        clients = {"web": ClientRules(tuple(addresses), rules)} if rules else {}
        self.apply(
            EgressRules(
                clients,
                servers=((DNS4, FIRST_DNS_PORT), (DNS6, FIRST_DNS_PORT)),
                own_servers=((GATEWAY4, 53),),
                own=("10.0.0.0/24", "fd00::/64"),
            )
        )

    def apply(self, rules: EgressRules) -> None:
        """Put rules in force, and have the queries of the instances in them redirected."""
        self.rules = rules
        self.gates.apply(self.tenant, self.router, rules)
        named = {6: [], 4: []}  # type: dict[int, list[str]]
        for address in rules.by_address:
            named[6 if ":" in address else 4].append(address)
        for version, some in named.items():
            self.nft.run(f"flush set inet t named{version}\n")
            if some:
                self.nft.run(f"add element inet t named{version} {{ {', '.join(some)} }}\n")

    def leased(self, name: str = "leases4") -> list[bytes]:
        """The keys in one of the sets."""
        return self.nftables.keys("inet", "t", name)

    def pids(self) -> list[int]:
        """The supervisor, the lessor and the gate, in this order."""
        supervisor = int((self.run / "gates/acme/pid").read_text())
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        return [supervisor, *sorted(map(int, children))]


def https(pattern: str, *ports: int) -> NameRule:
    """A rule about TCP ports of a name, 443 unless others are given."""
    return NameRule(pattern, "tcp", ports or (443,))
