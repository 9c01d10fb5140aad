"""The topology of a tenant: its networks with what is on them, and what joins them, from the lists of the API."""

from __future__ import annotations

from insula.model.errors import Denied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from insula.client import Client

    Object = dict[str, Any]


def collect(client: Client, tenant: str) -> Object:
    """Return the topology as JSON. What the user may not read is left out, except for the networks.

    `networks` have `ports`, `endpoints` and `peers`; a port has the names of `policies` that select its instance, each
    with its directions, and `published`, the ports of the host that lead to it.
    """
    networks = [view["network"] for view in client.networks.list(tenant)]
    routers = [view["router"] for view in _allowed(client.routers.list, tenant)]
    instances = _allowed(client.instances.list, tenant)
    policies = _allowed(client.policies.list, tenant)
    endpoints = _allowed(client.endpoints.list, tenant)
    peerings = _allowed(client.peerings.list, tenant)
    joined = {name: router["name"] for router in routers for name in router["networks"]}
    return {
        "tenant": tenant,
        "routers": [{name: router[name] for name in ("name", "networks", "routes")} for router in routers],
        "networks": [
            {
                **{
                    name: network.get(name) for name in ("name", "subnet", "subnet6", "gateway", "gateway6", "outbound")
                },
                "router": joined.get(network["name"]),
                "ports": [port for view in instances for port in _ports(view, network["name"], policies)],
                "endpoints": [_endpoint(each) for each in endpoints if each["network"] == network["name"]],
                "peers": [_peer(view) for view in peerings if network["name"] in view["networks"]],
            }
            for network in networks
        ],
        "policies": [
            {**{name: view["policy"][name] for name in ("name", "directions", "audit")}, "selects": view["selects"]}
            for view in policies
        ],
    }


def _allowed(listed: Callable[[str], Sequence[Object]], tenant: str) -> Sequence[Object]:
    try:
        return listed(tenant)
    except Denied:
        return []


def _ports(view: Object, network: str, policies: Sequence[Object]) -> list[Object]:
    """Return the instance's ports on a network."""
    instance = view["instance"]
    selecting = [each["policy"] for each in policies if instance["name"] in each["selects"]]
    found = []
    for number, port in enumerate(instance["ports"]):
        if port["network"] != network or port["wanted"] != "plugged":
            continue
        found.append(
            {
                **{name: port.get(name) for name in ("instance", "interface", "address", "address6")},
                "state": view["status"]["state"],
                "policies": [{name: each[name] for name in ("name", "directions", "audit")} for each in selecting],
                "published": [_published(each) for each in instance["spec"]["published"]] if number == 0 else [],
            }
        )
    return found


def _published(port: Object) -> str:
    """Return a published port, as in 203.0.113.1:8080-8089/tcp → 80-89."""
    first, last = (_range(port[name], port["count"]) for name in ("port", "target"))
    address = port["address"] or "*"
    return f"{f'[{address}]' if ':' in address else address}:{first}/{port['protocol']} → {last}"


def _range(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def _endpoint(endpoint: Object) -> Object:
    leads = f"{endpoint['peer']}/{endpoint['instance']} {endpoint['protocol']}/{endpoint['port']}"
    return {"name": endpoint["name"], "address": endpoint["address"], "leads_to": leads}


def _peer(view: Object) -> Object:
    beyond = [network["name"] for network in view["peer_networks"]]
    return {"peer": view["peer"], "name": view["name"], "state": view["state"], "networks": beyond}


def policy_text(policy: Object) -> str:
    """Return a policy at an instance, as in db (in)."""
    return f"{policy['name']} ({','.join(policy['directions'])}{', audit' if policy['audit'] else ''})"


def peer_text(peer: Object) -> str:
    """Return a peering, as in globex (active): front, back."""
    name = peer["peer"] if peer["name"] == "peering" else f"{peer['peer']}/{peer['name']}"
    networks = ", ".join(peer["networks"])
    return f"{name} ({peer['state']}){f': {networks}' if networks else ''}"
