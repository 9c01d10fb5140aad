"""/v1/tenants/{tenant}/instances: instances, their life cycle, input and output."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from litestar import Controller, Request, delete, get, patch, post, put
from litestar.params import JSONBody
from litestar.response import Response, Stream
from litestar.types import ASGIApp

from insula.api.audit import announce, is_recorded, note
from insula.api.duplex import Duplex, opening
from insula.api.pages import ListPage, Paged
from insula.api.parameters import (
    AnyRequest,
    Cells,
    Flag,
    HowToCopy,
    Inside,
    Name,
    NewName,
    Plane,
    Sender,
    SignalName,
    Since,
    Tail,
    TenantName,
    Timeout,
)
from insula.api.server_sent import output, server_sent, wanted
from insula.api.streams import FRAMES, PNG, TAR, archive, frames, primed, upload, while_connected
from insula.control.identities.authority import Authority
from insula.control.plane import ControlPlane
from insula.model.disks import FurtherDisk
from insula.model.errors import Invalid
from insula.model.guests import GuestReport
from insula.model.objects import ConsoleSize, Exit, InstanceSpec, NetworkAttachment
from insula.model.views import ExecSpec, Explanation, InstancePatch, InstanceView, ProcessView, PublishedPatch, Started

ARGUMENTS = "insula-audit-arguments"
"""The label of tenants whose audit log has the arguments of `exec`."""


@get(
    "/instances",
    tags=["instances"],
    summary="List the instances of all tenants that one may see",
    permission="self.read",
)
async def list_all_instances(plane: Plane, sender: Sender, selected: Paged) -> list[InstanceView]:
    if sender.sees_host:
        return _page(selected, await plane.instances.list(None))
    tenants = sorted(sender.tenants)
    return _page(selected, [view for tenant in tenants for view in await _seen(plane, sender, tenant)])


def _page(page: ListPage, views: Sequence[InstanceView]) -> list[InstanceView]:
    return page.of(
        views,
        lambda view: view.instance.name,
        key=lambda view: f"{view.instance.tenant}/{view.instance.name}",
        labels=lambda view: view.instance.spec.labels,
        state=lambda view: view.status.state,
    )


async def _seen(plane: ControlPlane, sender: Authority, tenant: str) -> list[InstanceView]:
    """Return the tenant's instances that the sender may see: with a token for some labels, those that have them."""
    views = await plane.instances.list(tenant)
    return [view for view in views if sender.labels.items() <= view.instance.spec.labels.items()]


@post(
    "/tenants/{tenant:str}/run",
    status_code=200,
    request_max_body_size=None,
    tags=["instances"],
    summary="Create an instance, attach to it, and start it: frames, both ways",
    permission="instance.write",
    quota="exec_sessions",
    takes=FRAMES,
    opens=InstanceSpec,
    sends=FRAMES,
)
async def run_attached(
    plane: Plane,
    tenant: TenantName,
    request: Request[Any, Any, Any],
    sender: Sender,
    rows: Cells = None,
    columns: Cells = None,
) -> ASGIApp:
    """The body's first frame is OPEN with an `InstanceSpec`. The field x-insula-name of the answer has its name."""
    spec, incoming = await opening(request, InstanceSpec)
    note(name=spec.name)
    size = None if rows is None or columns is None else ConsoleSize(rows=rows, columns=columns)
    name, streams, started = await plane.instances.run_attached(tenant, spec, size, by=sender)
    note(name=name)

    async def signal(number: int) -> None:
        await plane.instances.kill(tenant, name, str(number))

    return Duplex(
        lambda: streams,
        begin=lambda: started,
        signal=signal,
        incoming=incoming,
        headers=[(b"x-insula-name", name.encode())],
    )


