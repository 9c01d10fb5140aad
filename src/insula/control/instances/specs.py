"""Checks of specs that don't depend on the driver: names, labels, limits, signals, policies. Pure functions.

The rest of an `InstanceSpec` (arguments, environment, mounts, capabilities, …) is checked by the driver of its kind;
`admission.py` calls the driver before anything is committed.
"""

from __future__ import annotations

import re
import secrets
import signal
from collections.abc import Mapping, Sequence
from ipaddress import IPv6Address, ip_address

import msgspec

from insula.control.allocation.quotas import check_resources
from insula.model import fields, publishing, rules
from insula.model.disks import FurtherDisk
from insula.model.errors import Invalid
from insula.model.health import plan
from insula.model.objects import (
    AddressPair,
    Instance,
    InstanceSpec,
    MachineOptions,
    NetworkAttachment,
    PublishedPort,
)
from insula.model.units import check_label, parse_signal, shorten
from insula.network.addresses import parse_mac, parse_range

_DOMAIN = re.compile(rules.DOMAIN)


def check(spec: InstanceSpec) -> InstanceSpec:
    """Check the spec, and return it with addresses and the stop signal in canonical form. Invalid. An empty name stays
    empty."""
    if spec.name:
        check_label("instance", spec.name)
    spec = msgspec.structs.replace(
        spec, networks=check_networks(spec.networks), published=check_published(spec.published, spec.networks)
    )
    if len(spec.mounts) > rules.MAX_MOUNTS:
        raise Invalid(f"{len(spec.mounts)} tmpfs are too many", "use at most 100")
    if spec.options.pid_of is not None:
        check_label("instance", spec.options.pid_of)
    if isinstance(spec.options, MachineOptions) and spec.resources.memory is None:
        spec = msgspec.structs.replace(
            spec, resources=msgspec.structs.replace(spec.resources, memory=rules.MACHINE_MEMORY)
        )
    if isinstance(spec.options, MachineOptions):
        check_cloud_init(spec.options)
        check_disks(spec.options.disks)
    check_labels(spec.labels)
    check_resources(spec.resources)
    plan(spec.healthcheck, None)
    _check_numbers(spec)
    spec = check_names(spec)
    if spec.stop_signal is None:
        return spec
    return msgspec.structs.replace(spec, stop_signal=signal_name(parse_signal(spec.stop_signal)))


def check_disks(disks: Sequence[FurtherDisk]) -> None:
    """Raise Invalid for further disks that no virtual machine can have."""
    for each in disks:
        check_label("disk", each.name)
        if len(each.name) > rules.MAX_DISK_NAME or each.name in ("image", "disk"):
            what = f"a disk can't have the name {shorten(each.name)}"
            raise Invalid(what, f"use up to {rules.MAX_DISK_NAME} characters, and neither image nor disk")
        if not rules.MIN_MACHINE_DISK <= each.size <= rules.MAX_BYTES:
            raise Invalid(f"disk {each.name} can't have {each.size} bytes", "use at least 16m")
        if each.mount is not None and not re.fullmatch(fields.TMPFS_PATH, each.mount):
            what = f"disk {each.name} can't be mounted at {shorten(each.mount)}"
            raise Invalid(what, "use an absolute path without '..', outside of /proc, /sys and /dev")
    for unique in ([each.name for each in disks], [each.mount for each in disks if each.mount]):
        if len({*unique}) < len(unique):
            raise Invalid("two disks have one name, or are mounted at one place", "leave one out")
    if len(disks) > rules.MAX_DISKS:
        raise Invalid(f"{len(disks)} further disks are too many", f"use at most {rules.MAX_DISKS}")


