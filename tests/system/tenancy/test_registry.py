"""Members pull and push through their tenant's network, and reach nothing else. A private image costs its login."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from insula.model.errors import Denied, InsulaError, Invalid, NotFound
from tests.support import machine, outside
from tests.support.images import Layout, digest, member, tar
from tests.support.machine import Namespaces
from tests.support.outside import CANARY, PASSWORD, PORT
from tests.support.wait import patiently, until
from tests.system.tenancy.conftest import Person
from tests.system.tenancy.registries import (
    LAN,
    METADATA,
    OWN,
    STORE,
    Server,
    World,
    connects,
    devices,
    hanging,
    member_of_new,
    nothing_is_left,
    open_world,
    pids,
    pull,
    refusal,
)

HOST, GATEWAY = "198.18.0.2", "10.0.0.1"
LOGIN = {"username": "ada", "password": PASSWORD}


@pytest.fixture(scope="module")
def world(run_: machine.Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(run_, tmp_path_factory.mktemp("outside")) as world:
        yield world


class Canary(Server):
    """Listens where nobody may come."""

    def __init__(self, namespace: str, *addresses: str) -> None:
        super().__init__(namespace, "canary", *addresses)
        self.namespace, self.address = namespace, addresses[0]

    def untouched(self) -> bool:
        """Whether there was no connection since the last call: the first is our own, which is the control."""
        connect = f"import socket; socket.create_connection(({self.address!r}, {CANARY}), 20).close()"
        subprocess.run(Namespaces.wrap(self.namespace, sys.executable, "-c", connect), check=True)
        assert self.next() == "connection"
        return self.lines() == []


def test_a_member_pulls_and_pushes_back(world: World) -> None:
    """By name, so that the tenant's resolver is asked. The registry sees the host's address, as of an instance."""
    lines = pull(world.ann, f"plain.test:{PORT}/app:1")
    assert any("Copying blob" in line for line in lines), lines
    image = world.ann.client.images.get("acme", f"plain.test:{PORT}/app:1")
    assert image["tenant"] == "acme" and len(image["layers"]) == 2
    target = f"{OWN}:{STORE}/team/app:1"
    steps = [*world.ann.client.images.push("acme", image["name"], target, insecure=True)]
    assert any("Copying blob" in step["progress"] for step in steps), steps
    assert world.bob.cli.ok("image", "pull", "--quiet", "--insecure", "--name", "same", target) == "same:latest"
    assert world.bob.client.images.get("globex", "same")["digest"] == image["digest"]
    both = (world.ann, world.bob)
    until(lambda: not any("egress" in devices(world, each) for each in both), "the kernel ends the namespaces")


def test_two_tenants_with_the_same_subnet_at_once(world: World) -> None:
    """Neither layer is sent before both were asked for. Meanwhile each tenant's router has one device more."""
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(pull, person, f"pair.test:{PORT}/app:1") for person in (world.ann, world.bob)]
        for each in both:
            assert each.result(patiently(60))
    for person in (world.ann, world.bob):
        assert person.client.images.get(world.tenant(person), f"pair.test:{PORT}/app:1")["layers"]


WHERE = {
    "loopback of the host": "127.0.0.1",
    "loopback of the host by IPv6": "six",
    "the host's end of its uplink": HOST,
    "another interface of the host": LAN,
    "the metadata service": METADATA,
    "the router of the tenant": GATEWAY,
    "the host's end of the tenant's uplink": "100.64.0.2",
}


@pytest.fixture(scope="module")
def canaries(world: World) -> Iterator[list[Canary]]:
    """Listeners on every address of the host, at a metadata service, and on every address of the tenant's router."""
    spaces = world.daemon.namespaces
    places = ((spaces.host, "0.0.0.0", "::1"), (spaces.outside, METADATA), (world.netns(world.ann), "0.0.0.0", "::1"))
    with contextlib.ExitStack() as stack:
        made = [Canary(*place) for place in places]
        for canary in made:
            stack.callback(canary.close)
        yield made


