"""What a tenant is told stays the same, byte for byte, while another one writes hundreds of times."""

from __future__ import annotations

import itertools
import re

import pytest

from insula.api.app import application
from insula.api.authorization import handlers, permission_of
from insula.model.permissions import PERMISSIONS
from tests.support.daemon import Daemon
from tests.system.tenancy.conftest import Houses, People
from tests.system.tenancy.http import exchange
from tests.system.tenancy.quota_kinds import rootfs
from tests.unit.stub_plane import StubPlane

WRITES = 200
_OWN_USE = re.compile(rb'"cpu":[0-9.]+|"memory\.(usage_in_bytes|current)":"[0-9]+"')
"""The processor time of a process of one's own and the memory of its control group, which may change by themselves: the
kernel charges memory in batches (Documentation/admin-guide/cgroup-v1/memory.rst, 5.5)."""
OF_TIME = {"/usage", "/metrics", "/stats"}
"""The ends of paths whose answers change by themselves; test_usage, test_metrics and test_members are about these."""
LEFT_OUT = {"/v1/events", "/"}
"""A stream without end, and a page that is not there."""
OF_OTHERS = ("/peerings/", "/endpoints/", "/floating-ips/")
"""Parts of paths of what two tenants have agreed on, and of what comes from the operator's pool: test_peerings and
test_floating_commands are about these."""
OF_MACHINES = ("/snapshots/{", "/screenshot", "/guest")
"""Of what containers don't have: machine/test_snapshots and test_disk_images are about these."""
ELSEWHERE = (*OF_OTHERS, *OF_MACHINES)
NAMES = {"network": "default", "router": "router", "policy": "policy", "group": "group", "instance": "web"}
NAMES |= {"load_balancer": "shop"}
"""What is there for the parameters of paths."""


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory, houses: Houses, people: People) -> list[str]:
    """Everything that a member can read, on its own tenant and on what is there: from the application's routes."""
    tenant = str(houses.acme.tenant)
    people.operator.images.import_(tenant, "mine", [rootfs(1)])
    people.operator.routers.create(tenant, "router", ["default"])
    people.operator.policies.create(tenant, "policy", {"labels": {"app": "nobody"}}, ["in"])
    people.operator.address_groups.create(tenant, "group", ["203.0.113.0/24"])
    unchecked = {"instances": ["web"], "health": {"kind": "none"}}
    people.operator.load_balancers.create(tenant, "shop", [{"port": 80}], [{"network": "default"}], **unchecked)
    people.operator.guarantees.set(tenant, None, ceiling_out=10_000_000_000)
    people.operator.guarantees.set(tenant, "web", ceiling_out=10_000_000_000)
    found = []
    for path, method, handler in handlers(application(StubPlane(tmp_path_factory.mktemp("plane")), None)):
        scope = PERMISSIONS[permission_of(handler, method)].scope
        left_out = path in LEFT_OUT or path.endswith((*OF_TIME,)) or any(part in path for part in ELSEWHERE)
        if method == "GET" and scope != "host" and not left_out:
            named = path.replace("{tenant:str}", tenant)
            for parameter, name in NAMES.items():
                named = named.replace(f"{{{parameter}:str}}", name)
            named = named.replace("images/{name:path}", "images/mine").replace("{name:str}", "web")
            named = named.replace("/{path:str}", "/openapi.json")
            assert "{" not in named, f"tell what is there for {path}"
            asked = {"archive": "?path=/etc/hostname", "trace": "?source=web&target=outside"}
            found.append(named + asked.get(named.rpartition("/")[2], ""))
    return found


def told(daemon: Daemon, token: str, targets: list[str]) -> dict[str, tuple[int, dict[str, str], bytes]]:
    answers = {}
    for target in targets:
        answer = exchange(daemon.run / "users.sock", "GET", target, token=token)
        own = {name: text for name, text in answer.headers.items() if name not in ("date", "x-request-id")}
        answers[target] = (answer.status, own, _OWN_USE.sub(b"", answer.body))
    return answers


