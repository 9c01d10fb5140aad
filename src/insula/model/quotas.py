"""The table of quotas: limits on what a tenant has and does.

A quota is one line of `TABLE`. Its name is a field of `Limits` and `LimitsPatch`, and of `Usage` if it is counted; an
option of `insula tenant create` and `update`; and a setting of `[quotas]`, the limit of new tenants. `counted` tells
what enforces it:

    store     the sum over stored objects, changed in the transaction that changes the object (allocation/quotas.py)
    now       what open requests hold, in the memory of insulad (allocation/in_flight.py)
    rate      a token bucket in the memory of insulad (allocation/rates.py)
    kernel    the kernel, on the tenant's control group and devices

The command line imports this module, so it imports little.
"""

from __future__ import annotations

from insula.model.rules import (
    MAX_BYTES,
    MAX_CPUS,
    MAX_INODES,
    MAX_INSTANCES,
    MAX_PIDS,
    MIN_BANDWIDTH,
    MIN_CPUS,
    MIN_DISK,
    MIN_INODES,
    MIN_MEMORY,
)
from insula.model.units import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

GIB = 1 << 30


class Quota:
    """A kind of quota. `unit` is "" for a number of objects, "cpus", "bytes", "bit/s" or "/s". `what` names in messages
    what is counted, `text` is for manuals. `default` is the limit of new tenants, None is no limit. A limit lies
    between `least` and `most`."""

    def __init__(
        self,
        name: str,
        counted: Literal["store", "now", "rate", "kernel"],
        unit: Literal["", "cpus", "bytes", "bit/s", "/s"],
        default: float | int | None,
        what: str,
        text: str,
        *,
        least: float | int = 0,
        most: float | int | None = None,
    ) -> None:
        self.name = name
        self.counted = counted
        self.unit = unit
        self.default = default
        self.what = what
        self.text = text
        self.least = least
        self.most = most if most is not None else MAX_BYTES if unit in ("bytes", "bit/s") else MAX_INSTANCES

    @property
    def option(self) -> str:
        """The option of the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def whole(self) -> bool:
        """Whether values are whole numbers."""
        return self.unit != "cpus"

    def show(self, value: float | int) -> str:
        """Format a value for people."""
        return format_size(int(value)) if self.unit == "bytes" else f"{value:.10g}"


TABLE = (
    Quota("cpus", "store", "cpus", None, "CPUs", "CPUs of its instances", least=MIN_CPUS, most=MAX_CPUS),
    Quota("memory", "store", "bytes", None, "memory", "memory of its instances", least=MIN_MEMORY),
    Quota("pids", "kernel", "", 16384, "processes", "processes and threads", least=1, most=MAX_PIDS),
    Quota(
        "bandwidth",
        "kernel",
        "bit/s",
        None,
        "bandwidth",
        "bits a second with the outside, each way",
        least=MIN_BANDWIDTH,
    ),
    Quota("disk", "store", "bytes", None, "disk", "space for files of its instances and for snapshots", least=MIN_DISK),
    Quota(
        "inodes",
        "store",
        "",
        None,
        "inodes",
        "files and directories of its instances",
        least=MIN_INODES,
        most=MAX_INODES,
    ),
    Quota("instances", "store", "", 10_000, "instances", "instances, running or not"),
    Quota("networks", "store", "", 100, "networks", "networks"),
    Quota("ports", "store", "", 20_000, "ports", "connections of its instances to networks"),
    Quota("routers", "store", "", 100, "routers", "routers"),
    Quota("policies", "store", "", 1000, "policies", "policies"),
    Quota("address_groups", "store", "", 100, "address groups", "address groups"),
    Quota("published_ports", "store", "", 50_000, "published ports", "ports of the host that lead to its instances"),
    Quota("floating_ips", "store", "", 10, "floating addresses", "floating addresses"),
    Quota("load_balancers", "store", "", 20, "load balancers", "load balancers"),
    Quota("images", "store", "", 1000, "images", "names of images of its own"),
    Quota("image_bytes", "store", "bytes", 500 * GIB, "images", "content of its images, shared parts once"),
    Quota("config_bytes", "store", "bytes", 32 << 20, "configurations", "records of its images, for each name"),
    Quota("spec_bytes", "store", "bytes", 32 << 20, "specs", "specs of its instances, with their images' settings"),
    Quota("log_bytes", "store", "bytes", 500 * GIB, "logs", "space that logs of its instances may take"),
    Quota("service_accounts", "store", "", 100, "service accounts", "service accounts"),
    Quota("tokens", "store", "", 1000, "tokens", "tokens and certificates of its service accounts"),
    Quota("exec_sessions", "now", "", 1000, "open sessions", "open requests of exec, attach and foreground `run`"),
    Quota("streams", "now", "", 1000, "open streams", "open requests for logs, statistics and archives"),
    Quota("upload_bytes", "now", "bytes", 100 * GIB, "uploads", "archives that are being sent"),
    Quota("requests", "rate", "/s", 1000, "requests a second", "requests a second of its members", least=1),
)
"""Every quota, in the order in which they are shown."""

QUOTAS = {quota.name: quota for quota in TABLE}
STORED = tuple(quota for quota in TABLE if quota.counted == "store")
"""Those whose sums are stored."""
NOW = tuple(quota for quota in TABLE if quota.counted == "now")
