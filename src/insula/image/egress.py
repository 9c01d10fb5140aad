"""A tenant's network for skopeo(1), instead of that of the host.

skopeo runs in a network namespace that was made for it, and asks the tenant's resolver. Its /etc has the certificates
of authorities and the policy for signatures, and nothing else of the host: no names of hosts, name servers, mirrors,
and certificates of clients. Its /run is empty: sockets there lead to services of the host, also to resolvers. Its /proc
shows no process but its own: others of the same user, for other tenants, have logins. It does not use the host's
proxies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from insula.kernel.netns import call_in

T = TypeVar("T")
_KEPT = (
    *("ssl", "pki", "ca-certificates", "crypto-policies", "ld.so.cache"),
    *("containers/policy.json", "containers/registries.d"),
)
_PROXY = re.compile(r"(https?|no)_proxy", re.IGNORECASE)
_FILES = {
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "passwd": "",
    "group": "",
}
SCRIPT = f"""\
for each in {" ".join(_KEPT)}; do
  if [ -e "$etc/$each" ]; then mount --bind "/etc/$each" "$etc/$each" || exit 1; fi
done
mount --rbind "$etc" /etc && mount -t tmpfs -o ro,size=4k,mode=755 none /run || exit 1
mount -t proc -o nosuid,nodev,noexec none /proc || exit 1"""
"""Commands for sh(1) in mount and PID namespaces: replace /etc by the directory `$etc` of `prepare`, /run and /proc."""


class Egress(NamedTuple):
    """A network namespace, by its descriptor, and the addresses of the name servers in it; three are asked at most."""

    netns: int
    servers: Sequence[str]

    def call(self, function: Callable[[], T]) -> T:
        """Call `function` in the namespace: processes that it starts stay there."""
        return call_in(self.netns, function)


def prepare(directory: Path, egress: Egress) -> None:
    """Make the new directory that becomes /etc, with empty places for what is kept of the host's."""
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    servers = "".join(f"nameserver {server}\n" for server in egress.servers)
    for name, text in {**_FILES, "resolv.conf": f"{servers}options timeout:2\n"}.items():
        _write(directory / name, text)
    for name in _KEPT:
        source, place = Path("/etc") / name, directory / name
        place.parent.mkdir(mode=0o755, exist_ok=True)
        if source.is_dir():
            place.mkdir(mode=0o755)
        elif source.is_file():
            _write(place, "")


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o644)


def without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without proxies, and with Go's own resolver, which asks the name servers of resolv.conf(5)
    and no service of the host."""
    kept = {name: value for name, value in environment.items() if not _PROXY.fullmatch(name)}
    return {**kept, "GODEBUG": "netdns=go"}


def without_details(why: str) -> str:
    """Return an error text for a tenant: empty if it has a path, an address or the name of a host."""
    return why if re.fullmatch(r"[\w '\"(),-]*", os.fsdecode(why)) else ""
