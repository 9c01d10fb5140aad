"""The client of the command line: the HTTP API as methods. Programs use `insula.sdk`, which is typed.

    >>> from insula.client import Client
    >>> client = Client()
    >>> client.tenants.create("acme", cpus=2)
    >>> client.networks.create("acme", "default", "10.0.0.0/24")
    >>> web = client.instances.run("acme", "busybox", ["httpd", "-f"], name="web")
    >>> client.instances.wait("acme", "web")

Objects are dicts, the structs of `insula.model` as JSON; a `spec` is an `InstanceSpec`. Errors are those of
`insula.model.errors`. A client may be shared between threads, because each request has a connection of its own. Only
the standard library is used.
"""

from __future__ import annotations

import os

from insula.client.http import Remote, Response, request, target
from insula.model.cpython import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from insula.client.attachment import Attachment
    from insula.client.declared import DeclaredResource
    from insula.client.disks import DisksResource
    from insula.client.endpoints import ServiceEndpointsResource
    from insula.client.floating_ips import FloatingIpsResource
    from insula.client.guarantees import GuaranteesResource
    from insula.client.host import HostResource
    from insula.client.identities import IdentitiesResource
    from insula.client.load_balancers import LoadBalancersResource
    from insula.client.migrations import MigrationsResource
    from insula.client.networks import NetworksResource
    from insula.client.peerings import PeeringsResource
    from insula.client.policies import AddressGroupsResource, OperatorPoliciesResource, PoliciesResource
    from insula.client.ports import PortsResource
    from insula.client.routers import RoutersResource
    from insula.client.snapshots import SnapshotsResource

    Object = dict[str, Any]
    Objects = list[Object]  # inside the classes below, `list` is a method

DEFAULT_RUN = "/run/insula"


def default_socket() -> str:
    """Return the daemon's socket: INSULA_SOCKET, else insulad.sock in INSULA_RUN, else /run/insula/insulad.sock; users
    who may not open that one use users.sock in its place."""
    if named := os.environ.get("INSULA_SOCKET"):
        return named
    run = os.environ.get("INSULA_RUN") or DEFAULT_RUN
    operators = os.path.join(run, "insulad.sock")
    return operators if os.access(operators, os.W_OK) else os.path.join(run, "users.sock")