def ways() -> dict[str, bool]:
    """References that lead to each of these places in each way, and whether plain HTTP is tried; the slowest first.

    Where packets are dropped, each attempt to connect takes seven seconds.
    """
    texts = [where.replace(".", "-") for where in WHERE.values()]
    found = {f"{where}:{CANARY}/x": False for where in WHERE.values() if where != "six"}
    found |= {f"to-{text}.test:{CANARY}/x": False for text in texts}
    return found | {f"{kind}-{text}.test:{PORT}/x": True for kind in ("blob", "realm", "redirect") for text in texts}


def test_nothing_of_the_host_is_reached(world: World, canaries: list[Canary]) -> None:
    """By its address, by a name that resolves to it, redirected there from a manifest or a layer, or for a token."""
    assert all(canary.untouched() for canary in canaries)
    world.registry.lines()
    people = [world.ann, world.bob, *(member_of_new(world, f"other{number}") for number in range(2))]
    turns = [(people[number % 4], *way) for number, way in enumerate(ways().items())]
    with ThreadPoolExecutor(16) as pool:  # as many as run at once
        errors = list(pool.map(lambda turn: refusal(turn[0], turn[1], insecure=turn[2]), turns))
    for (_, reference, _), error in zip(turns, errors, strict=True):
        registry = reference.partition("/")[0]
        expected = (f"{registry} does not respond", "Unavailable", "check the registry's name, and the network")
        assert (error.message, type(error).__name__, error.hint) == expected
    assert all(canary.untouched() for canary in canaries)
    asked = {line.split()[0] for line in world.registry.lines()}
    assert {reference.partition(".")[0] for _, reference, insecure in turns if insecure} <= asked, "the way was taken"


def test_the_operator_reaches_it_by_the_same_verb(world: World, canaries: list[Canary]) -> None:
    """The control: in the host's network the listener has connections."""
    for where in ("127.0.0.1", LAN):
        with pytest.raises(InsulaError):
            list(world.people.operator.images.pull("acme", f"{where}:{CANARY}/x", insecure=True))
        assert not canaries[0].untouched()


def test_neither_other_pulls_nor_instances_nor_other_tenants_are_reached(world: World) -> None:
    """From the namespace of a pull, and from an instance the namespace of a pull."""
    ann, spaces = world.ann, world.daemon.namespaces
    ann.cli.ok("run", "-d", "--name", "web", "busybox", "httpd", "-f", "-p", str(CANARY))
    own = ann.client.instances.get("acme", "web")["instance"]["ports"][0]["address"]
    with hanging(world, ann):
        [there] = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids(world.daemon)}
        assert there not in {os.readlink(path) for path in (spaces.host, "/proc/self/ns/net")}
        pid = pids(world.daemon)[0]
        shown = spaces.ip(f"/proc/{pid}/ns/net", "-json address")
        addresses = [a["local"] for link in json.loads(shown) for a in link["addr_info"]]
        assert sorted(addresses) == ["127.0.0.1", "169.254.64.1"], "no IPv6, and nothing of the tenant's networks"
        tries = [(own, CANARY), (GATEWAY, CANARY), ("100.64.0.1", CANARY), ("169.254.64.0", CANARY)]
        assert not any(connects(f"/proc/{pid}/ns/net", *place) for place in tries)
        assert connects(f"/proc/{pid}/ns/net", OWN, PORT), "the control: the outside"
        assert connects(f"/proc/{pid}/ns/net", GATEWAY, 53), "and the resolver"
        assert connects(world.netns(ann), own, CANARY), "the control: the instance listens"
        assert (
            "web" in ann.cli.ok("ps") and ann.cli.run("exec", "web", "ping", "-c1", "-W1", "169.254.64.1").status != 0
        )
        assert world.daemon.cli.json("verify")["passed"], "the device of a pull is no finding"
    ann.cli.ok("rm", "-f", "web")


