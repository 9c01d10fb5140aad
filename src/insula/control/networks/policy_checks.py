"""Checks of policies and address groups, which return them in canonical form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import ip_address, ip_network
from typing import TypeVar

from msgspec.structs import replace

from insula.control.instances.specs import check_labels
from insula.model import rules
from insula.model.errors import Invalid
from insula.model.policies import (
    CidrPeer,
    Direction,
    GroupPeer,
    InstancePeer,
    NamePeer,
    OperatorRule,
    PolicyPeer,
    PolicyRule,
    PortMatch,
    Selector,
)
from insula.model.units import check_label, shorten
from insula.network.names.compiler import check_rule as check_names

R = TypeVar("R", PolicyRule, OperatorRule)
MAX_PEERS_IN_ALL = 1024
"""Peers in all rules of a policy together."""


def check_cidr(text: str) -> str:
    """Return a range in canonical form; an address alone is a range too. Invalid."""
    try:
        return str(ip_network(text if "/" in text else ip_address(text)))
    except ValueError:
        pass
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise Invalid(f"{shorten(text)} is no range of addresses", "use CIDR notation, as in 10.0.0.0/8") from None
    raise Invalid(f"{shorten(text)} has bits set behind its prefix", f"the range is {network}")


def check_cidrs(cidrs: Iterable[str]) -> list[str]:
    """Return ranges in canonical form, each once. Invalid."""
    found = list(dict.fromkeys(check_cidr(each) for each in cidrs))
    if len(found) > rules.MAX_GROUP_CIDRS:
        raise Invalid(f"there are {len(found)} ranges", f"use at most {rules.MAX_GROUP_CIDRS}")
    return found


def check_selector(selector: Selector) -> Selector:
    """Return a selector. Invalid."""
    check_labels(selector.labels)
    if len(selector.expressions) > rules.MAX_EXPRESSIONS:
        raise Invalid("the selector has too many expressions", f"use at most {rules.MAX_EXPRESSIONS}")
    for each in selector.expressions:
        check_labels({each.key: ""})
        for value in each.values:
            check_labels({each.key: value})
        takes = each.operator in ("In", "NotIn")
        if takes != bool(each.values):
            what = "needs values" if takes else "takes no values"
            raise Invalid(f"{each.operator} of label {shorten(each.key)} {what}", "see Kubernetes' label selectors")
        if len(each.values) > rules.MAX_LABEL_VALUES:
            raise Invalid(f"label {each.key} has too many values", f"use at most {rules.MAX_LABEL_VALUES}")
    return selector


def check_directions(directions: Sequence[Direction]) -> list[Direction]:
    """Return directions, each once. Invalid without one."""
    if not directions:
        raise Invalid("the policy has no direction", "use in, out or both")
    both: tuple[Direction, ...] = ("in", "out")
    return [each for each in both if each in directions]


def check_rules(given: Sequence[PolicyRule], directions: Sequence[Direction]) -> list[PolicyRule]:
    """Return rules in canonical form, each once. Invalid."""
    found: list[PolicyRule] = []
    _check_number(given)
    for rule in given:
        if rule.direction not in directions:
            what = f"a rule is of direction {rule.direction}, in which the policy selects nothing"
            raise Invalid(what, f"add {rule.direction} to its directions")
        for peer in rule.peers:
            if isinstance(peer, NamePeer) and rule.direction == "in":
                raise Invalid(f"{shorten(peer.name)} can't be the source of a rule", "use an address or labels")
        checked = check_names(_check_rule(rule))
        if checked not in found:
            found.append(checked)
    _check_size(found)
    return found


def check_operator_rules(given: Sequence[OperatorRule]) -> list[OperatorRule]:
    """Return the operator's rules in canonical form and in their order. Invalid."""
    if not given:
        raise Invalid("the policy has no rules", "add one: accept, deny or pass")
    _check_number(given)
    found = [_check_rule(rule) for rule in given]
    _check_size(found)
    return found


def _check_number(given: Sequence[PolicyRule] | Sequence[OperatorRule]) -> None:
    """Raise Invalid before any rule is looked at, if they are too many."""
    if len(given) > rules.MAX_POLICY_RULES:
        raise Invalid(f"the policy has {len(given)} rules", f"use at most {rules.MAX_POLICY_RULES}")


def _check_size(found: Sequence[PolicyRule] | Sequence[OperatorRule]) -> None:
    if sum(len(rule.peers) for rule in found) > MAX_PEERS_IN_ALL:
        raise Invalid("the policy's rules have too many peers", f"use at most {MAX_PEERS_IN_ALL}, or address groups")


def _check_rule(rule: R) -> R:
    if not rule.peers:
        raise Invalid("a rule has no peers", "use any, if everybody is meant")
    if len(rule.peers) > rules.MAX_PEERS or len(rule.ports) > rules.MAX_PORT_MATCHES:
        most = f"{rules.MAX_PEERS} peers and {rules.MAX_PORT_MATCHES} ports"
        raise Invalid("a rule has too many peers or ports", f"it may have {most}")
    peers = [_check_peer(peer) for peer in rule.peers]
    return replace(rule, peers=peers, ports=[_check_port(each) for each in rule.ports])


def _check_peer(peer: PolicyPeer) -> PolicyPeer:
    if isinstance(peer, InstancePeer):
        check_selector(peer.select)
        if peer.network is not None:
            check_label("network", peer.network)
    elif isinstance(peer, GroupPeer):
        check_label("group", peer.group)
    elif isinstance(peer, CidrPeer):
        cidr = check_cidr(peer.cidr)
        if len(peer.exceptions) > rules.MAX_EXCEPTIONS:
            raise Invalid(f"{cidr} has {len(peer.exceptions)} exceptions", f"use at most {rules.MAX_EXCEPTIONS}")
        return replace(peer, cidr=cidr, exceptions=[_check_exception(cidr, each) for each in peer.exceptions])
    return peer


def _check_exception(cidr: str, text: str) -> str:
    exception = check_cidr(text)
    if ip_network(exception).version != ip_network(cidr).version:
        raise Invalid(f"{exception} is no exception of {cidr}", "both have the same IP version")
    return exception


def _check_port(match: PortMatch) -> PortMatch:
    of_icmp = match.protocol in ("icmp", "icmpv6")
    if of_icmp and (match.port is not None or match.end_port is not None):
        raise Invalid(f"{match.protocol} has no ports", "it has types, as in icmp/8")
    if not of_icmp and match.icmp_type is not None:
        raise Invalid(f"{match.protocol} has no ICMP types", "it has ports, as in tcp/80")
    if match.icmp_type is not None and not 0 <= match.icmp_type <= 255:
        raise Invalid(f"{match.icmp_type} is no ICMP type", "use 0 to 255")
    if match.end_port is not None and match.port is None:
        raise Invalid("a range of ports has no first port", "as in tcp/8000-8080")
    for port in (match.port, match.end_port):
        if port is not None and not 1 <= port <= 65535:
            raise Invalid(f"{port} is no port", "use 1 to 65535")
    if match.end_port is not None and match.port is not None:
        if match.end_port < match.port:
            raise Invalid(f"ports {match.port}-{match.end_port} are no range", "the lower one comes first")
        if match.end_port == match.port:
            return replace(match, end_port=None)
    return match