class Client:
    """A client of one Insula daemon. `path` is its socket, `token` proves who sends requests (None: the user of this
    process). `remote` is another way to reach one, as `insula.client.https.HttpsRemote`. `timeout` is in seconds, for
    each step of a request; None is no timeout."""

    def __init__(
        self,
        path: str | None = None,
        *,
        token: str | None = None,
        timeout: float | None = None,
        remote: Remote | None = None,
    ) -> None:
        self.remote = remote or Remote(path or default_socket(), token)
        self.timeout = timeout
        self.tenants = TenantsResource(self)
        self.images = ImagesResource(self)
        self.instances = InstancesResource(self)

    @property
    def host(self) -> HostResource:
        """The host of the daemon."""
        from insula.client.host import HostResource

        return HostResource(self)

    @property
    def identities(self) -> IdentitiesResource:
        """Users, service accounts, their roles and tokens."""
        from insula.client.identities import IdentitiesResource

        return IdentitiesResource(self)

    @property
    def declared(self) -> DeclaredResource:
        """Declared state: apply, diff, dump."""
        from insula.client.declared import DeclaredResource

        return DeclaredResource(self)

    @property
    def networks(self) -> NetworksResource:
        """Private networks."""
        from insula.client.networks import NetworksResource

        return NetworksResource(self)

    @property
    def endpoints(self) -> ServiceEndpointsResource:
        """Service endpoints."""
        from insula.client.endpoints import ServiceEndpointsResource

        return ServiceEndpointsResource(self)

    @property
    def peerings(self) -> PeeringsResource:
        """Peerings with other tenants."""
        from insula.client.peerings import PeeringsResource

        return PeeringsResource(self)

    @property
    def policies(self) -> PoliciesResource:
        """Policies of tenants."""
        from insula.client.policies import PoliciesResource

        return PoliciesResource(self)

    @property
    def address_groups(self) -> AddressGroupsResource:
        """Address groups for policies."""
        from insula.client.policies import AddressGroupsResource

        return AddressGroupsResource(self)

    @property
    def operator_policies(self) -> OperatorPoliciesResource:
        """Policies of the operator."""
        from insula.client.policies import OperatorPoliciesResource

        return OperatorPoliciesResource(self)

    @property
    def routers(self) -> RoutersResource:
        """Routers between networks."""
        from insula.client.routers import RoutersResource

        return RoutersResource(self)

    @property
    def load_balancers(self) -> LoadBalancersResource:
        """Load balancers."""
        from insula.client.load_balancers import LoadBalancersResource

        return LoadBalancersResource(self)

    @property
    def floating_ips(self) -> FloatingIpsResource:
        """Floating addresses."""
        from insula.client.floating_ips import FloatingIpsResource

        return FloatingIpsResource(self)

    @property
    def guarantees(self) -> GuaranteesResource:
        """Floors and ceilings."""
        from insula.client.guarantees import GuaranteesResource

        return GuaranteesResource(self)

    @property
    def ports(self) -> PortsResource:
        """Connections of instances to networks."""
        from insula.client.ports import PortsResource

        return PortsResource(self)

    @property
    def disks(self) -> DisksResource:
        """Further disks of virtual machines."""
        from insula.client.disks import DisksResource

        return DisksResource(self)

    @property
    def migrations(self) -> MigrationsResource:
        """Moves of instances between hosts."""
        from insula.client.migrations import MigrationsResource

        return MigrationsResource(self)

    @property
    def snapshots(self) -> SnapshotsResource:
        """Snapshots of instances, and copies of those that run."""
        from insula.client.snapshots import SnapshotsResource

        return SnapshotsResource(self)

    def call(self, method: str, *segments: str, body: object = None, query: Mapping[str, object] | None = None) -> Any:
        """Send a request to /v1/SEGMENT/…?QUERY, and return the response's JSON."""
        with self.stream(method, *segments, body=body, query=query) as response:
            return response.json()

    def stream(
        self,
        method: str,
        *segments: str,
        body: object = None,
        upload: Iterable[bytes] | None = None,
        query: Mapping[str, object] | None = None,
    ) -> Response:
        """Send a request whose response the caller reads as it arrives, and closes."""
        where = target(*segments, **query or {})
        return request(self.remote, method, where, body=body, upload=upload, timeout=self.timeout)

    def lines(
        self, method: str, *segments: str, body: object = None, query: Mapping[str, object] | None = None
    ) -> Iterator[Object]:
        """Send a request whose response is JSON lines (ndjson); a line with an error is raised."""
        from insula.model.errors import from_dict

        with self.stream(method, *segments, body=body, query=query) as response:
            for line in response.lines():
                if line:
                    item = loads(line)
                    if "error" in item and "message" in item and "hint" in item:
                        raise from_dict(item)
                    yield item


class Resource:
    """A kind of object of the API."""

    def __init__(self, client: Client) -> None:
        self.client = client


class TenantsResource(Resource):
    def create(self, name: str, labels: dict[str, str] | None = None, **limits: float | int | None) -> Object:
        """Create a tenant. `limits`: cpus, memory (bytes), pids, instances, bandwidth (bit/s); None is no limit."""
        body = {"name": name, "limits": limits, "labels": labels or {}}
        return self.client.call("POST", "tenants", body=body)  # type: ignore[no-any-return]

    def list(self) -> Objects:
        return self.client.call("GET", "tenants")  # type: ignore[no-any-return]

    def get(self, name: str) -> Object:
        return self.client.call("GET", "tenants", name)  # type: ignore[no-any-return]

    def usage(self, name: str, since: float | None = None) -> Object:
        """Return what a tenant has used and reserved since a time (seconds since the epoch), or since it was created;
        with its instances, each since it was created."""
        return self.client.call("GET", "tenants", name, "usage", query={"since": since})  # type: ignore[no-any-return]

    def metrics(self, name: str) -> str:
        """Return the metrics of a tenant and its instances, in the text format of Prometheus."""
        with self.client.stream("GET", "tenants", name, "metrics") as response:
            return b"".join(response).decode()

    def usage_of_all(self, since: float | None = None, *, removed: bool = False) -> Objects:
        """Return the same of all tenants that one may see, without their instances; with `removed` of those that were
        removed since then."""
        return self.client.call("GET", "usage", query={"since": since, "removed": removed})  # type: ignore[no-any-return]

    def update(self, name: str, **changes: object) -> Object:
        """Change the given limits, as in `create`; None is no limit. In `labels`, None removes one."""
        return self.client.call("PATCH", "tenants", name, body=changes)  # type: ignore[no-any-return]

    def remove(self, name: str, *, force: bool = False) -> None:
        """Remove a tenant. Conflict while it has instances, networks or images, unless `force`, which removes these."""
        self.client.call("DELETE", "tenants", name, query={"force": force})