def test_skopeo_sees_nothing_of_the_host(world: World) -> None:
    """No name servers, names, sockets, processes and proxies; the certificates of authorities, which it needs."""
    with hanging(world, world.ann):
        pid = pids(world.daemon)[-1]
        root = Path(f"/proc/{pid}/root")
        servers = [line for line in (root / "etc/resolv.conf").read_text().splitlines() if "nameserver" in line]
        assert servers == [f"nameserver {GATEWAY}"]
        assert "localhost" in (root / "etc/hosts").read_text() and len((root / "etc/hosts").read_text().split()) == 4
        known = {"ssl", "pki", "ca-certificates", "crypto-policies", "ld.so.cache", "containers"}
        made = {"hosts", "nsswitch.conf", "passwd", "group", "resolv.conf"}
        assert {path.name for path in (root / "etc").iterdir()} <= known | made
        assert {path.name for path in (root / "etc/containers").iterdir()} <= {"policy.json", "registries.d"}
        assert os.listdir(root / "etc/ssl/certs") == os.listdir("/etc/ssl/certs") != []
        assert os.listdir(root / "run") == [] != os.listdir("/run")
        assert len([name for name in os.listdir(root / "proc") if name.isdigit()]) <= 3, "sh, skopeo and no other"
        assert b"proxy" not in Path(f"/proc/{pid}/environ").read_bytes().lower()
        assert (
            PASSWORD
            in base64.b64decode(
                json.loads((root / "mnt/pull-home/auth.json").read_text())["auths"][f"hang.test:{PORT}"]["auth"]
            ).decode()
        ), "the control: it has the login"
        there = [Path(f"/proc/{each}/{name}") for each in pids(world.daemon) for name in ("cmdline", "environ")]
        for path in (*there, world.daemon.log, world.daemon.audit, *world.daemon.root.glob("*.db*")):
            assert PASSWORD.encode() not in path.read_bytes(), path
    with pytest.raises(InsulaError, match="does not respond"):
        list(world.people.operator.images.pull("acme", f"{OWN}:{STORE}/team/app:1"))


def unbind(world: World, person: Person) -> None:
    world.people.operator.identities.unbind(person.name, "acme")


def revoke(world: World, person: Person) -> None:
    world.people.operator.identities.revoke_token(person.secret.split("_")[1])


@pytest.mark.parametrize("way", [unbind, revoke])
def test_a_pull_ends_when_the_right_is_taken(way: Callable[[World, Person], None], world: World) -> None:
    person = world.people.person("member", "acme")
    with hanging(world, person) as process:
        way(world, person)
        _, error = process.communicate(timeout=patiently(30))
        assert process.returncode == 1
        assert "not valid any more" in error or "no tenant" in error, error
        until(lambda: nothing_is_left(world, world.ann), "it has ended on the host")
    assert all("hang.test" not in image["name"] for image in world.ann.client.images.list("acme"))


def test_a_killed_insulad_leaves_nothing_of_a_pull(world: World) -> None:
    with hanging(world, world.ann) as process:
        world.daemon.kill("insulad")
        process.communicate(timeout=patiently(30))
        until(lambda: not pids(world.daemon), "skopeo ends with insulad")
        until(lambda: "egress" not in devices(world, world.ann), "its namespace ends with it")
        world.daemon.start()
    assert pull(world.ann, f"plain.test:{PORT}/app:1"), "and images are fetched as before"


def test_without_a_network_there_is_one_error_with_a_hint(world: World) -> None:
    world.daemon.cli.ok("tenant", "create", "bare")
    person = world.people.person("member", "bare")
    error = refusal(person, f"plain.test:{PORT}/app:1")
    assert "has no network" in error.message and "network create" in str(error.hint)
    person.cli.ok("network", "create", "default", "--subnet", "10.0.0.0/24")
    assert pull(person, f"plain.test:{PORT}/app:1")


# -- images of others ----------------------------------------------------------------------------------------------


def test_an_image_that_another_has_costs_its_login_and_the_whole_download(world: World) -> None:
    """The same requests and lines as for the first one, and on the disk it is there once."""
    reference = f"private.test:{PORT}/app:1"
    store = world.daemon.root / "images"
    seen = []
    for person in (world.ann, world.bob):
        world.registry.lines()
        assert isinstance(refusal(person, reference), Denied)
        lines = sorted(pull(person, reference, auth=LOGIN))
        requests = sorted(line for line in world.registry.lines() if "/blobs/" in line and "True" in line)
        until(lambda: not list((store / "tmp").iterdir()), "what was there twice is removed")
        seen.append((lines, requests, [p.name for p in sorted(store.glob("[bld]*/**/*")) if len(p.name) == 64]))
    assert seen[0] == seen[1]
    assert len(seen[0][1]) == 3, "the configuration and two layers"


