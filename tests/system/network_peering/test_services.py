"""Service endpoints on the fabric: two tenants with the same addresses, and one port of one instance between them."""

from __future__ import annotations

import os
import socket

import pytest

from insula.network.intent import ConsumedService, PeeringIntent, ProvidedService
from insula.network.linux.state import addresses
from tests.support.lab import SOON, Instance, Lab, isolated
from tests.system.network_peering.world import INDEX, TCP80

SHORT = 0.3
HERE = ["10.0.0.50", "fd00::50"]


def overlapping() -> Lab:
    """acme with web and db, globex with app and db, all on 10.0.0.0/24 and fd00::/64; db is .9 in both."""
    cloud = Lab()
    for tenant, names in (("acme", ("web", "db")), ("globex", ("app", "db"))):
        cloud.tenant(tenant)
        cloud.network(tenant, subnet6="fd00::/64")
        for number, name in enumerate(names):
            cloud.instance(tenant, name, "net", 2 + 7 * number)
    return cloud


def serve(cloud: Lab, *, there: bool = True) -> None:
    """globex consumes port 80 of acme's db at 10.0.0.50; without `there` the endpoint is removed."""
    target = addresses(cloud.instances["acme", "db"].port)
    for tenant, peer in (("acme", "globex"), ("globex", "acme")):
        consumed = ConsumedService(number=3, network="net", addresses=HERE, protocol="tcp", port=80)
        provided = ProvidedService(number=3, addresses=target, protocol="tcp", port=80)
        peering = PeeringIntent(
            index=INDEX,
            name=f"{peer}/services",
            peer=cloud.tenants[peer],
            networks=["net"],
            allow=[TCP80] if tenant == "acme" else [],
            others=[cloud.networks[peer, "net"]],
            routed=False,
            consumes=[consumed] if there and tenant == "globex" else [],
            provides=[provided] if there and tenant == "acme" else [],
        )
        cloud.others[tenant] = {"peerings": [peering]}
        cloud.apply(tenant)


def talk(client: Instance, address: str, port: int = 80, timeout: float = SOON) -> str:
    return client.connects(address, port, timeout)


@isolated
def test_an_endpoint_is_one_port_of_the_providers_instance() -> None:
    cloud = overlapping()
    app, own = cloud.instances["globex", "app"], cloud.instances["globex", "db"]
    for (tenant, name), instance in cloud.instances.items():
        for port in (80, 81):
            instance.serves(f"{tenant}'s {name} {port}", port)
    serve(cloud)
    for client in (app, own):
        for address in HERE:
            assert talk(client, address) == "acme's db 80"
            assert talk(client, address, 81, SHORT) == ""
            assert client.pings(address), "its own router answers"
    for address in ("10.0.0.9", "fd00::9"):
        assert talk(app, address) == "globex's db 80", "the same address is its own"
    for tenant in ("acme", "globex"):
        assert cloud.fabric.installed(cloud.tenants[tenant]).drift == []
    web = cloud.instances["acme", "web"]
    for address in (*HERE, "240.0.7.3", "240.0.7.2"):
        assert talk(web, address, timeout=SHORT) == "", "the provider has no way to the consumer"
        assert not web.pings(address, SHORT)
    assert talk(app, "240.0.7.4", timeout=SHORT) == "", "a transit address of no service"


@isolated
def test_the_provider_sees_a_transit_address_and_no_address_of_the_consumer() -> None:
    cloud = overlapping()
    app, db = cloud.instances["globex", "app"], cloud.instances["acme", "db"]
    serve(cloud)
    for family, address in ((socket.AF_INET, HERE[0]), (socket.AF_INET6, HERE[1])):
        with db.socket(family, socket.SOCK_STREAM) as server, app.socket(family, socket.SOCK_STREAM) as client:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", 80))
            server.listen()
            server.settimeout(SOON)
            client.settimeout(SOON)
            client.connect((address, 80))
            connection, sender = server.accept()
            assert sender[0] in ("240.0.7.2", "fd69:6e73:756c:6100:8000::702")
            word = os.urandom(8)
            client.send(word)
            assert connection.recv(8) == word
            connection.close()


@pytest.mark.parametrize("ends", ["endpoint", "provider", "consumer"])
@isolated
def test_when_it_ends_open_connections_do(ends: str) -> None:
    cloud = overlapping()
    app, db = cloud.instances["globex", "app"], cloud.instances["acme", "db"]
    serve(cloud)
    kind = socket.AF_INET, socket.SOCK_STREAM
    with db.socket(*kind) as server, app.socket(*kind) as client:
        server.bind(("", 80))
        server.listen()
        server.settimeout(SOON)
        client.settimeout(SOON)
        client.connect((HERE[0], 80))
        connection, _ = server.accept()
        connection.settimeout(SOON)
        client.send(b"before")
        assert connection.recv(100) == b"before"
        if ends == "endpoint":
            serve(cloud, there=False)
        else:
            cloud.apply("acme" if ends == "provider" else "globex", peerings=[])
        client.send(b"after")
        connection.settimeout(SHORT)
        with pytest.raises(TimeoutError):
            connection.recv(100)
    if ends == "endpoint":
        for tenant in ("acme", "globex"):
            assert cloud.fabric.installed(cloud.tenants[tenant]).drift == []
        assert talk(app, HERE[0], timeout=SHORT) == "" and not app.pings(HERE[0], SHORT)