class ImagesResource(Resource):
    def list(self, tenant: str) -> Objects:
        """Return the tenant's images and the shared ones."""
        return self.client.call("GET", "tenants", tenant, "images")  # type: ignore[no-any-return]

    def get(self, tenant: str, name: str) -> Object:
        return self.client.call("GET", "tenants", tenant, "images", name)  # type: ignore[no-any-return]

    def remove(self, tenant: str, name: str) -> None:
        self.client.call("DELETE", "tenants", tenant, "images", name)

    def pull(self, tenant: str, reference: str, **options: object) -> Iterator[Object]:
        """Pull from a registry; yields {"progress": line} and at last {"image": …}."""
        return self.client.lines("POST", "tenants", tenant, "images", "pull", body={"reference": reference, **options})

    def push(self, tenant: str, name: str, reference: str, **options: object) -> Iterator[Object]:
        body = {"name": name, "reference": reference, **options}
        return self.client.lines("POST", "tenants", tenant, "images", "push", body=body)

    def build_base(self, tenant: str, distribution: str, release: str | None = None) -> Iterator[Object]:
        body = {"distribution": distribution, "release": release}
        return self.client.lines("POST", "tenants", tenant, "images", "build-base", body=body)

    def load(self, tenant: str, archive: Iterable[bytes], name: str | None = None) -> Objects:
        """Import the images of an OCI layout or docker-archive, a tar in pieces; `name` is for one image."""
        with self.client.stream(
            "POST", "tenants", tenant, "images", "load", upload=archive, query={"name": name}
        ) as response:
            return response.json()  # type: ignore[no-any-return]

    def tag(self, tenant: str, source: str, name: str) -> Object:
        """Give the image `source` another name in addition."""
        body = {"source": source, "name": name}
        return self.client.call("POST", "tenants", tenant, "images", "tag", body=body)  # type: ignore[no-any-return]

    def import_(self, tenant: str, name: str, rootfs: Iterable[bytes]) -> Object:
        """Make an image from the tar of a root file system, in pieces."""
        with self.client.stream(
            "POST", "tenants", tenant, "images", "import", upload=rootfs, query={"name": name}
        ) as response:
            return response.json()  # type: ignore[no-any-return]

    def import_disk(self, tenant: str, name: str, disk: Iterable[bytes], **options: object) -> Object:
        """Make an image from a disk image, in pieces. Options: format (raw, qcow2 or iso), firmware (bios or
        uefi), devices (full or para)."""
        query = {"name": name, **options}
        with self.client.stream(
            "POST", "tenants", tenant, "images", "import-disk", upload=disk, query=query
        ) as response:
            return response.json()  # type: ignore[no-any-return]

    def save(self, tenant: str, names: Sequence[str], format: str = "oci") -> Response:  # noqa: A002
        """Save images in one archive, a tar: read the response, and close it."""
        body = {"names": [*names], "format": format}
        return self.client.stream("POST", "tenants", tenant, "images", "save", body=body)