def test_no_name_and_no_digest_gives_an_image_of_another(world: World) -> None:
    reference = f"private.test:{PORT}/app:2"
    pull(world.ann, reference, auth=LOGIN)
    image = world.ann.client.images.get("acme", reference)
    digests = [image["digest"], image["config_digest"], *image["layers"], *outside.LAYERS]
    names = ["app:2", *(f"{name}@{digest}" for name in ("app", f"private.test:{PORT}/app") for digest in digests)]
    bob = world.bob.client
    for name in names:
        with pytest.raises(NotFound):
            bob.images.get("globex", name)
        with pytest.raises(NotFound):
            list(bob.images.push("globex", name, f"{OWN}:{STORE}/stolen:1", insecure=True))
        with pytest.raises(NotFound):
            bob.images.tag("globex", name, "mine")
        with pytest.raises(NotFound):
            bob.images.save("globex", [name])
        with pytest.raises(NotFound):
            bob.instances.run("globex", name, ["true"])
    for each in digests:
        assert isinstance(refusal(world.bob, f"private.test:{PORT}/app@{each}"), Denied)


def test_a_digest_beside_a_tag_is_that_of_the_content(world: World) -> None:
    """Whatever the tag is bound to by now. The digest may be that of an index."""
    person, tenant = world.ann, world.tenant(world.ann)
    images, where = person.client.images, f"plain.test:{PORT}/pinned"
    manifest, index = digest(outside.MANIFEST), digest(outside.INDEX)
    for pinned in (f"{where}:1@{manifest}", f"{where}:2@{index}"):
        pull(person, pinned)
        assert images.get(tenant, pinned)["digest"] == manifest
        with pytest.raises(NotFound, match=r"there is no image .*@sha256:0000"):
            images.get(tenant, f"{pinned.partition('@')[0]}@sha256:{'0' * 64}")
    for tag in ("1", "2"):
        images.tag(tenant, "busybox", f"{where}:{tag}")
    with pytest.raises(NotFound):
        person.client.instances.run(tenant, f"{where}:1@{manifest}", ["true"], start=False)
    kept = person.client.instances.run(tenant, f"{where}:2@{index}", ["true"], start=False)
    assert kept["instance"]["image_digest"] == manifest, "it is there by its digest alone"
    shared = images.get(tenant, "busybox")
    assert images.get(tenant, f"busybox:latest@{shared['digest']}") == shared
    person.client.instances.remove(tenant, kept["instance"]["name"])


def test_no_image_gets_the_digest_of_another_as_its_name(world: World) -> None:
    """By a tag, or by an archive that says so: who runs it by its digest would get something else."""
    person, tenant = world.ann, world.tenant(world.ann)
    images = person.client.images
    busybox, false = images.get(tenant, "busybox")["digest"], f"sha256:{'1' * 64}"
    assert images.tag(tenant, "busybox", f"mine@{busybox}")["name"] == f"mine@{busybox}", "the control"
    with pytest.raises(Invalid, match="is not the digest of the image"):
        images.tag(tenant, "busybox", f"mine@{false}")
    with pytest.raises(Invalid, match="is not the digest of the image"):
        images.import_(tenant, f"mine@{false}", [tar(member("a", b"x"))])
    for name, refused in ((f"loaded@{false}", True), ("loaded:1", False)):
        layout = Layout()
        layout.image([tar(member("a", b"loaded"))], name=name)
        if refused:
            with pytest.raises(Invalid, match="is not the digest of the image"):
                images.load(tenant, [layout.tar()])
        else:
            assert [image["name"] for image in images.load(tenant, [layout.tar()])] == [name]


@pytest.mark.parametrize("missing", range(2))
def test_an_archive_without_a_layer_is_refused_although_the_host_has_it(missing: int, world: World) -> None:
    pull(world.ann, f"plain.test:{PORT}/app:1")
    whole, cut = Layout(), Layout()
    for layout in (whole, cut):
        layout.blobs, layout.index = dict(outside.LAYOUT.blobs), outside.LAYOUT.index
    del cut.blobs[outside.LAYERS[missing]]
    with pytest.raises(InsulaError, match="missing"):
        world.bob.client.images.load("globex", [cut.tar()])
    assert world.bob.client.images.load("globex", [whole.tar()]), "the control"