class InstanceRoutes(Controller):
    path = "/tenants/{tenant:str}/instances"
    tags = ("instances",)

    @get(summary="List a tenant's instances", permission="instance.read")
    async def list_instances(
        self, plane: Plane, tenant: TenantName, sender: Sender, selected: Paged
    ) -> list[InstanceView]:
        return _page(selected, await _seen(plane, sender, tenant))

    @post(summary="Create an instance, and start it unless `start` is false", permission="instance.write")
    async def run(
        self, plane: Plane, tenant: TenantName, data: JSONBody[InstanceSpec], sender: Sender, start: Flag = True
    ) -> InstanceView:
        note(name=data.name)
        view = await plane.instances.run(tenant, data, by=sender, start=start)
        note(name=view.instance.name)
        return view

    @get("/{name:str}", summary="Show an instance's wanted and measured state", permission="instance.read")
    async def get_instance(self, plane: Plane, tenant: TenantName, name: Name) -> InstanceView:
        return await plane.instances.get(tenant, name)

    @patch(
        "/{name:str}",
        summary="Change limits and labels, at once if it runs: absent ones stay, null is no limit, and no label",
        permission="instance.write",
    )
    async def update(
        self, plane: Plane, sender: Sender, tenant: TenantName, name: Name, data: JSONBody[InstancePatch]
    ) -> InstanceView:
        return await plane.instances.update(tenant, name, data, sender.labels)

    @post(
        "/{name:str}/published",
        status_code=200,
        summary="Publish further ports of it, and withdraw others, at once",
        permission="instance.write",
    )
    async def publish(
        self, plane: Plane, tenant: TenantName, name: Name, data: JSONBody[PublishedPatch]
    ) -> InstanceView:
        return await plane.instances.publish(tenant, name, data)

    @delete("/{name:str}", summary="Remove an instance; with `force`, also one that runs", permission="instance.write")
    async def remove(self, plane: Plane, tenant: TenantName, name: Name, force: Flag = False) -> None:
        await plane.instances.remove(tenant, name, force=force)

    @post(
        "/{name:str}/ports",
        status_code=200,
        summary="Connect it to one more network, at once if it runs",
        permission="instance.write",
    )
    async def plug(
        self, plane: Plane, tenant: TenantName, name: Name, data: JSONBody[NetworkAttachment]
    ) -> InstanceView:
        note(network=data.network)
        return await plane.instances.plug(tenant, name, data)

    @delete(
        "/{name:str}/ports/{port:str}",
        summary="Disconnect it from a network, named by that or by its interface",
        permission="instance.write",
    )
    async def unplug(self, plane: Plane, tenant: TenantName, name: Name, port: Name) -> None:
        note(port=port)
        await plane.instances.unplug(tenant, name, port)

    @post(
        "/{name:str}/disks",
        status_code=200,
        summary="Give a virtual machine one more disk, at once if it runs",
        permission="instance.write",
    )
    async def add_disk(self, plane: Plane, tenant: TenantName, name: Name, data: JSONBody[FurtherDisk]) -> InstanceView:
        note(disk=data.name, size=data.size)
        return await plane.disks.add(tenant, name, data)

    @delete(
        "/{name:str}/disks/{disk:str}",
        summary="Remove a disk of a virtual machine, with what is on it; not while the guest uses it",
        permission="instance.write",
    )
    async def remove_disk(self, plane: Plane, tenant: TenantName, name: Name, disk: Name) -> None:
        note(disk=disk)
        await plane.disks.remove(tenant, name, disk)

    @post("/{name:str}/rename", status_code=200, summary="Give it another name", permission="instance.write")
    async def rename(self, plane: Plane, tenant: TenantName, name: Name, to: NewName) -> InstanceView:
        note(to=to)
        return await plane.instances.rename(tenant, name, to)

    @post(
        "/{name:str}/processes",
        summary="Run a further process in the background, without input and output",
        permission="instance.exec",
    )
    async def exec_detached(self, plane: Plane, tenant: TenantName, name: Name, data: JSONBody[ExecSpec]) -> Started:
        await _announce_program(plane, tenant, data)
        return Started(id=await plane.instances.exec_create(tenant, name, data, detach=True))

    @post("/{name:str}/start", status_code=200, summary="Start it", permission="instance.write")
    async def start(
        self, plane: Plane, tenant: TenantName, name: Name, sender: Sender, cold: Flag = False
    ) -> InstanceView:
        """With `cold` a virtual machine is booted, whatever it could go on from."""
        return await plane.instances.start(tenant, name, by=sender, cold=cold)

    @post(
        "/{name:str}/stop",
        status_code=200,
        summary="Stop it: its stop signal, then SIGKILL",
        permission="instance.write",
    )
    async def stop(self, plane: Plane, tenant: TenantName, name: Name, timeout: Timeout = None) -> InstanceView:
        return await plane.instances.stop(tenant, name, timeout)

    @post("/{name:str}/restart", status_code=200, summary="Stop and start it", permission="instance.write")
    async def restart(
        self, plane: Plane, tenant: TenantName, name: Name, sender: Sender, timeout: Timeout = None
    ) -> InstanceView:
        return await plane.instances.restart(tenant, name, timeout, by=sender)

    @post("/{name:str}/pause", status_code=200, summary="Freeze all of its processes", permission="instance.write")
    async def pause(self, plane: Plane, tenant: TenantName, name: Name) -> InstanceView:
        return await plane.instances.pause(tenant, name)

    @post("/{name:str}/unpause", status_code=200, summary="Resume its processes", permission="instance.write")
    async def unpause(self, plane: Plane, tenant: TenantName, name: Name) -> InstanceView:
        return await plane.instances.unpause(tenant, name)

    @post("/{name:str}/kill", status_code=204, summary="Send a signal to its PID 1", permission="instance.write")
    async def kill(self, plane: Plane, tenant: TenantName, name: Name, signal: SignalName = "SIGKILL") -> None:
        note(signal=signal)
        await plane.instances.kill(tenant, name, signal)

    @post(
        "/{name:str}/wait",
        status_code=200,
        summary="Wait until its PID 1 has exited",
        permission="instance.read",
        repeatable=True,
        quota="streams",
    )
    async def wait(self, plane: Plane, tenant: TenantName, name: Name, request: Request[Any, Any, Any]) -> Exit:
        return await while_connected(request, plane.instances.wait(tenant, name))

    @get("/{name:str}/top", summary="Its processes, with their PIDs inside and on the host", permission="instance.read")
    async def top(self, plane: Plane, tenant: TenantName, name: Name) -> Sequence[ProcessView]:
        return await plane.instances.processes(tenant, name)

    @get("/{name:str}/explain", summary="Its isolation, read from the kernel", permission="instance.read")
    async def explain(self, plane: Plane, tenant: TenantName, name: Name) -> Explanation:
        return await plane.instances.explain(tenant, name)

    @get(
        "/{name:str}/logs",
        summary="Its output so far: frames, each payload begins with a timestamp, 8 bytes of nanoseconds",
        permission="instance.logs",
        quota="streams",
        sends=FRAMES,
        server_sent=True,
    )
    async def logs(
        self,
        plane: Plane,
        tenant: TenantName,
        name: Name,
        sender: Sender,
        request: AnyRequest,
        follow: Flag = False,
        tail: Tail = None,
        since: Since = None,
    ) -> Stream:
        found = plane.instances.logs(tenant, name, follow=follow, tail=tail, since=since)
        pieces = await while_connected(request, primed(found))
        return server_sent(output(pieces), sender) if wanted(request) else frames(pieces)

    @get(
        "/{name:str}/archive",
        summary="The file or tree at `path` as a tar",
        permission="instance.files",
        quota="streams",
        sends=TAR,
    )
    async def archive_get(
        self, plane: Plane, tenant: TenantName, name: Name, path: Inside, request: Request[Any, Any, Any]
    ) -> Stream:
        return archive(await while_connected(request, primed(plane.instances.archive_get(tenant, name, path))))

    @put(
        "/{name:str}/archive",
        status_code=204,
        request_max_body_size=None,
        summary="Unpack a tar, the request's body, into the directory `path`",
        permission="instance.files",
        takes=TAR,
    )
    async def archive_put(
        self,
        plane: Plane,
        tenant: TenantName,
        name: Name,
        path: Inside,
        request: Request[Any, Any, Any],
        copy: HowToCopy = None,
    ) -> None:
        await plane.instances.archive_put(tenant, name, path, upload(request), copy)

    @get(
        "/{name:str}/export",
        summary="Its root file system as a tar, without its mounts",
        permission="instance.files",
        quota="streams",
        sends=TAR,
    )
    async def export(self, plane: Plane, tenant: TenantName, name: Name, request: Request[Any, Any, Any]) -> Stream:
        return archive(await while_connected(request, primed(plane.instances.export(tenant, name))))

    @get(
        "/{name:str}/screenshot",
        summary="A picture of its screen, if it is a machine of a disk image",
        permission="instance.attach",
        quota="streams",
        sends=PNG,
    )
    async def screenshot(self, plane: Plane, tenant: TenantName, name: Name) -> Response[bytes]:
        return Response(await plane.instances.screenshot(tenant, name), media_type=PNG)

    @get(
        "/{name:str}/guest",
        summary="What the system in it says of itself, if it is a machine of a disk image with the agent of QEMU",
        permission="instance.read",
        quota="streams",
    )
    async def guest(self, plane: Plane, tenant: TenantName, name: Name) -> GuestReport:
        """It is the guest's word, and decides nothing. Without an agent that answers in time, `answered` is false."""
        return await plane.instances.guest_report(tenant, name)

    @post(
        "/{name:str}/vnc",
        status_code=200,
        request_max_body_size=None,
        summary="Its screen, keyboard and pointer by VNC (RFC 6143): frames in both directions",
        permission="instance.attach",
        quota="exec_sessions",
        takes=FRAMES,
        sends=FRAMES,
    )
    async def vnc(self, plane: Plane, tenant: TenantName, name: Name) -> ASGIApp:
        """What a viewer sends is in frames of STDIN, and what it gets in frames of STDOUT. It is asked for no password,
        and the machine listens nowhere. Machines of disk images have a screen."""

        async def signal(number: int) -> None:
            raise Invalid("a screen takes no signals", "send frames of STDIN")

        return Duplex(lambda: plane.instances.vnc(tenant, name), signal=signal)

    @post(
        "/{name:str}/attach",
        status_code=200,
        request_max_body_size=None,
        summary="Its input and output: frames in both directions",
        permission="instance.attach",
        quota="exec_sessions",
        takes=FRAMES,
        sends=FRAMES,
    )
    async def attach(
        self,
        plane: Plane,
        tenant: TenantName,
        name: Name,
        sender: Sender,
        stdin: Flag = False,
        replay: Flag = False,
        start: Flag = False,
        rows: Cells = None,
        columns: Cells = None,
    ) -> ASGIApp:
        """Attach to an instance. With `start` it is started after that, so that no output is missed; its terminal has
        `rows` and `columns` from the start."""
        size = None if rows is None or columns is None else ConsoleSize(rows=rows, columns=columns)

        async def begin() -> None:
            if start:
                await plane.instances.start(tenant, name, size, by=sender)

        async def signal(number: int) -> None:
            await plane.instances.kill(tenant, name, str(number))

        return Duplex(
            lambda: plane.instances.attach(tenant, name, replay=replay, stdin=stdin, start=start),
            begin=begin,
            signal=signal,
        )

    @post(
        "/{name:str}/exec",
        status_code=200,
        request_max_body_size=None,
        summary="Run a further process in it: frames in both directions",
        permission="instance.exec",
        quota="exec_sessions",
        takes=FRAMES,
        opens=ExecSpec,
        sends=FRAMES,
    )
    async def exec(self, plane: Plane, tenant: TenantName, name: Name, request: Request[Any, Any, Any]) -> ASGIApp:
        """The body's first frame is OPEN with an `ExecSpec`."""
        spec, incoming = await opening(request, ExecSpec)
        await _announce_program(plane, tenant, spec)
        exec_id = await plane.instances.exec_create(tenant, name, spec)

        async def signal(number: int) -> None:
            await plane.instances.exec_kill(tenant, name, exec_id, number)

        return Duplex(
            lambda: plane.instances.exec_attach(tenant, name, exec_id, stdin=spec.stdin),
            signal=signal,
            incoming=incoming,
            owned=True,
        )


async def _announce_program(plane: ControlPlane, tenant: str, spec: ExecSpec) -> None:
    """Record what is about to be executed: the program, and how many arguments it has. Those may be secrets: they are
    recorded only for tenants with the label `ARGUMENTS`."""
    if not is_recorded():
        return
    note(program=next(iter(spec.command), None), arguments=max(0, len(spec.command) - 1))
    if (await plane.tenants.get(tenant)).tenant.labels.get(ARGUMENTS):
        note(command=shlex.join(spec.command))
    await announce()