HIDDEN = {
    "index",
    "vni",
    "id_base",
    "start_time",
    "uid_map",
    "gid_map",
    "cgroups",
    "upper",
    "inode",
    "revision",
}
"""Keys of what is the host's."""


def test_nothing_of_the_host_is_in_any_answer(
    daemon: Daemon, houses: Houses, people: People, targets: list[str]
) -> None:
    """Neither its keys, nor its paths, names and numbers, in any answer that a member can get."""
    acme = str(houses.acme.tenant)
    web, tenant = people.operator.instances.get(acme, "web"), people.operator.tenants.get(acme)["tenant"]
    texts = [str(daemon.path), daemon.prefix, f'"{web["instance"]["host"]}"', str(tenant["id_base"])]
    numbers = [f'"pid":{web["status"]["pid"]}', f'"start_time":{web["status"]["start_time"]}']
    member, auditor = people.person("member", acme), people.person("auditor")
    shown = told(daemon, member.secret, targets)
    for target, (status, _, body) in shown.items():
        text = body.decode("utf-8", "replace")
        if status == 200 and "/openapi.json" not in target and "/schema" not in target:
            assert not [each for each in (*texts, *numbers) if each in text], target
            assert not [key for key in HIDDEN if f'"{key}":' in text], target
    whole = str([body for _, _, body in told(daemon, auditor.secret, targets).values()])
    assert sum(f'"{key}":' in whole for key in HIDDEN) > 5 and all(each in whole for each in texts[1:]), "the control"


def write(people: People, tenant: str, writes: int) -> None:
    """Make, change and remove objects of each kind, so many times."""
    operator, done = people.operator, 0
    operator.images.import_(tenant, "theirs", [rootfs(2)])
    for number in itertools.count():
        if done >= writes:
            break
        name = f"x{number}"
        operator.instances.run(tenant, "busybox", ["true"], name=name, networks=[], start=False)
        operator.images.tag(tenant, "theirs", name)
        operator.identities.create_service_account(tenant, name)
        operator.identities.bind(f"{tenant}/{name}", "viewer", tenant)
        operator.identities.create_token(f"{tenant}/{name}")
        operator.instances.update(tenant, name, pids=100 + number)
        operator.tenants.update(tenant, pids=1000 + number)
        done += 7
        if number % 2:  # half of what there is goes again
            operator.instances.remove(tenant, name)
            operator.images.remove(tenant, name)
            operator.identities.remove_service_account(tenant, name)
            done += 3
        if number % 10 == 0:
            operator.networks.create(tenant, name, f"10.{number // 10 + 1}.0.0/24")
            operator.instances.run(tenant, "busybox", ["sleep", "600"], name=f"y{number}", networks=[{"network": name}])
            done += 2
    operator.images.remove(tenant, "theirs")


def test_what_a_tenant_sees_does_not_change_while_another_works(
    daemon: Daemon, houses: Houses, people: People, targets: list[str]
) -> None:
    """Status, fields and body of every answer that does not tell a time. No number counts what others do."""
    acme, globex = str(houses.acme.tenant), str(houses.globex.tenant)
    member = people.person("member", acme)
    before = told(daemon, member.secret, targets)
    missing = [target for target, (status, _, _) in before.items() if status not in (200, 403)]
    assert len(targets) > 20 and missing == [], missing
    assert sum(status == 200 for status, _, _ in before.values()) > 15
    revision = people.operator.host.status()["revision"]
    try:
        write(people, globex, WRITES)
        assert people.operator.host.status()["revision"] >= revision + WRITES, "the control: the store has them"
        after = told(daemon, member.secret, targets)
        for target in targets:
            assert after[target] == before[target], target
    finally:
        for account in people.operator.identities.service_accounts(globex):
            people.operator.identities.remove_service_account(globex, account["principal"]["name"])
    people.operator.instances.update(acme, "web", pids=77)
    changed = told(daemon, member.secret, targets)
    assert any(changed[target] != before[target] for target in targets), "the control: one's own changes are seen"
    assert not re.search(globex, str(changed)), "and the other one is named nowhere"
