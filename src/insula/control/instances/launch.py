"""One instance's way from a directory to a running process, and back. No policy here: see supervisor.py.

    instances/ID/upper, work    the writable layer of the root (overlayfs); upper belongs to the tenant's user 0
    instances/ID/etc            hostname, hosts and resolv.conf, bind-mounted over the image's
    instances/ID/log            what it printed
    instances/ID/launch.json    the last launch that was begun: generation and boot

`launch.json` is written before the container is made, and a container is deleted only after its end was stored. So
after a crash at any point, record, container and stored status together tell what had happened. Only of an instance
that is removed when it ends the end isn't stored: nobody could ask for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec

from insula.container.runtime import Launch, State
from insula.control.context import Context
from insula.control.instances.drivers.container.spec import config
from insula.control.instances.drivers.container.users import User, resolve
from insula.control.keys import NETWORKS
from insula.kernel import records, trees
from insula.model.errors import Conflict, Failed, InsulaError, Invalid, NotFound, Unavailable
from insula.model.objects import ConsoleSize, Instance, InstanceSpec, Network, Struct, Tenant
from insula.model.views import ExecSpec

_SAID = 1 << 16
_SLEEP = "/dev/sleep"  # busybox goes by the name that it is called by


class LaunchRecord(Struct, kw_only=True):
    """Which start was begun last, and in which life of the host (/proc/sys/kernel/random/boot_id, random(4))."""

    generation: int
    boot: str


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Directory:
    """The directory of one instance."""

    def __init__(self, root: Path, instance_id: str) -> None:
        self.path = root / instance_id
        self.upper, self.work = self.path / "upper", self.path / "work"
        self.etc, self.log = self.path / "etc", self.path / "log"

    def make(self, id_base: int) -> None:
        if (self.work / "work" / "incompat" / "volatile").exists():
            # overlayfs refuses to mount a volatile upper layer again after a crash, for it may be incomplete
            trees.remove(self.upper)
            trees.remove(self.work)
        for path in (self.path, self.upper, self.work, self.log, self.etc):
            if path.is_symlink() or (path.exists() and not path.is_dir()):  # something else of that name
                trees.remove(path)
        for path in (self.path, self.work, self.log, self.etc):
            path.mkdir(mode=0o700, exist_ok=True)
        self.etc.chmod(0o755)
        if not self.upper.exists():
            self.upper.mkdir(mode=0o755)
        os.chown(self.upper, id_base, id_base)

    def is_fresh(self) -> bool:
        """Whether nothing in it is the instance's own yet."""
        try:
            with os.scandir(self.upper) as entries:  # the first is enough: there may be millions
                return next(entries, None) is None
        except (FileNotFoundError, NotADirectoryError):
            return True

    def write_etc(self, files: Mapping[str, str], id_base: int) -> None:
        """In place, for they may be mounted; owned by the instance's root, who may edit them as in any container."""
        for name, content in files.items():
            records.overwrite(self.etc / name, content.encode(), 0o644, id_base)

    def record(self) -> LaunchRecord | None:
        """The record; None if there is none, or if it is damaged."""
        try:
            return msgspec.json.decode(records.read(self.path / "launch.json"), type=LaunchRecord)
        except (OSError, msgspec.DecodeError, UnicodeError, RecursionError):
            return None

    def is_damaged(self) -> bool:
        """Whether there is a record that can't be read."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            return True
        return self.record() is None and os.path.lexists(self.path / "launch.json")

    def write_record(self, record: LaunchRecord) -> None:
        records.replace(self.path / "launch.json", msgspec.json.encode(record))

    def end_of_boot(self) -> None:
        """From now on the last launch counts as one of an earlier life of the host."""
        if record := self.record():
            self.write_record(msgspec.structs.replace(record, boot=""))

    async def remove(self) -> None:
        """The directory with all that the instance left in it. Failed says what is in the way."""
        child = await asyncio.create_subprocess_exec(*trees.command(self.path), stdin=DEVNULL, stderr=PIPE)
        assert child.stderr
        try:
            said = await child.stderr.read(_SAID)
            while await child.stderr.read(_SAID):  # there may be a complaint for each of a million files
                pass
            trees.check(await child.wait(), said)
        except asyncio.CancelledError:
            child.kill()
            raise
        except OSError as error:
            raise Failed(f"the directory {self.path} can't be removed: {error}", "remove it by hand") from None


def etc_files(instance: Instance, network: Network | None) -> dict[str, str]:
    """/etc/hostname, /etc/hosts (hosts(5)) and /etc/resolv.conf (resolv.conf(5)) of an instance."""
    spec = instance.spec
    hostname = spec.hostname or instance.name
    hosts = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    resolver: list[str] = []
    names = " ".join(dict.fromkeys((hostname, hostname.partition(".")[0], instance.name)))
    if instance.port and network:
        port = instance.port
        hosts += [f"{address}\t{names}" for address in (port.address, port.address6) if address]
        resolver = [f"search {instance.tenant}.internal"]
        resolver += [f"nameserver {gateway}" for gateway in (network.gateway, network.gateway6) if gateway]
    else:
        hosts.append(f"127.0.1.1\t{names}")
    hosts += [f"{entry.address}\t{entry.name}" for entry in spec.extra_hosts]
    if spec.dns:
        resolver = [*(line for line in resolver if line.startswith("search")), *(f"nameserver {a}" for a in spec.dns)]
    if spec.dns_search:
        resolver = [line for line in resolver if not line.startswith("search")]
        resolver[:0] = [] if spec.dns_search == ["."] else [f"search {' '.join(spec.dns_search)}"]
    return {name: "".join(f"{line}\n" for line in lines) for name, lines in [
        ("hostname", [hostname]), ("hosts", hosts), ("resolv.conf", resolver)
    ]}  # fmt: skip


class Launcher:
    """`names` tells which names resolve in a tenant to which addresses: those of the instances that run."""

    def __init__(self, context: Context, names: Callable[[str], dict[str, Sequence[str]]]) -> None:
        self.context = context
        self.names = names
        self.boot = boot_id()

    def directory(self, instance_id: str) -> Directory:
        return Directory(self.context.settings.instances, instance_id)

    async def launch(
        self,
        tenant: Tenant,
        instance: Instance,
        connect: Callable[[], Awaitable[None]],
        *,
        share: tuple[int, int] | None = None,
        console: ConsoleSize | None = None,
    ) -> State:
        """Makes the container, connects it to its network, awaits `connect` (which attaches those who wait for its
        output), and starts it. `share` is the process (PID and start time) whose user and PID namespaces it joins,
        `console` the size of its terminal. Raises InsulaError; then nothing of the container is left."""
        context, network = self.context, await self._network(instance)
        await context.prepared(tenant.name)
        directory = self.directory(instance.id)
        if directory.is_fresh():  # a few small files, in memory until somebody syncs: a thread would cost more
            request = self._prepare(directory, tenant, instance, network)
        else:
            request = await asyncio.to_thread(self._prepare, directory, tenant, instance, network)
        if share:
            request = request._replace(share=[*share])
        if console:
            request.config["process"]["consoleSize"] = {"height": console.rows, "width": console.columns}
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self.discard, tenant, instance, network)
            await context.runtime.create(request)
            try:
                if network:
                    await self._attach(tenant, network, instance)
                await connect()
                await context.runtime.start(instance.id)
            except InsulaError:
                if failure := await context.runtime.failure(instance.id):  # the cause; the rest follows from it
                    raise failure from None
                raise
            undo.pop_all()
        state = context.runtime.state(instance.id)
        if state is None:
            raise NotFound(f"instance {instance.name} vanished while it started", "try again")
        return state

    async def resting(self, tenant: Tenant, instance: Instance, container: str) -> Launch:
        """A request for a container with the instance's files in which nothing of the instance runs: PID 1 sleeps.

        Its name is its own, so that a crash leaves nothing that could be taken for the instance; its program is the
        host's busybox, which is static and needs nothing of the image.
        """
        program = shutil.which("busybox", path="/usr/bin:/bin")
        if program is None:
            raise Unavailable("there is no busybox on this host", "start the instance, or install busybox-static")
        spec = msgspec.structs.replace(
            instance.spec, entrypoint=[], command=[_SLEEP, "2147483647"], user="0", init=False, tty=False, tmpfs=[]
        )
        network = await self._network(instance)
        asleep = msgspec.structs.replace(instance, spec=spec)
        request = await asyncio.to_thread(self._prepare, self.directory(instance.id), tenant, asleep, network, False)
        options = ["bind", "sealed", "ro", "nosuid", "nodev"]
        bind = {"destination": _SLEEP, "type": "bind", "source": program, "options": options}
        request.config["mounts"].append(bind)
        cgroup = f"{self.context.settings.prefix}/{instance.tenant}/{container}"
        return request._replace(id=container, cgroup=cgroup, volatile=False, stdin=False, log=None)

    def _prepare(
        self, directory: Directory, tenant: Tenant, instance: Instance, network: Network | None, begin: bool = True
    ) -> Launch:
        """Everything in files, and the request to the runtime."""
        spec = instance.spec
        directory.make(tenant.id_base)
        directory.write_etc(etc_files(instance, network), tenant.id_base)
        lower, oci = self.oci(tenant, instance, spec, directory)
        if begin:
            directory.write_record(LaunchRecord(generation=instance.generation, boot=self.boot))
        return Launch(
            id=instance.id,
            config=oci,
            lower=lower,
            upper=str(directory.upper),
            work=str(directory.work),
            volatile=spec.remove,
            id_base=tenant.id_base,
            cgroup=self.cgroup(instance),
            tty=spec.tty,
            stdin=spec.stdin,
            log=str(directory.log),
            log_size=spec.log_size,
            log_files=spec.log_files,
        )

    def oci(
        self, tenant: Tenant, instance: Instance, spec: InstanceSpec, directory: Directory | None = None
    ) -> tuple[list[str], dict[str, Any]]:
        """The layers' directories, top-most first, and the OCI config for `spec`; Invalid if it asks for nonsense.

        Without a directory, of an instance that isn't made yet, nothing can run from it, but everything is checked.
        """
        lower = [str(path) for path in self.context.images.lower(instance.layers)]
        name = spec.user if spec.user is not None else instance.config.user
        if directory is None or directory.is_fresh():
            user = _user_of_image(name, tuple(lower), tuple(spec.group_add))
        else:
            user = resolve(name, lower, upper=str(directory.upper), more_groups=spec.group_add)
        return lower, config(
            spec,
            instance.config,
            user=user,
            id_base=tenant.id_base,
            hostname=spec.hostname or instance.name,
            cgroup=self.cgroup(instance),
            etc=directory.etc if directory else None,
        )

    async def check(self, tenant: Tenant, instance: Instance) -> None:
        """Invalid if it asks for nonsense. A user who is not known yet is looked up in a thread: an image may have a
        megabyte of /etc/passwd."""
        lower = tuple(str(path) for path in self.context.images.lower(instance.layers))
        spec = instance.spec
        name = spec.user if spec.user is not None else instance.config.user
        if (name, lower, tuple(spec.group_add)) in _users:
            self.oci(tenant, instance, spec)
        else:
            await asyncio.to_thread(self.oci, tenant, instance, spec)

    def exec_process(self, tenant: Tenant, instance: Instance, wanted: ExecSpec) -> dict[str, Any]:
        """The `process` of an OCI config for one more process: as PID 1's, but for what is asked."""
        if not wanted.command:
            raise Invalid("there is nothing to execute", "give a command")
        spec = msgspec.structs.replace(
            instance.spec,
            entrypoint=[],
            command=wanted.command,
            env={**instance.spec.env, **wanted.env},
            user=instance.spec.user if wanted.user is None else wanted.user,
            working_dir=wanted.working_dir or instance.spec.working_dir,
            tty=wanted.tty,
            init=False,
        )
        _, oci = self.oci(tenant, instance, spec, self.directory(instance.id))
        process: dict[str, Any] = oci["process"]
        if size := wanted.console_size:
            process["consoleSize"] = {"height": size.rows, "width": size.columns}
        return process

    def cgroup(self, instance: Instance) -> str:
        return f"{self.parent(instance.tenant)}/{instance.id}"

    def parent(self, tenant: str) -> str:
        """The control group of a tenant."""
        return f"{self.context.settings.prefix}/{tenant}"

    async def _network(self, instance: Instance) -> Network | None:
        if instance.port is None:
            return None
        found = await NETWORKS.get(self.context.store, instance.tenant, instance.port.network)
        if found is None:
            raise NotFound(f"network {instance.port.network} of tenant {instance.tenant} is gone", "create it again")
        return found.value

    async def _attach(self, tenant: Tenant, network: Network, instance: Instance) -> None:
        assert instance.port
        fabric, port = self.context.fabric, instance.port
        netns = self.context.runtime.netns(instance.id)

        def connect() -> None:
            try:
                fabric.attach(tenant, network, port, netns)
            except Conflict:  # the network is full
                raise
            except InsulaError:  # somebody took parts of the network away: repair it, and try once more
                fabric.ensure_tenant(tenant)
                fabric.ensure_network(tenant, network)
                fabric.attach(tenant, network, port, netns)
            fabric.add_name(tenant, instance.name, addresses(instance))

        try:
            await self.context.fabric_call(tenant.name, connect)
        finally:
            os.close(netns)

    async def discard(self, tenant: Tenant, instance: Instance, network: Network | None) -> None:
        """Kills what runs and removes container, port and name; nothing happens if they are gone. The directory
        stays."""
        await self.context.runtime.delete(instance.id, self.cgroup(instance))
        if network and (port := instance.port):
            fabric = self.context.fabric

            def disconnect() -> None:
                fabric.remove_name(tenant, instance.name)
                fabric.detach(tenant, network, port)

            await self.context.fabric_call(tenant.name, disconnect)

    async def clean(self, tenant: Tenant, instance: Instance) -> None:
        """`discard` for an instance that ended, wherever its network is."""
        network = None
        with contextlib.suppress(NotFound, Failed):  # its record is gone, or damaged
            network = await self._network(instance)
        await self.discard(tenant, instance, network)

    async def update_names(self, tenant: Tenant) -> None:
        await self.context.fabric_call(
            tenant.name, lambda: self.context.fabric.set_names(tenant, self.names(tenant.name))
        )

    async def remove_directory(self, instance_id: str) -> None:
        """Also one of millions of files, nested however deep. What is in the way is a problem of this host."""
        name = f"directory of instance {instance_id}"
        try:
            await self.directory(instance_id).remove()
            self.context.problems.solved(name)
        except (InsulaError, OSError) as error:
            self.context.problems[name] = str(error)


_users: dict[tuple[str, tuple[str, ...], tuple[str, ...]], User] = {}
_MOST_USERS = 1024


def _user_of_image(user: str, lower: tuple[str, ...], more_groups: tuple[str, ...]) -> User:
    """Layers never change, so neither does whom they mean."""
    key = (user, lower, more_groups)
    if (known := _users.get(key)) is None:
        known = _users[key] = resolve(user, lower, more_groups=more_groups)
        while len(_users) > _MOST_USERS:
            with contextlib.suppress(KeyError, RuntimeError):  # another thread does the same
                _users.pop(next(iter(_users)))
    return known


def addresses(instance: Instance) -> list[str]:
    """The addresses that the instance's name resolves to."""
    port = instance.port
    return [address for address in (port.address, port.address6) if address] if port else []
