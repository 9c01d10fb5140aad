"""Connections that are open while policies change: what is forbidden ends, and nothing else loses a packet."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Callable

import pytest

from insula.kernel.netns import call_in
from insula.model.policies import Policy
from tests.support.lab import SOON, Lab, isolated, two_tenants
from tests.support.policy_lab import SHORT, PolicyLab, address, connected, passes, policy, policy_lab, reaches

FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
ALLOWED = policy("db", {"app": "db"}, "in app=web tcp/4000-4001,udp/4000")


def narrowed() -> Policy:
    return policy("db", {"app": "db"}, "in app=web tcp/4001")


def relabelled(lab: PolicyLab) -> None:
    lab.labels["web"] = {"app": "no more"}
    lab.enforce()


CHANGES: dict[str, Callable[[PolicyLab], None]] = {
    "a policy is added": lambda lab: lab.enforce(policy("more", {"app": "web"}, directions=("out",))),
    "a policy is narrowed": lambda lab: lab.enforce(narrowed()),
    "a rule is taken back": lambda lab: lab.enforce(policy("db", {"app": "db"}, "in app=other tcp")),
    "a label is lost": lambda lab: relabelled(lab),
}


@isolated
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("first", ["opener", "other"])
@FAMILIES
def test_a_tcp_connection_ends_whichever_end_sends_next(change: str, first: str, family: int) -> None:
    with policy_lab() as lab:
        web, db, other = lab["web"], lab["db"], lab.instance("other")
        lab.enforce(ALLOWED)
        with connected(web, db, family, 4000) as (client, server), connected(db, other, family, 5000) as (c, s):
            assert passes(client, server, SOON) and passes(server, client, SOON)
            CHANGES[change](lab)
            sender, receiver = (client, server) if first == "opener" else (server, client)
            assert not passes(sender, receiver)
            with pytest.raises(OSError):  # it learns that at once, and does not wait
                sender.settimeout(5)
                sender.sendall(b"x")
                sender.recv(1)
                sender.sendall(b"x")
            assert not passes(receiver, sender)
            assert passes(c, s, SOON) and passes(s, c, SOON), "another connection goes on"


@isolated
@FAMILIES
def test_one_way_udp_ends_and_goes_on_when_it_is_allowed_again(family: int) -> None:
    with policy_lab() as lab:
        web, db = lab["web"], lab["db"]
        lab.enforce(ALLOWED)
        with web.socket(family, socket.SOCK_DGRAM) as sends, db.socket(family, socket.SOCK_DGRAM) as gets:
            gets.bind((address(db, family), 4000))
            gets.settimeout(SOON)
            where = address(db, family), 4000
            for _ in range(3):
                sends.sendto(b"1", where)
                assert gets.recv(10) == b"1"
            lab.enforce(narrowed())
            for _ in range(5):
                with contextlib.suppress(OSError):  # it is told
                    sends.sendto(b"2", where)
            gets.settimeout(SHORT)
            with pytest.raises(TimeoutError):
                gets.recv(10)
            lab.enforce(ALLOWED)
            with contextlib.suppress(OSError):
                sends.sendto(b"3", where)
            sends.sendto(b"3", where)
            gets.settimeout(SOON)
            assert gets.recv(10) == b"3"


@isolated
@FAMILIES
def test_answers_alone_end_too(family: int) -> None:
    with policy_lab() as lab:
        web, db = lab["web"], lab["db"]
        lab.enforce(ALLOWED)
        with web.socket(family, socket.SOCK_DGRAM) as asks, db.socket(family, socket.SOCK_DGRAM) as answers:
            answers.bind((address(db, family), 4000))
            answers.settimeout(SOON)
            asks.sendto(b"?", (address(db, family), 4000))
            _, where = answers.recvfrom(10)
            answers.sendto(b"1", where)
            asks.settimeout(SOON)
            assert asks.recv(10) == b"1"
            lab.enforce(narrowed())
            for _ in range(3):
                with contextlib.suppress(OSError):
                    answers.sendto(b"2", where)
            asks.settimeout(SHORT)
            with pytest.raises(OSError):
                asks.recv(10)


@isolated
def test_others_lose_no_packet_while_policies_come_and_go() -> None:
    with policy_lab() as lab:
        web, db = lab["web"], lab["db"]
        lab.enforce(ALLOWED)
        with (
            web.socket(socket.AF_INET, socket.SOCK_DGRAM) as sends,
            db.socket(socket.AF_INET, socket.SOCK_DGRAM) as gets,
        ):
            gets.bind((db.port.address, 4000))
            gets.settimeout(SOON)
            for number in range(100):
                sends.sendto(str(number).encode(), (db.port.address, 4000))
                lab.enforce(policy(f"p{number % 7}", {"app": f"x{number % 5}"}, f"in app=web tcp/{number + 1}"))
                assert gets.recv(10) == str(number).encode()


@isolated
def test_an_address_that_another_instance_gets_has_the_others_policies() -> None:
    with policy_lab() as lab:
        db, old = lab["db"], lab.instance("old", host=9, labels={"app": "web"})
        lab.enforce(ALLOWED)
        kind = socket.AF_INET, socket.SOCK_DGRAM
        with old.socket(*kind) as sends, db.socket(*kind) as gets:
            gets.bind((db.port.address, 4000))
            gets.settimeout(SOON)
            sends.bind((old.port.address, 4444))
            sends.sendto(b"1", (db.port.address, 4000))
            assert gets.recv(10) == b"1"
            lab.cloud.unplug(old)
            del lab.cloud.instances["acme", "old"]
            new = lab.instance("new", host=9, labels={"app": "stranger"})
            assert new.port.address == old.port.address
            with new.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
                again.bind((new.port.address, 4444))
                with contextlib.suppress(OSError):
                    again.sendto(b"2", (db.port.address, 4000))
                gets.settimeout(SHORT)
                with pytest.raises(TimeoutError):
                    gets.recv(10)
        old.remove()


@isolated
def test_an_address_that_nobody_has_may_send_nothing() -> None:
    """An instance whose address is missing in the sets, as if it had been plugged without its policies."""
    with policy_lab() as lab:
        web, db = lab["web"], lab["db"]
        assert reaches(web, db, socket.AF_INET, 80)
        inside = lab.cloud.inside("acme")
        command = ["nft", "delete", "element", "inet", "lab", "peers4", "{", web.port.address, "}"]
        call_in(inside, lambda: subprocess.run(command, check=True))
        assert not reaches(web, db, socket.AF_INET, 81)
        assert lab.cloud.fabric.installed(lab.cloud.tenants["acme"]).drift != []
        lab.cloud.apply("acme")
        assert reaches(web, db, socket.AF_INET, 81)
        assert lab.cloud.fabric.installed(lab.cloud.tenants["acme"]).drift == []
        os.close(inside)


DAMAGE = (
    "flush set inet lab isolated_in",
    "flush map inet lab pairs_in",
    "flush map inet lab subjects4",
    "flush set inet lab ports",
    "flush map inet lab ranges4",
    "add element inet lab everything { 0:1 }",
)


@isolated
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_repaired_also_by_the_next_change(damage: str) -> None:
    with policy_lab() as lab:
        web, db, other = lab["web"], lab["db"], lab.instance("other")
        lab.enforce(ALLOWED)
        lab.cloud.apply("acme")
        inside = lab.cloud.inside("acme")
        for changed in (False, True):
            call_in(inside, lambda: subprocess.run(["nft", damage], check=True))
            assert lab.cloud.fabric.installed(lab.cloud.tenants["acme"]).drift != []
            if changed:
                lab.enforce(narrowed())
            lab.cloud.apply("acme")
            assert lab.cloud.fabric.installed(lab.cloud.tenants["acme"]).drift == []
            assert reaches(web, db, socket.AF_INET, 4001) and not reaches(other, db, socket.AF_INET, 4001)
        os.close(inside)


@isolated
def test_another_process_adopts_what_is_installed() -> None:
    """As insulad does after kill -9: nothing is judged otherwise meanwhile, and changes go on."""
    with two_tenants() as cloud:
        lab = PolicyLab(cloud)
        web, db, other = lab["web"], lab["db"], lab.instance("other")
        lab.enforce(ALLOWED)
        with connected(web, db, socket.AF_INET, 4000) as (client, server):
            cloud.fabric.close()
            successor = Lab(run=cloud.run)
            for name in ("tenants", "networks", "instances", "routers", "names", "others"):
                setattr(successor, name, getattr(cloud, name))
            assert passes(client, server, SOON) and not reaches(other, db, socket.AF_INET, 4001)
            successor.apply("acme")
            assert passes(client, server, SOON) and passes(server, client, SOON)
            lab.cloud = successor
            lab.enforce(narrowed())
            assert not passes(client, server)
        assert reaches(web, db, socket.AF_INET, 4001) and not reaches(other, db, socket.AF_INET, 4001)


@isolated
def test_what_was_counted_of_an_address_is_forgotten_with_its_instance() -> None:
    with policy_lab() as lab:
        web, db, tenant = lab["web"], lab["db"], lab.cloud.tenants["acme"]
        lab.enforce(policy("db", {"app": "db"}, audit=True))
        assert reaches(web, db, socket.AF_INET, 80) and reaches(web, db, socket.AF_INET6, 81)
        found = lab.cloud.fabric.audited(tenant)
        counted = {(flow.source, flow.port, flow.connections) for flow in found}
        assert counted == {(web.port.address, 80, 1), (web.port.address6, 81, 1)}
        lab.cloud.unplug(web)
        assert lab.cloud.fabric.audited(tenant) == []
