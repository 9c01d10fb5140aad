"""The module br_netfilter, with which the rules of a router judge bridged packets as well (br_netfilter.c)."""

from __future__ import annotations

from insula.kernel import modules
from insula.model.errors import Unavailable
from insula.network.linux import sysctl


def require() -> None:
    """Load br_netfilter. Unavailable without it.

    The module applies the host's own rules to the host's own bridges as well, which nobody has asked for: if it was not
    there, that is turned off again.
    """
    if sysctl.has_bridge_filter():
        return
    modules.load("br_netfilter")
    if not sysctl.has_bridge_filter():
        raise Unavailable("this kernel has no br_netfilter", "install the package with the kernel's modules")
    sysctl.write(dict.fromkeys(sysctl.BRIDGE_FILTERS, "0"))
