"""Published ports of the linux fabric: reached from outside, from the host, and from inside; and by nobody else."""

from __future__ import annotations

from tests.support.external import answers, asks, publish, tells
from tests.support.lab import World, isolated, two_tenants

SHORT = 0.3
HOST, HOST6, CLIENT, CLIENT6 = World.HOST, World.HOST6, World.ADDRESS, World.ADDRESS6


@isolated
def test_a_published_port_is_reached_from_outside_and_sees_its_client() -> None:
    world = World()
    with two_tenants() as lab:
        web, outside = lab.instances["acme", "web"], world.instance.netns
        tells(web, 80)
        tells(web, 81)
        tells(web, 53, udp=True)
        assert answers(outside, HOST, 8080, SHORT) == ""
        publish(lab, "acme", web=["8080:80", "53:53/udp"])
        assert answers(outside, HOST, 8080) == CLIENT
        assert answers(outside, HOST6, 8080) == CLIENT6
        assert asks(outside, HOST, 53) == CLIENT
        assert asks(outside, HOST6, 53) == CLIENT6
        for port in (80, 81, 8081, 53):
            assert answers(outside, HOST, port, SHORT) == "", port
        for address in ("10.0.0.2", "100.64.0.3"):
            assert answers(outside, address, 80, SHORT) == ""
            assert answers(outside, address, 8080, SHORT) == ""
        publish(lab, "acme")
        assert answers(outside, HOST, 8080, SHORT) == "" and answers(outside, HOST6, 8080, SHORT) == ""


@isolated
def test_the_host_itself_reaches_them_also_by_its_loopback_addresses() -> None:
    World()
    with two_tenants() as lab:
        tells(lab.instances["acme", "web"], 80)
        tells(lab.instances["globex", "web"], 80, name="globex")
        publish(lab, "acme", web=["8080:80", "127.0.0.1:8443:80", "[::1]:8444:80"])
        publish(lab, "globex", web="127.0.0.1:8081:80")
        for address in (HOST, HOST6, "127.0.0.1", "::1"):
            assert answers(None, address, 8080), address
        assert answers(None, HOST, 8080) == HOST
        assert answers(None, "127.0.0.1", 8443) and answers(None, "::1", 8444)
        assert answers(None, "127.0.0.1", 8081).startswith("globex")
        for address, port in ((HOST, 8443), ("::1", 8443), (HOST6, 8444), ("127.0.0.1", 8444), (HOST, 8081)):
            assert answers(None, address, port, SHORT) == "", (address, port)


@isolated
def test_loopback_ports_are_not_reached_from_outside_or_by_tenants() -> None:
    world = World()
    with two_tenants() as lab:
        web = lab.instances["acme", "web"]
        tells(web, 80)
        publish(lab, "acme", web=["127.0.0.1:8443:80", "[::1]:8443:80"])
        assert answers(None, "127.0.0.1", 8443) and answers(None, "::1", 8443)
        for netns in (world.instance.netns, lab.instances["globex", "web"].netns, web.netns):
            for address in (HOST, HOST6):
                assert answers(netns, address, 8443, SHORT) == "", address


@isolated
def test_two_addresses_of_the_host_with_the_same_port_lead_to_two_instances() -> None:
    world = World()
    with two_tenants() as lab:
        tells(lab.instances["acme", "web"], 80, name="web")
        tells(lab.instances["acme", "db"], 80, name="db")
        tells(lab.instances["globex", "db"], 80, name="globex")
        world.also("203.0.113.3/24")
        world.also("203.0.113.4/24")
        publish(lab, "acme", web=f"{HOST}:80:80", db="203.0.113.3:80:80")
        publish(lab, "globex", db="203.0.113.4:80:80")
        outside = world.instance.netns
        assert answers(outside, HOST, 80) == f"web {CLIENT}"
        assert answers(outside, "203.0.113.3", 80) == f"db {CLIENT}"
        assert answers(outside, "203.0.113.4", 80) == f"globex {CLIENT}"
        assert answers(outside, HOST6, 80, SHORT) == ""


@isolated
def test_ranges_keep_the_port_or_shift_it() -> None:
    world = World()
    with two_tenants() as lab:
        web, outside = lab.instances["acme", "web"], world.instance.netns
        for port in (20000, 31234, 39999, 1005):
            tells(web, port, name=str(port))
        tells(web, 30500, udp=True, name="udp")
        publish(lab, "acme", web=["20000-39999:20000-39999", "20000-39999:20000-39999/udp", "5000-5010:1000-1010"])
        for port in (20000, 31234, 39999):
            assert answers(outside, HOST, port) == f"{port} {CLIENT}"
            assert answers(outside, HOST6, port) == f"{port} {CLIENT6}"
        assert asks(outside, HOST, 30500) == f"udp {CLIENT}"
        assert answers(outside, HOST, 5005) == f"1005 {CLIENT}"
        assert answers(outside, HOST6, 5005) == f"1005 {CLIENT6}"
        for port in (19999, 40000, 1005):
            assert answers(outside, HOST, port, SHORT) == "", port


@isolated
def test_own_ports_are_reached_from_inside() -> None:
    World()
    with two_tenants() as lab:
        lab.network("acme", "10.1.0.0/24", "fd01::/64", name="back")
        other = lab.instance("acme", "other", "back", 2)
        web, db = lab.instances["acme", "web"], lab.instances["acme", "db"]
        tells(web, 80)
        tells(web, 53, udp=True)
        publish(lab, "acme", web=["8080:80", f"{HOST}:8081:80", "53:53/udp"])
        for address, client, far in ((HOST, db.port.address, "10.1.0.2"), (HOST6, db.port.address6, "fd01::2")):
            assert answers(db.netns, address, 8080) == client, "from the same network"
            assert answers(other.netns, address, 8080) == far, "from another network"
            assert answers(web.netns, address, 8080), "from itself"
            assert asks(db.netns, address, 53) == client
            assert asks(web.netns, address, 53)
        assert answers(db.netns, HOST, 8081) == db.port.address
        assert answers(other.netns, HOST, 8081) == "10.1.0.2"
        assert answers(web.netns, HOST, 8081)
        assert answers(other.netns, "10.0.0.2", 80, SHORT) == "", "a published port is no way between networks"


@isolated
def test_another_tenant_reaches_a_published_port_as_a_stranger() -> None:
    World()
    with two_tenants() as lab:
        web, stranger = lab.instances["acme", "web"], lab.instances["globex", "web"]
        tells(web, 80)
        publish(lab, "acme", web="8080:80")
        assert answers(stranger.netns, HOST, 8080) == "100.64.0.2"
        assert answers(stranger.netns, HOST6, 8080) == "fd69:6e73:756c:6100::2"
        for address in ("100.64.0.3", "100.64.0.2", "10.0.0.2"):
            assert answers(stranger.netns, address, 8080, SHORT) == ""
        publish(lab, "acme")
        assert answers(stranger.netns, HOST, 8080, SHORT) == ""