def check_networks(attachments: Sequence[NetworkAttachment]) -> list[NetworkAttachment]:
    """Check the networks of an instance, and return them with MAC addresses and pairs in canonical form. Invalid."""
    if len(attachments) > rules.MAX_PORTS:
        raise Invalid(f"{len(attachments)} networks are too many", f"an instance has at most {rules.MAX_PORTS} ports")
    found = [_check_attachment(each) for each in attachments]
    names = [each.network for each in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise Invalid(f"network {twice} is given twice", "an instance has one port on a network at most")
    return found


def check_published(published: Sequence[PublishedPort], networks: Sequence[NetworkAttachment]) -> list[PublishedPort]:
    """Check the published ports of an instance, and return them with addresses in canonical form. Invalid."""
    if len(published) > rules.MAX_PUBLISHED:
        raise Invalid(f"{len(published)} published ports are too many", f"use at most {rules.MAX_PUBLISHED}, or ranges")
    if published and not networks:
        raise Invalid("ports of an instance without a network can't be published", "leave out --network none")
    for each in published:
        publishing.check_ports(each.port, each.target, each.count)
    return [msgspec.structs.replace(each, address=publishing.check_address(each.address)) for each in published]


def _check_attachment(attachment: NetworkAttachment) -> NetworkAttachment:
    check_label("network", attachment.network)
    if len(attachment.allowed_pairs) > rules.MAX_ADDRESS_PAIRS:
        what = f"{len(attachment.allowed_pairs)} allowed address pairs are too many"
        raise Invalid(what, f"use at most {rules.MAX_ADDRESS_PAIRS} for a port")
    pairs = [_check_pair(each) for each in attachment.allowed_pairs]
    mac = attachment.mac and parse_mac(attachment.mac)
    return msgspec.structs.replace(attachment, mac=mac, allowed_pairs=pairs)


def _check_pair(pair: AddressPair) -> AddressPair:
    return AddressPair(address=parse_range(pair.address), mac=pair.mac and parse_mac(pair.mac))


def check_names(spec: InstanceSpec) -> InstanceSpec:
    """Check the spec's entries for /etc/hosts, /etc/resolv.conf and groups, and return it with them in canonical form.
    Invalid."""
    if len(spec.extra_hosts) > rules.MAX_HOSTS:
        raise Invalid(f"{len(spec.extra_hosts)} hosts to add are too many", "use at most 256")
    if len(spec.dns) > rules.MAX_NAME_SERVERS:
        raise Invalid(f"{len(spec.dns)} name servers are too many", "use at most 3: resolv.conf(5) takes no more")
    if len(spec.dns_search) > rules.MAX_SEARCH_DOMAINS or sum(map(len, spec.dns_search)) > 1024:
        raise Invalid("the search domains are too many or too long", "use at most 32, and 1024 characters")
    if len(spec.options.group_add) > rules.MAX_GROUPS:
        raise Invalid(f"{len(spec.options.group_add)} groups to add are too many", "use at most 64")
    domains = [] if spec.dns_search == ["."] else spec.dns_search
    for name in (*(entry.name for entry in spec.extra_hosts), *domains):
        if len(name) > rules.MAX_DOMAIN or not _DOMAIN.fullmatch(name):
            raise Invalid(f"{shorten(name)} is not a host or domain name", "use up to 253 of a-z, 0-9, _, - and .")
    hosts = [msgspec.structs.replace(entry, address=_address(entry.address)) for entry in spec.extra_hosts]
    return msgspec.structs.replace(spec, extra_hosts=hosts, dns=[_address(text) for text in spec.dns])


def check_cloud_init(options: MachineOptions) -> None:
    """Check what cloud-init is told. Invalid."""
    if len(options.user_data or "") > rules.MAX_USER_DATA:
        raise Invalid("the user data is too long", f"use at most {rules.MAX_USER_DATA} characters")
    if len(options.ssh_keys) > rules.MAX_SSH_KEYS:
        raise Invalid(f"{len(options.ssh_keys)} SSH keys are too many", f"use at most {rules.MAX_SSH_KEYS}")
    for key in options.ssh_keys:
        if len(key) > rules.MAX_SSH_KEY or not re.fullmatch(rules.SSH_KEY, key):
            raise Invalid(f"{shorten(key)} is not an SSH key", "use a line as in authorized_keys")


def _address(text: str) -> str:
    try:
        address = ip_address(text)
    except ValueError:
        raise Invalid(f"{shorten(text)} is not an IP address", "as in 10.0.0.53 or fd00::53") from None
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise Invalid(f"address {shorten(text)} names an interface", "leave out the part after %")
    return str(address)


def relabelled(labels: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """Return labels with changes, of which None removes one. Invalid."""
    merged: dict[str, str | None] = {**labels, **changes}
    return check_labels({name: value for name, value in merged.items() if value is not None})


def check_labels(labels: dict[str, str]) -> dict[str, str]:
    """Check labels and return them. Invalid. They are few and short, since selectors compare them with all others."""
    if len(labels) > rules.MAX_LABELS:
        raise Invalid(f"{len(labels)} labels are too many", "use at most 64")
    for name, value in labels.items():
        if not re.fullmatch(rules.LABEL_NAME, name):
            raise Invalid(
                f"{shorten(name)} is not a name for a label", "use up to 128 of a-z, 0-9, '.', '_', '/' and '-'"
            )
        if len(value) > rules.MAX_LABEL_VALUE or not value.isprintable():
            raise Invalid(f"the value of label {name} is too long or not printable", "use up to 1024 characters")
    return labels


def stop_signal(instance: Instance) -> int:
    """The number of the signal that asks the instance to end."""
    return parse_signal(instance.spec.stop_signal or instance.config.stop_signal or "SIGTERM")


def signal_name(number: int) -> str:
    """``SIGTERM`` for 15, ``SIGRTMIN+3`` for 37."""
    if signal.SIGRTMIN < number < signal.SIGRTMAX:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"
    return signal.Signals(number).name


def make_name(image: str) -> str:
    """A name for an instance whose user gave none: the image's name and six random hex digits."""
    repository = image.rpartition("/")[2].partition("@")[0].partition(":")[0].lower()
    base = re.sub(r"[^a-z0-9]+", "-", repository).strip("-")[:40].strip("-") or "instance"
    return f"{base}-{secrets.token_hex(3)}"


def _check_numbers(spec: InstanceSpec) -> None:
    if not 0 <= spec.stop_timeout <= rules.MAX_STOP_TIMEOUT:
        raise Invalid(f"a stop timeout can't be {spec.stop_timeout} seconds", "use 0 to 86400")
    if not 0 <= spec.restart.max_retries <= rules.MAX_RESTARTS:
        raise Invalid(f"there can't be {spec.restart.max_retries} retries", "use 0 (no limit) to 1000000")
    if spec.restart.max_retries and spec.restart.name != "on-failure":
        raise Invalid(f"restart policy {spec.restart.name} takes no number of retries", "only on-failure takes one")
    if spec.remove and spec.restart.name != "no":
        raise Invalid("--rm and --restart exclude each other", "an instance that is removed on exit can't restart")
    if not rules.MIN_LOG <= spec.log_size <= rules.MAX_LOG or not 1 <= spec.log_files <= rules.MAX_LOG_FILES:
        what = f"a log can't have {spec.log_files} files of {spec.log_size} bytes"
        raise Invalid(what, "use 1 to 1000 files of 4k to 1t")


def cli_command(tenant: str, words: str) -> str:
    """The command `insula words` for a tenant, quoted for a hint. It has -T unless the tenant is the default one."""
    return f"`insula {words}`" if tenant == "default" else f"`insula -T {tenant} {words}`"
