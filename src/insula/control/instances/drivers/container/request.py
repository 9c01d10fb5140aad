"""`Requests`: makes requests to the container runtime from an instance: files, OCI configs, processes for exec."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec

from insula.container.service.client import Launch
from insula.control.instances.drivers.container.directory import ContainerDirectory
from insula.control.instances.drivers.container.etc_files import etc_files
from insula.control.instances.drivers.container.spec import config, console_size
from insula.control.instances.drivers.container.users import User, resolve
from insula.control.instances.drivers.directory import LaunchRecord, boot_id
from insula.control.workers import Workers
from insula.image.limits import MAX_LAYERS
from insula.image.store import ImageStore
from insula.model.errors import Invalid, Unavailable
from insula.model.objects import ContainerOptions, Instance, InstanceSpec, Network, Options, Tenant
from insula.model.views import ExecSpec
from insula.settings import Settings
from insula.volume.quota import DiskLimit, DiskQuota, DiskUsage

ROOM: Final = DiskUsage(256 << 10, 16)
"""What the mount of an overlay may take beyond the limits."""
SLEEP: Final = "/dev/sleep"  # busybox chooses its applet by the name of the program


class Checked(NamedTuple):
    """The draft of an instance, and what `Requests.oci` has made of it."""

    instance: Instance
    lower: list[str]
    oci: dict[str, Any]


class Requests:
    """Makes requests to the runtime. Methods that read files of images or instances block."""

    def __init__(self, settings: Settings, images: ImageStore, disk: DiskQuota) -> None:
        self._settings = settings
        self._disk = disk
        self._pool = disk.directory if disk.directory != settings.instances else None
        self.mount_points = settings.root / "mountpoints"
        self._images = images
        self._boot = boot_id()
        self._workers = Workers()
        self._checked: dict[str, Checked] = {}  # by the instance's ID

    def directory(self, instance_id: str) -> ContainerDirectory:
        return ContainerDirectory(self._settings.instances, instance_id, self._pool)

    def parent(self, tenant: str) -> str:
        """The control group of a tenant, relative to the root of every hierarchy."""
        return f"{self._settings.prefix}/{tenant}"

    def cgroup(self, instance: Instance) -> str:
        """The control group of an instance."""
        return f"{self.parent(instance.tenant)}/{instance.id}"

    async def launch(self, tenant: Tenant, instance: Instance, networks: Sequence[Network]) -> Launch:
        """The request for its next start, after writing the files that it needs. Invalid, OSError."""
        if self.directory(instance.id).is_fresh():  # a few small files in the page cache: a thread would cost more
            return self.prepare(tenant, instance, networks)
        return await self._workers.do(tenant.name, partial(self.prepare, tenant, instance, networks))

    def prepare(self, tenant: Tenant, instance: Instance, networks: Sequence[Network], *, begin: bool = True) -> Launch:
        """Do the work of `launch` in the caller's thread. Without `begin` no start of the instance is recorded."""
        spec, directory = instance.spec, self.directory(instance.id)
        if self._disk.trouble and directory.pooled:
            raise Unavailable("the disk of instances is not there", "the operator sees why with `insula status`")
        directory.make(tenant.id_base)
        self._limit(instance, directory)
        directory.write_etc(etc_files(instance, networks), tenant.id_base)
        lower, oci = self._checked_oci(instance, directory) or self.oci(tenant, instance, spec, directory)
        if begin:
            directory.write_record(LaunchRecord(starts=instance.starts, boot=self._boot))
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

    def _limit(self, instance: Instance, directory: ContainerDirectory) -> None:
        """Count the writable layer for the instance's project, and set its limits. OSError.

        overlayfs makes a few files when it is mounted. An instance that has used up its limits gets room for them until
        `settle`, or it could never be started again.
        """
        project = instance.project_id
        if project is None or not self._is_counted(directory):
            return
        limit = DiskLimit(instance.spec.resources.disk, instance.spec.resources.inodes)
        if not directory.is_fresh() and (used := self._disk.usage(project)):
            space = None if limit.space is None else max(limit.space, used.space + ROOM.space)
            inodes = None if limit.inodes is None else max(limit.inodes, used.inodes + ROOM.inodes)
            self._disk.limit(project, DiskLimit(space, inodes))
        elif limit != DiskLimit():
            self._disk.limit(project, limit)
        self._disk.assign(project, (directory.upper, directory.work))

    def settle(self, instance: Instance) -> None:
        """Set the limits of an instance whose overlay has been mounted. OSError."""
        if instance.project_id is None:
            return
        resources, directory = instance.spec.resources, self.directory(instance.id)
        if self._is_counted(directory) and not directory.is_fresh():
            self._disk.limit(instance.project_id, DiskLimit(resources.disk, resources.inodes))

    def _is_counted(self, directory: ContainerDirectory) -> bool:
        """Whether the writable layer is where limits are enforced: those that are older than the pool are not."""
        return self._disk.enforced and (self._pool is None or directory.pooled)

    async def holder(self, tenant: Tenant, instance: Instance, networks: Sequence[Network], container: str) -> Launch:
        """The request for a holder: a container with the instance's root file system that only sleeps.

        It has an id of its own, so that after a crash it can't be taken for the instance. Its program is the host's
        busybox, which is static and needs no file of the image.
        """
        program = shutil.which("busybox", path="/usr/bin:/bin")
        if program is None:
            raise Unavailable("there is no busybox on this host", "start the instance, or install busybox-static")
        request = await self.beside(tenant, asleep(instance), networks, container)
        options = ["bind", "sealed", "ro", "nosuid", "nodev"]
        request.config["mounts"].append({"destination": SLEEP, "type": "bind", "source": program, "options": options})
        return request

    async def beside(self, tenant: Tenant, instance: Instance, networks: Sequence[Network], container: str) -> Launch:
        """The request for a container with an ID of its own that has the files of an instance which does not run."""
        request = await self._workers.do(tenant.name, partial(self.prepare, tenant, instance, networks, begin=False))
        group = f"{self.parent(instance.tenant)}/{container}"
        return request._replace(id=container, cgroup=group, volatile=False, stdin=False, log=None)

    def oci(
        self, tenant: Tenant, instance: Instance, spec: InstanceSpec, directory: ContainerDirectory
    ) -> tuple[list[str], dict[str, Any]]:
        """The layers' directories, top-most first, and the OCI config for `spec`. Invalid."""
        lower = self._lower(instance)
        name = spec.user if spec.user is not None else instance.config.user
        if directory.is_fresh():
            user = _user_of_image(name, tuple(lower), tuple(spec.options.group_add))
        else:
            user = resolve(name, lower, upper=str(directory.upper), more_groups=spec.options.group_add)
        return lower, config(
            spec,
            instance.config,
            user=user,
            id_base=tenant.id_base,
            hostname=spec.hostname or instance.name,
            cgroup=self.cgroup(instance),
            etc=directory.etc,
        )

    async def check(self, tenant: Tenant, instance: Instance) -> None:
        """Raise Invalid if no OCI config can be made from the spec. A user that is not cached is looked up in a thread,
        since an image may have a megabyte of /etc/passwd. The config is kept for the launch that follows."""
        spec = instance.spec
        name = spec.user if spec.user is not None else instance.config.user
        work = partial(self.oci, tenant, instance, spec, self.directory(instance.id))
        if (name, tuple(self._lower(instance)), tuple(spec.options.group_add)) in _users:
            made = work()
        else:
            made = await self._workers.do(tenant.name, work)
        if instance.wanted == "running":
            self._checked[instance.id] = Checked(instance, *made)
            while len(self._checked) > _MOST_CHECKED:  # the commits of some have failed
                del self._checked[next(iter(self._checked))]

    def _checked_oci(
        self, instance: Instance, directory: ContainerDirectory
    ) -> tuple[list[str], dict[str, Any]] | None:
        """What `oci` has made for the check of the instance, if that is still right; given out once."""
        checked = self._checked.pop(instance.id, None)
        if checked is None or checked.instance.name != instance.name or not directory.is_fresh():
            return None
        spec = msgspec.structs.replace(checked.instance.spec, name=instance.spec.name)
        checked_as_committed = msgspec.structs.replace(
            checked.instance, spec=spec, ports=instance.ports, project_id=instance.project_id
        )
        same = checked_as_committed == instance
        return (checked.lower, checked.oci) if same else None

    async def execution(self, tenant: Tenant, instance: Instance, wanted: ExecSpec) -> dict[str, Any]:
        """Do the work of `process` in a thread."""
        return await self._workers.do(tenant.name, partial(self.process, tenant, instance, wanted))

    def process(self, tenant: Tenant, instance: Instance, wanted: ExecSpec) -> dict[str, Any]:
        """The `process` of an OCI config for one more process: PID 1's, changed as the spec says. Invalid."""
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
            options=_without_init(instance.spec.options),
        )
        _, oci = self.oci(tenant, instance, spec, self.directory(instance.id))
        return {**oci["process"], **console_size(wanted.console_size)}

    def _lower(self, instance: Instance) -> list[str]:
        layers = self._images.lower(instance.root.layers)
        if len(layers) < MAX_LAYERS and self.mount_points.is_dir():  # else they are made in the upper directory
            layers.append(self.mount_points)
        return [str(path) for path in layers]


_users: dict[tuple[str, tuple[str, ...], tuple[str, ...]], User] = {}
_MOST_USERS = 1024
_MOST_CHECKED = 32


def asleep(instance: Instance) -> Instance:
    """An instance whose program only sleeps: with the files of this one, and what is mounted into none of them."""
    spec = msgspec.structs.replace(
        instance.spec,
        entrypoint=[],
        command=[SLEEP, "2147483647"],
        user="0",
        tty=False,
        mounts=[],
        options=_without_init(instance.spec.options),
    )
    return msgspec.structs.replace(instance, spec=spec)


def _without_init(options: Options) -> Options:
    return msgspec.structs.replace(options, init=False) if isinstance(options, ContainerOptions) else options


def _user_of_image(user: str, lower: tuple[str, ...], more_groups: tuple[str, ...]) -> User:
    """The user, from a cache, since layers never change."""
    key = (user, lower, more_groups)
    if (known := _users.get(key)) is None:
        known = _users[key] = resolve(user, lower, more_groups=more_groups)
        while len(_users) > _MOST_USERS:
            with contextlib.suppress(KeyError, RuntimeError):  # another thread does the same
                _users.pop(next(iter(_users)))
    return known
