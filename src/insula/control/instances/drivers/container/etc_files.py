"""The contents of /etc/hostname, /etc/hosts and /etc/resolv.conf of an instance."""

from __future__ import annotations

from collections.abc import Sequence

from insula.model.objects import Instance, Network
from insula.model.rules import MAX_NAME_SERVERS


def etc_files(instance: Instance, networks: Sequence[Network]) -> dict[str, str]:
    """The contents of hostname, hosts (hosts(5)) and resolv.conf (resolv.conf(5)), from its networks and its spec."""
    spec = instance.spec
    hostname = spec.hostname or instance.name
    hosts = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    resolver: list[str] = []
    names = " ".join(dict.fromkeys((hostname, hostname.partition(".")[0], instance.name)))
    if instance.plugged and networks:
        own = [address for port in instance.plugged for address in (port.address, port.address6) if address]
        hosts += [f"{address}\t{names}" for address in own]
        gateways = [gateway for each in networks for gateway in (each.gateway, each.gateway6) if gateway]
        resolver = [f"search {instance.tenant}.internal"]
        resolver += [f"nameserver {gateway}" for gateway in gateways[:MAX_NAME_SERVERS]]
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
