"""Idempotency keys: what is sent again is not done again, whoever has died in between."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.tenancy.conftest import Houses, People, Person
from tests.system.tenancy.http import HttpAnswer, exchange

SPEC = {"image": "busybox", "command": ["sleep", "600"], "networks": []}


class Api:
    """The instances of a tenant, as a person asks for them."""

    def __init__(self, daemon: Daemon, tenant: str, token: str | None = None) -> None:
        self.path = daemon.run / ("users.sock" if token else "insulad.sock")
        self.where = f"/v1/tenants/{tenant}"
        self.token = token

    def post(self, what: str, body: object, key: str | None = None, method: str = "POST") -> HttpAnswer:
        fields = {"idempotency_key": key} if key else {}
        return exchange(self.path, method, self.where + what, body, token=self.token, **fields)

    def run(self, key: str | None = None, **spec: Any) -> HttpAnswer:
        return self.post("/instances", {**SPEC, **spec}, key)

    def names(self, label: str) -> list[str]:
        views = exchange(self.path, "GET", f"{self.where}/instances?label={label}", token=self.token).json
        return [view["instance"]["name"] for view in views]


@pytest.fixture(scope="module")
def ann(people: People, houses: Houses) -> Person:
    return people.person("member", houses.acme.tenant)


@pytest.fixture(scope="module")
def api(daemon: Daemon, houses: Houses, ann: Person) -> Api:
    return Api(daemon, str(houses.acme.tenant), ann.secret)


def name_of(answer: HttpAnswer) -> str:
    assert answer.status == 201, answer
    return str(answer.json["instance"]["name"])


def test_the_same_request_again_is_the_same_object(api: Api) -> None:
    first = api.run("one", labels={"of": "one"})
    assert "idempotency-replayed" not in first.headers
    for key in ("one", '"one"'):  # as a string of RFC 8941 as well
        again = api.run(key, labels={"of": "one"})
        assert again.headers["idempotency-replayed"] == "true"
        assert (again.status, again.body) == (first.status, first.body)
        assert again.headers["content-type"] == "application/json"
    assert api.names("of=one") == [name_of(first)]
    assert name_of(api.run(labels={"of": "one"})) != name_of(first), "without a key it is another one"
    assert name_of(api.run("two", labels={"of": "one"})) != name_of(first), "and with another key"
    assert len(api.names("of=one")) == 3


def test_another_request_with_the_key_is_refused(api: Api) -> None:
    assert api.run("taken", labels={"of": "taken"}).status == 201
    for answer in (
        api.run("taken", labels={"of": "other"}),
        api.post("/instances?start=false", {**SPEC, "labels": {"of": "taken"}}, "taken"),
        api.post("/networks", {"name": "n", "subnet": "10.9.0.0/24"}, "taken"),
    ):
        assert (answer.status, answer.json["code"]) == (422, "IdempotencyKeyReused"), answer
    assert api.names("of=other") == []


def test_keys_of_others_are_their_own(api: Api, daemon: Daemon, people: People, houses: Houses) -> None:
    """Neither their answers nor that there are any."""
    first = api.run("shared", labels={"of": "shared"})
    ben = Api(daemon, str(houses.acme.tenant), people.person("member", houses.acme.tenant).secret)
    second = ben.run("shared", labels={"of": "shared"})
    assert "idempotency-replayed" not in second.headers and name_of(second) != name_of(first)
    operator = Api(daemon, str(houses.acme.tenant)).run("shared", labels={"of": "elsewhere"})
    assert operator.status == 201


def test_a_token_for_some_instances_is_not_told_of_others(
    api: Api, daemon: Daemon, people: People, houses: Houses, ann: Person
) -> None:
    assert api.run("wide", labels={"of": "wide"}).status == 201
    narrow = people.with_token(ann.name, houses.acme.tenant, labels={"job": "7"})
    answer = Api(daemon, str(houses.acme.tenant), narrow.secret).run("wide", labels={"of": "wide"})
    assert answer.json["code"] == "IdempotencyKeyReused"


def test_what_changed_nothing_may_be_sent_again(api: Api) -> None:
    body = {"source": "busybox:latest", "name": "later:1"}
    wrong = api.post("/images/tag", {**body, "source": "later:0"}, "tag")
    assert wrong.status == 404
    assert api.post("/images/tag", {**body, "source": "busybox:latest"}, "tag").status == 201
    assert api.post("/images/tag", body, "tag").headers["idempotency-replayed"] == "true"


def test_removals_and_changes(api: Api) -> None:
    name = name_of(api.run(labels={"of": "gone"}))
    patch = {"pids": 100}
    first = api.post(f"/instances/{name}", patch, "patch", "PATCH")
    assert first.status == 200 and api.post(f"/instances/{name}", patch, "patch", "PATCH").body == first.body
    for _ in range(2):
        assert api.post(f"/instances/{name}?force=true", None, "remove", "DELETE").status == 204
    assert api.post(f"/instances/{name}?force=true", None, None, "DELETE").status == 404


def test_what_stores_nothing_is_done_once_too(api: Api) -> None:
    name = name_of(api.run(labels={"of": "signalled"}))
    for _ in range(2):
        answer = api.post(f"/instances/{name}/kill?signal=SIGCONT", None, "kill")
        assert (answer.status, answer.body) == (204, b""), answer
    assert answer.headers["idempotency-replayed"] == "true"


def test_an_answer_with_a_secret_is_not_kept(daemon: Daemon, people: People) -> None:
    people.operator.identities.create_user("keeper")
    try:
        socket_ = daemon.run / "insulad.sock"
        body = {"user": "keeper", "description": "once"}
        made = exchange(socket_, "POST", "/v1/tokens", body, idempotency_key="t").json
        again = exchange(socket_, "POST", "/v1/tokens", body, idempotency_key="t")
        assert (again.status, again.headers["idempotency-replayed"]) == (409, "true")
        assert made["id"] in again.json["detail"] and made["token"] not in again.body.decode()
        tokens = people.operator.identities.tokens(everybody=True)
        assert len([each for each in tokens if each["user"] == "keeper"]) == 1
        secret = made["token"].split("_", 2)[2].encode()
        stored = [path.read_bytes() for path in (daemon.root).glob("state.db*")]
        assert any(made["id"].encode() in data for data in stored)
        assert not any(secret in data for data in stored)
    finally:
        people.operator.identities.remove_user("keeper")


@pytest.mark.parametrize("key", ["", '""', "x" * 256, "ü", 'a"b', "a\tb"])
def test_keys_that_are_none(key: str, api: Api) -> None:
    with pytest.MonkeyPatch.context():
        answer = exchange(
            api.path, "POST", f"{api.where}/instances", {**SPEC, "labels": {"of": "none"}}, token=api.token,
            idempotency_key=key,
        )  # fmt: skip
    assert answer.status == 400
    assert api.names("of=none") == []


def test_streams_take_no_key(api: Api) -> None:
    answer = exchange(api.path, "POST", f"{api.where}/instances/web/exec", {}, token=api.token, idempotency_key="x")
    assert answer.status == 400 and "takes no Idempotency-Key" in answer.json["detail"]


def test_many_at_once_make_one(api: Api) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: api.run("many", labels={"of": "many"}), range(24)))
    assert len(api.names("of=many")) == 1
    assert {answer.status for answer in answers} <= {201, 409}
    first = [answer for answer in answers if answer.status == 201 and "idempotency-replayed" not in answer.headers]
    assert len(first) == 1
    for answer in answers:
        if answer.status == 409:
            assert answer.headers["retry-after"] == "1"


def test_a_kill_between_the_commit_and_the_answer(api: Api, daemon: Daemon) -> None:
    """The zygote is stopped, so that the launch of what is committed can't end before insulad is killed."""
    zygote = daemon.pid("zygote")
    assert zygote
    spec = {**SPEC, "labels": {"of": "killed"}}
    with ThreadPoolExecutor(1) as pool:
        os.kill(zygote, signal.SIGSTOP)
        try:
            running = pool.submit(api.post, "/instances", spec, "killed")
            until(lambda: api.names("of=killed"), "it is committed")
            busy = api.post("/instances", spec, "killed")
            assert (busy.status, busy.headers["retry-after"]) == (409, "1")
            daemon.kill("insulad")
        finally:
            os.kill(zygote, signal.SIGCONT)
        with pytest.raises((ConnectionError, OSError)):
            running.result()
    daemon.start()
    again = api.post("/instances", spec, "killed")
    assert again.headers["idempotency-replayed"] == "true"
    assert api.names("of=killed") == [name_of(again)]
    assert name_of(api.post("/instances", spec, "killed")) == name_of(again)


def test_a_kill_before_the_commit_leaves_the_key_free(api: Api, daemon: Daemon) -> None:
    assert daemon.kill("insulad")
    with pytest.raises(OSError):
        api.run("before", labels={"of": "before"})
    daemon.start()
    answer = api.run("before", labels={"of": "before"})
    assert "idempotency-replayed" not in answer.headers and api.names("of=before") == [name_of(answer)]
