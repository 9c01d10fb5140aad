"""A client that openapi-python-client generates from /openapi.json makes the whole world of a tenant, by a token."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from insula.model.stream import Decoder, Kind
from tests.support.daemon import Daemon
from tests.support.wait import patiently
from tests.system.tenancy.conftest import Houses, People
from tests.system.tenancy.http import exchange

NAME = "generated_client"
STREAMS = (
    *("application/x-tar", "application/vnd.insula.frames", "application/x-ndjson", "application/yaml"),
    "image/png",
)


class Generated:
    """The generated package, and a client of it."""

    def __init__(self, socket: Path, token: str) -> None:
        self.models = importlib.import_module(f"{NAME}.models")
        self.types = importlib.import_module(f"{NAME}.types")
        module = importlib.import_module(f"{NAME}.client")
        self.client = module.AuthenticatedClient(
            base_url="http://insula",
            token=token,
            timeout=httpx.Timeout(patiently(60)),
            httpx_args={"transport": httpx.HTTPTransport(uds=str(socket))},
        )

    def call(self, tag: str, operation: str, *words: str, **arguments: Any) -> Any:
        """Call an operation; returns its status and what its answer was parsed to."""
        module = importlib.import_module(f"{NAME}.api.{tag}.{operation}")
        answer = module.sync_detailed(*words, client=self.client, **arguments)
        return int(answer.status_code), answer.parsed if answer.parsed is not None else answer.content

    def done(self, tag: str, operation: str, *words: str, **arguments: Any) -> Any:
        """Call an operation that must succeed; returns the answer."""
        status, answer = self.call(tag, operation, *words, **arguments)
        assert status < 300, answer
        return answer


@pytest.fixture(scope="module")
def package(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("generated")
    (directory / "openapi.json").write_bytes(exchange(daemon.run / "insulad.sock", "GET", "/openapi.json").body)
    overrides = "".join(f"  {kind}: application/octet-stream\n" for kind in (*STREAMS, "text/event-stream"))
    (directory / "config.yaml").write_text(f"post_hooks: []\ncontent_type_overrides:\n{overrides}")
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--path", "openapi.json", "--meta", "none"]
    command += ["--config", "config.yaml", "--output-path", NAME]
    made = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=patiently(120))
    assert made.returncode == 0 and "WARNING" not in made.stdout + made.stderr, made
    sys.path.insert(0, str(directory))
    yield directory / NAME
    sys.path.remove(str(directory))


@pytest.fixture(scope="module")
def api(package: Path, daemon: Daemon, people: People, houses: Houses) -> Iterator[Generated]:
    generated = Generated(daemon.run / "users.sock", people.person("admin", houses.acme.tenant).secret)
    with generated.client:
        yield generated


def rootfs() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        member = tarfile.TarInfo("greeting")
        member.size = 6
        tar.addfile(member, io.BytesIO(b"hello\n"))
    return target.getvalue()


def test_every_operation_has_a_function(package: Path) -> None:
    functions = {path.stem for path in (package / "api").glob("*/*.py")}
    assert {"create_network", "run", "logs", "exec_detached", "import_rootfs", "list_instances", "whoami"} <= functions
    assert len(functions) > 70


def test_the_whole_world_of_a_tenant(api: Generated, houses: Houses) -> None:
    tenant, models = str(houses.acme.tenant), api.models
    assert api.done("identities", "whoami").tenants.additional_properties == {tenant: "admin"}
    network = api.done(
        "networks", "create_network", tenant, body=models.NetworkSpec(name="made", subnet="10.44.0.0/24")
    ).network
    assert (network.gateway, network.mtu) == ("10.44.0.1", 1500)
    assert isinstance(network.vni, api.types.Unset), "a tenant is not sent what is of the host"

    api.done("images", "tag", tenant, body=models.TagSpec(source="busybox:latest", name="made:1"))
    payload = api.types.File(payload=io.BytesIO(rootfs()))
    assert api.done("images", "import_rootfs", tenant, body=payload, name="made:2").name == "made:2"
    assert {"made:1", "made:2"} <= {image.name for image in api.done("images", "list_images", tenant)}

    labels = models.InstanceSpecLabels.from_dict({"made": "yes"})
    spec = models.InstanceSpec(
        name="made",
        image="made:1",
        networks=[models.NetworkAttachment(network="made", address="10.44.0.7")],
        command=["sh", "-c", "echo up; trap 'exit 3' TERM; while :; do sleep 0.1; done"],
        labels=labels,
    )
    view = api.done("instances", "run", tenant, body=spec, idempotency_key="made-by-generated")
    again = api.done("instances", "run", tenant, body=spec, idempotency_key="made-by-generated")
    assert view.instance.id == again.instance.id and view.status.state == "running"
    assert view.instance.ports[0].address == "10.44.0.7"
    [found] = api.done(
        "instances", "list_instances", tenant, label=["made=yes"], state=models.ListInstancesState.RUNNING, limit=10
    )
    assert found.instance.name == "made"

    assert api.done("instances", "exec_detached", tenant, "made", body=models.ExecSpec(command=["true"])).id
    output: Any = b""
    while b"up\n" not in output:
        frames = api.done("instances", "logs", tenant, "made")
        data = frames.payload.read() if hasattr(frames, "payload") else frames
        output = b"".join(text[8:] for kind, text in Decoder().feed(data) if kind is Kind.STDOUT)

    assert api.done("instances", "stop", tenant, "made", timeout=10.0).status.state == "exited"
    assert api.done("instances", "wait", tenant, "made").exit_status == 3
    api.done("instances", "remove", tenant, "made")
    api.done("images", "remove_image", tenant, "made:2")
    api.done("networks", "remove_network", tenant, "made")
    assert api.call("networks", "get_network", tenant, "made")[0] == 404


def test_errors_are_parsed(api: Generated, houses: Houses) -> None:
    status, problem = api.call("networks", "get_network", str(houses.globex.tenant), "default")
    assert (status, problem.code, problem.detail) == (404, "NotFound", f"there is no tenant {houses.globex.tenant}")
    wrong = api.models.NetworkSpec(name="Not a label", subnet="10.0.0.0/24")
    status, problem = api.call("networks", "create_network", str(houses.acme.tenant), body=wrong)
    assert (status, problem.code) == (400, "Invalid") and problem.hint
