"""`InstanceOperations`: /v1/tenants/{tenant}/instances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Unpack

from msgspec import UNSET

from insula.model.disks import FurtherDisk
from insula.model.guests import GuestReport
from insula.model.migration import MigrationTarget, MigrationTicket
from insula.model.objects import ConsoleSize, Exit, InstanceSpec, NetworkAttachment, PublishedPort
from insula.model.snapshots import ForkSpec
from insula.model.views import ExecSpec, InstancePatch, PublishedPatch, Started, StatsSample
from insula.sdk import answers
from insula.sdk._sync.calls import Caller, request
from insula.sdk._sync.items import Items, as_sent, lines, log_outputs
from insula.sdk._sync.network import Pieces
from insula.sdk._sync.process import AttachedProcess
from insula.sdk.messages import HTTPRequest, Query
from insula.sdk.types import AnyExplanation, AnyInstance, AnyProcess, InstanceState, LogOutput, ResourceOptions


class InstanceOperations:
    """Instances, their life cycle, input and output. An archive is a tar in pieces."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def list(
        self,
        tenant: str | None = None,
        *,
        prefix: str | None = None,
        labels: Sequence[str] = (),
        state: InstanceState | None = None,
        page: int | None = None,
    ) -> Iterator[AnyInstance]:
        """Yield the instances of a tenant, or (None) of all tenants that one may see: those whose names begin with
        `prefix`, that have all `labels`, each NAME=VALUE, or NAME with any value, and that are in a state."""
        where = ("instances",) if tenant is None else ("tenants", tenant, "instances")
        query = {"prefix": prefix, "label": [*labels], "state": state}
        return self._caller.pages(answers.INSTANCES, *where, query=query, page=page)

    def get(self, tenant: str, name: str) -> AnyInstance:
        return self._caller.get(answers.INSTANCE, *_path(tenant, name))

    # -- life cycle ----------------------------------------------------------------------------------------------------

    def run(
        self, tenant: str, spec: InstanceSpec, *, start: bool = True, idempotency_key: str | None = None
    ) -> AnyInstance:
        """Create an instance, started unless `start` is False."""
        where = ("tenants", tenant, "instances")
        return self._caller.change(
            answers.INSTANCE, "POST", *where, body=spec, query={"start": start}, key=idempotency_key
        )

    def update(
        self,
        tenant: str,
        name: str,
        *,
        labels: Mapping[str, str | None] | None = None,
        cdrom: str | None = None,
        eject: bool = False,
        idempotency_key: str | None = None,
        **limits: Unpack[ResourceOptions],
    ) -> AnyInstance:
        """Change the given limits and labels, at once if it runs. A label with the value None is removed. `cdrom` is
        the image of a CD for the drive of a virtual machine; with `eject` all CDs are taken out of its drives."""
        new = UNSET if labels is None else dict(labels)
        patch = InstancePatch(labels=new, cdrom=None if eject else cdrom or UNSET, **limits)
        return self._caller.change(answers.INSTANCE, "PATCH", *_path(tenant, name), body=patch, key=idempotency_key)

    def publish(
        self,
        tenant: str,
        name: str,
        *,
        publish: Sequence[PublishedPort] = (),
        withdraw: Sequence[PublishedPort] = (),
        idempotency_key: str | None = None,
    ) -> AnyInstance:
        """Publish further ports of it, and withdraw others, at once."""
        patch = PublishedPatch(publish=[*publish], withdraw=[*withdraw])
        return self._caller.change(
            answers.INSTANCE, "POST", *_path(tenant, name), "published", body=patch, key=idempotency_key
        )

    def rename(self, tenant: str, name: str, to: str, *, idempotency_key: str | None = None) -> AnyInstance:
        return self._act(tenant, name, "rename", idempotency_key, {"to": to})

    def plug(
        self, tenant: str, name: str, attachment: NetworkAttachment, *, idempotency_key: str | None = None
    ) -> AnyInstance:
        """Connect it to one more network, at once if it runs."""
        return self._caller.change(
            answers.INSTANCE, "POST", *_path(tenant, name), "ports", body=attachment, key=idempotency_key
        )

    def unplug(self, tenant: str, name: str, port: str, *, idempotency_key: str | None = None) -> None:
        """Disconnect it from a network. `port` is the name of the network, or of the interface, as in eth1."""
        self._caller.do("DELETE", *_path(tenant, name), "ports", port, key=idempotency_key)

    def add_disk(
        self, tenant: str, name: str, further: FurtherDisk, *, idempotency_key: str | None = None
    ) -> AnyInstance:
        """Give a virtual machine one more disk, at once if it runs."""
        return self._caller.change(
            answers.INSTANCE, "POST", *_path(tenant, name), "disks", body=further, key=idempotency_key
        )

    def remove_disk(self, tenant: str, name: str, disk_name: str, *, idempotency_key: str | None = None) -> None:
        """Remove a disk of a virtual machine, with what is on it."""
        self._caller.do("DELETE", *_path(tenant, name), "disks", disk_name, key=idempotency_key)

    def start(self, tenant: str, name: str, *, cold: bool = False, idempotency_key: str | None = None) -> AnyInstance:
        """Start it. A virtual machine that is to be `cold` is booted, whatever it could go on from."""
        return self._act(tenant, name, "start", idempotency_key, {"cold": cold})

    def fork(
        self, tenant: str, name: str, *, count: int = 1, idempotency_key: str | None = None
    ) -> Sequence[AnyInstance]:
        """Make copies of it while it runs, with its memory. Each has a name, addresses and an identity of its own."""
        where, spec = (*_path(tenant, name), "fork"), ForkSpec(count=count)
        return self._caller.change(answers.INSTANCES, "POST", *where, body=spec, key=idempotency_key)

    def migration_ticket(self, tenant: str, *, idempotency_key: str | None = None) -> MigrationTicket:
        """Ask this host for a ticket, by which another host may send it one instance."""
        where = ("tenants", tenant, "migrations")
        return self._caller.change(answers.MIGRATION_TICKET, "POST", *where, key=idempotency_key)

    def migrate(
        self, tenant: str, name: str, migration: MigrationTarget, *, idempotency_key: str | None = None
    ) -> None:
        """Move a virtual machine to another host while it runs, with the ticket of there."""
        self._caller.do("POST", *_path(tenant, name), "migrate", body=migration, key=idempotency_key)

    def stop(
        self, tenant: str, name: str, *, timeout: float | None = None, idempotency_key: str | None = None
    ) -> AnyInstance:
        """Stop an instance by its stop signal, then SIGKILL after `timeout` seconds; None is its spec's."""
        return self._act(tenant, name, "stop", idempotency_key, {"timeout": timeout})

    def restart(
        self, tenant: str, name: str, *, timeout: float | None = None, idempotency_key: str | None = None
    ) -> AnyInstance:
        return self._act(tenant, name, "restart", idempotency_key, {"timeout": timeout})

    def pause(self, tenant: str, name: str, *, idempotency_key: str | None = None) -> AnyInstance:
        """Freeze all of its processes."""
        return self._act(tenant, name, "pause", idempotency_key)

    def unpause(self, tenant: str, name: str, *, idempotency_key: str | None = None) -> AnyInstance:
        return self._act(tenant, name, "unpause", idempotency_key)

    def kill(self, tenant: str, name: str, *, signal: str = "SIGKILL", idempotency_key: str | None = None) -> None:
        """Send a signal to its PID 1."""
        query = {"signal": signal}
        self._caller.do("POST", *_path(tenant, name), "kill", query=query, key=idempotency_key)

    def wait(self, tenant: str, name: str) -> Exit:
        """Wait until its PID 1 has exited."""
        return self._caller.change(answers.EXIT, "POST", *_path(tenant, name), "wait", key=None)

    def remove(self, tenant: str, name: str, *, force: bool = False, idempotency_key: str | None = None) -> None:
        """Remove an instance. Conflict while it runs, unless `force`, which kills it."""
        self._caller.do("DELETE", *_path(tenant, name), query={"force": force}, key=idempotency_key)

    # -- a look at it --------------------------------------------------------------------------------------------------

    def top(self, tenant: str, name: str) -> Sequence[AnyProcess]:
        """Return its processes."""
        return self._caller.get(answers.PROCESSES, *_path(tenant, name), "top")

    def explain(self, tenant: str, name: str) -> AnyExplanation:
        """Return its isolation, read from the kernel."""
        return self._caller.get(answers.EXPLANATION, *_path(tenant, name), "explain")

    def stats(self, tenant: str, name: str, *, interval: float | None = None) -> Items[StatsSample]:
        """Yield its usage: once, or every `interval` seconds."""
        sent = request("GET", *_path(tenant, name), "stats", query={"interval": interval})
        return Items(self._caller, sent, lines(answers.STATS_SAMPLE))

    def logs(
        self, tenant: str, name: str, *, follow: bool = False, tail: int | None = None, since: float | None = None
    ) -> Items[LogOutput]:
        """Yield its output so far, with `follow` also what comes: only the last `tail` lines, and since a time (seconds
        since the epoch)."""
        query = {"follow": follow, "tail": tail, "since": since}
        return Items(self._caller, request("GET", *_path(tenant, name), "logs", query=query), log_outputs)

    # -- processes -----------------------------------------------------------------------------------------------------

    def exec(
        self,
        tenant: str,
        name: str,
        command: Sequence[str],
        *,
        stdin: bool = False,
        tty: bool = False,
        size: ConsoleSize | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        working_dir: str | None = None,
    ) -> AttachedProcess:
        """Run a further process in a running instance; with `stdin` it has an input, with `tty` a terminal."""
        spec = ExecSpec(
            command=[*command],
            stdin=stdin,
            tty=tty,
            console_size=size,
            env=dict(env or {}),
            user=user,
            working_dir=working_dir,
        )
        return AttachedProcess(self._caller, _post(*_path(tenant, name), "exec"), spec)

    def exec_detached(
        self,
        tenant: str,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        working_dir: str | None = None,
        idempotency_key: str | None = None,
    ) -> Started:
        """Run a further process in the background: it has no input, and its output is discarded."""
        spec = ExecSpec(command=[*command], env=dict(env or {}), user=user, working_dir=working_dir)
        where = (*_path(tenant, name), "processes")
        return self._caller.change(answers.STARTED, "POST", *where, body=spec, key=idempotency_key)

    def attach(
        self,
        tenant: str,
        name: str,
        *,
        stdin: bool = False,
        replay: bool = False,
        start: bool = False,
        size: ConsoleSize | None = None,
    ) -> AttachedProcess:
        """Attach to an instance's output, with `replay` from the start of its log, and with `stdin` to its input.
        `start` starts it after that, so that no output is missed; `size` is then that of its terminal."""
        query = {"stdin": stdin, "replay": replay, "start": start, **_extent(size)}
        return AttachedProcess(self._caller, _post(*_path(tenant, name), "attach", query=query))

    def run_attached(self, tenant: str, spec: InstanceSpec, *, size: ConsoleSize | None = None) -> AttachedProcess:
        """Create an instance, attach to it, and start it. `name` of the result is that of the instance."""
        return AttachedProcess(self._caller, _post("tenants", tenant, "run", query=_extent(size)), spec)

    # -- files ---------------------------------------------------------------------------------------------------------

    def archive_get(self, tenant: str, name: str, path: str) -> Items[bytes]:
        """Yield an archive with the file or tree at `path`."""
        sent = request("GET", *_path(tenant, name), "archive", query={"path": path})
        return Items(self._caller, sent, as_sent)

    def archive_put(
        self,
        tenant: str,
        name: str,
        path: str,
        archive: Pieces,
        *,
        copy: Literal["tree", "content"] | None = None,
    ) -> None:
        """Unpack an archive into the directory `path`.

        `copy` is for an archive of one tree, as with cp(1): "tree" puts it into `path` if that is a directory, else
        makes it `path`; "content" puts its content into the directory `path`.
        """
        where = (*_path(tenant, name), "archive")
        self._caller.upload(answers.nothing, "PUT", *where, pieces=archive, query={"path": path, "copy": copy})

    def export(self, tenant: str, name: str) -> Items[bytes]:
        """Yield an archive with the root file system, without its mounts."""
        return Items(self._caller, request("GET", *_path(tenant, name), "export"), as_sent)

    def screenshot(self, tenant: str, name: str) -> bytes:
        """A picture of the screen of a virtual machine of a disk image, a PNG."""
        return self._caller.read(*_path(tenant, name), "screenshot")

    def guest(self, tenant: str, name: str) -> GuestReport:
        """What the system in a virtual machine of a disk image says of itself, by the agent of QEMU."""
        return self._caller.get(answers.GUEST_REPORT, *_path(tenant, name), "guest")

    def vnc(self, tenant: str, name: str) -> AttachedProcess:
        """The screen of a virtual machine of a disk image by VNC (RFC 6143): write what a viewer sends, and read what
        it gets."""
        return AttachedProcess(self._caller, _post(*_path(tenant, name), "vnc"))

    def _act(self, tenant: str, name: str, verb: str, key: str | None, query: Query = None) -> AnyInstance:
        return self._caller.change(answers.INSTANCE, "POST", *_path(tenant, name), verb, query=query, key=key)


def _path(tenant: str, name: str) -> tuple[str, ...]:
    return ("tenants", tenant, "instances", name)


def _post(*path: str, query: Query = None) -> HTTPRequest:
    return request("POST", *path, query=query)


def _extent(size: ConsoleSize | None) -> dict[str, object]:
    return {} if size is None else {"rows": size.rows, "columns": size.columns}