class InstancesResource(Resource):
    def run(
        self, tenant: str, image: str, command: Sequence[str] | None = None, *, start: bool = True, **spec: object
    ) -> Object:
        """Create an instance, started unless `start` is False. `spec` are fields of `InstanceSpec`."""
        body = {"image": image, "command": [*(command or ())], **spec}
        return self.client.call("POST", "tenants", tenant, "instances", body=body, query={"start": start})  # type: ignore[no-any-return]

    def list(self, tenant: str | None = None) -> Objects:
        """Return the tenant's instances; those of all tenants for None."""
        where = ("instances",) if tenant is None else ("tenants", tenant, "instances")
        return self.client.call("GET", *where)  # type: ignore[no-any-return]

    def get(self, tenant: str, name: str) -> Object:
        return self._call("GET", tenant, name)  # type: ignore[no-any-return]

    def remove(self, tenant: str, name: str, *, force: bool = False) -> None:
        """Remove an instance. Conflict while it runs, unless `force`, which kills it."""
        self._call("DELETE", tenant, name, force=force)

    def rename(self, tenant: str, name: str, to: str) -> Object:
        return self._call("POST", tenant, name, "rename", to=to)  # type: ignore[no-any-return]

    def start(self, tenant: str, name: str, *, cold: bool = False) -> Object:
        """Start an instance. A virtual machine that is to be `cold` is booted, whatever it could go on from."""
        return self._call("POST", tenant, name, "start", cold=cold)  # type: ignore[no-any-return]

    def stop(self, tenant: str, name: str, timeout: float | None = None) -> Object:
        """Stop an instance by its stop signal, then SIGKILL after `timeout` seconds (None: the spec's)."""
        return self._call("POST", tenant, name, "stop", timeout=timeout)  # type: ignore[no-any-return]

    def restart(self, tenant: str, name: str, timeout: float | None = None) -> Object:
        return self._call("POST", tenant, name, "restart", timeout=timeout)  # type: ignore[no-any-return]

    def update(self, tenant: str, name: str, **changes: object) -> Object:
        """Change the given limits, of cpus, memory (bytes), pids, disk (bytes) and inodes, where None is no limit, and
        `labels`, where it is no label. `cdrom` is the image of a CD for the drive of a machine; None
        takes all CDs out."""
        return self.client.call("PATCH", "tenants", tenant, "instances", name, body=changes)  # type: ignore[no-any-return]

    def publish(
        self, tenant: str, name: str, publish: Sequence[Object] = (), withdraw: Sequence[Object] = ()
    ) -> Object:
        """Publish further ports of an instance, and withdraw others. Each has "port", "target", "count", "protocol" and
        "address"."""
        body = {"publish": [*publish], "withdraw": [*withdraw]}
        where = "tenants", tenant, "instances", name, "published"
        return self.client.call("POST", *where, body=body)  # type: ignore[no-any-return]

    def pause(self, tenant: str, name: str) -> Object:
        """Freeze all processes of an instance."""
        return self._call("POST", tenant, name, "pause")  # type: ignore[no-any-return]

    def unpause(self, tenant: str, name: str) -> Object:
        return self._call("POST", tenant, name, "unpause")  # type: ignore[no-any-return]

    def kill(self, tenant: str, name: str, signal: str = "SIGKILL") -> None:
        self._call("POST", tenant, name, "kill", signal=signal)

    def wait(self, tenant: str, name: str) -> Object:
        """Wait until PID 1 has exited; returns {"exit_status", "signal", "oom", "finished"}."""
        return self._call("POST", tenant, name, "wait")  # type: ignore[no-any-return]

    def top(self, tenant: str, name: str) -> Objects:
        return self._call("GET", tenant, name, "top")  # type: ignore[no-any-return]

    def stats(
        self, tenant: str | None = None, names: Sequence[str] = (), *, interval: float | None = None
    ) -> Iterator[Object]:
        """Yield the usage of these instances, or of all running ones (of every tenant for None), as {"time",
        "instances"}: once, or every `interval` seconds."""
        where = ("stats",) if tenant is None else ("tenants", tenant, "stats")
        return self.client.lines("GET", *where, query={"name": [*names], "interval": interval})

    def screenshot(self, tenant: str, name: str) -> bytes:
        """Return a picture of the screen of a virtual machine, a PNG."""
        with self.client.stream("GET", "tenants", tenant, "instances", name, "screenshot") as response:
            return b"".join(response)

    def guest(self, tenant: str, name: str) -> Object:
        """Return what the system in a virtual machine of a disk image says of itself."""
        return self._call("GET", tenant, name, "guest")  # type: ignore[no-any-return]

    def vnc(self, tenant: str, name: str) -> Attachment:
        """Connect to the screen of a virtual machine: STDIN and STDOUT are those of a VNC viewer (RFC 6143)."""
        from insula.client.attachment import Attachment

        return Attachment(self.client.remote, target("tenants", tenant, "instances", name, "vnc"))

    def explain(self, tenant: str, name: str) -> Object:
        return self._call("GET", tenant, name, "explain")  # type: ignore[no-any-return]

    def logs(self, tenant: str, name: str, **options: object) -> Iterator[tuple[float, int, bytes]]:
        """Yield output as (time, kind, bytes), kind as in `model.stream`. Options: follow, tail, since (seconds)."""
        from insula.model.errors import from_dict
        from insula.model.stream import Decoder, Kind

        with self.client.stream("GET", "tenants", tenant, "instances", name, "logs", query=options) as response:
            decoder = Decoder()
            for data in response:
                for kind, payload in decoder.feed(data):
                    if kind == Kind.ERROR:
                        raise from_dict(loads(payload))
                    yield int.from_bytes(payload[:8], "big") / 1e9, kind, payload[8:]

    def attach(
        self,
        tenant: str,
        name: str,
        *,
        stdin: bool = False,
        replay: bool = False,
        start: bool = False,
        size: tuple[int, int] | None = None,
    ) -> Attachment:
        """Attach to an instance's output (with `replay`, from the start of its log), and to its input with `stdin`.

        `start` starts it after that, so that no output is missed; `size` is then that of its terminal, in rows and
        columns.
        """
        from insula.client.attachment import Attachment

        extent = dict(zip(("rows", "columns"), size or (), strict=False))
        options = {"stdin": stdin, "replay": replay, "start": start, **extent}
        where = target("tenants", tenant, "instances", name, "attach", **options)
        return Attachment(self.client.remote, where)

    def run_attached(self, tenant: str, *, size: tuple[int, int] | None = None, **spec: object) -> Attachment:
        """Create an instance of `spec`, attach to it, and start it: `run` and `attach` with `start`, in one request.

        The attachment has the instance's `name`; `size` is that of its terminal, in rows and columns.
        """
        from insula.client.attachment import Attachment

        extent = dict(zip(("rows", "columns"), size or (), strict=False))
        return Attachment(self.client.remote, target("tenants", tenant, "run", **extent), dumps(spec).encode())

    def exec(self, tenant: str, name: str, command: Sequence[str], **spec: object) -> Attachment:
        """Run a further process in a running instance. `spec` are fields of `ExecSpec`."""
        from insula.client.attachment import Attachment

        opening = dumps({"command": [*command], **spec}).encode()
        return Attachment(self.client.remote, target("tenants", tenant, "instances", name, "exec"), opening)

    def exec_detached(self, tenant: str, name: str, command: Sequence[str], **spec: object) -> Object:
        """Run a further process in the background: it has no input, and its output is discarded. Returns {"id"}."""
        where = ("tenants", tenant, "instances", name, "processes")
        return self.client.call("POST", *where, body={"command": [*command], **spec})  # type: ignore[no-any-return]

    def archive_get(self, tenant: str, name: str, path: str) -> Response:
        """Return the file or tree at `path` as a tar: read the response, and close it."""
        return self.client.stream("GET", "tenants", tenant, "instances", name, "archive", query={"path": path})

    def archive_put(self, tenant: str, name: str, path: str, archive: Iterable[bytes], copy: str | None = None) -> None:
        """Unpack a tar, in pieces, into the directory `path`.

        `copy` is for a tar of one tree, as with cp(1): "tree" puts it into `path` if that is a directory, else makes it
        `path`; "content" puts its content into the directory `path`.
        """
        where = ("tenants", tenant, "instances", name, "archive")
        self.client.stream("PUT", *where, upload=archive, query={"path": path, "copy": copy}).close()

    def export(self, tenant: str, name: str) -> Response:
        """Return the root file system as a tar, without its mounts: read the response, and close it."""
        return self.client.stream("GET", "tenants", tenant, "instances", name, "export")

    def _call(self, method: str, tenant: str, name: str, *rest: str, **query: object) -> Any:
        return self.client.call(method, "tenants", tenant, "instances", name, *rest, query=query)
