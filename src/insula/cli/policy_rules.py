"""Rules of policies as words: ``from:app=web tcp/80-90``. They are converted to objects of the API, and back.

    from:PEER [PORTS]   packets that come from a peer (direction in)
    to:PEER [PORTS]     packets that go to a peer (direction out)

PEER is any, labels as in app=web,tier!=back, network:NAME, both of these with a comma, a range of addresses with
exceptions as in 10.0.0.0/8,!10.1.0.0/16, group:NAME, or in direction out a DNS name. PORTS are separated by commas:
tcp, tcp/80, udp/5000-5100, icmp, icmp/echo, icmp/8, icmpv6/128; without them it is any protocol.
"""

from __future__ import annotations

from insula.model.errors import Invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Object = dict[str, Any]

_PROTOCOLS = ("tcp", "udp", "icmp", "icmpv6")


def parse_rule(text: str) -> Object:
    """Convert words to a rule. Invalid."""
    head, _, ports = text.strip().partition(" ")
    direction, colon, peer = head.partition(":")
    if direction not in ("from", "to") or not colon or not peer:
        raise Invalid(f"{text[:60]!r} is no rule", "as in 'from:app=web tcp/80' or 'to:10.0.0.0/8'")
    matches = [match for word in ports.replace(",", " ").split() for match in _ports(word)]
    return {"direction": "in" if direction == "from" else "out", "peers": [_peer(peer)], "ports": matches}


def parse_operator_rule(text: str) -> Object:
    """Convert ``ACTION RULE`` to a rule of the operator. Invalid."""
    action, _, rule = text.strip().partition(" ")
    if action not in ("accept", "deny", "pass") or not rule:
        raise Invalid(f"{text[:60]!r} is no rule of the operator", "as in 'deny to:10.0.0.0/8', or accept, or pass")
    found = parse_rule(rule)
    if found["peers"][0]["type"] not in ("any", "cidr"):
        raise Invalid("a rule of the operator is about addresses outside", "use any, or a range as in 10.0.0.0/8")
    return {**found, "action": action}


def _peer(text: str) -> Object:
    kind, colon, name = text.partition(":")
    if text == "any":
        return {"type": "any"}
    if kind == "group" and colon:
        return {"type": "group", "group": name}
    words = text.split(",")
    if _is_address(words[0]):
        without = [word[1:] for word in words[1:] if word.startswith("!")]
        if len(without) < len(words) - 1:
            raise Invalid(f"{text[:60]!r} has several ranges", "exceptions begin with !, as in 10.0.0.0/8,!10.1.0.0/16")
        return {"type": "cidr", "cidr": words[0], "exceptions": without}
    if (kind == "network" and colon) or any("=" in word for word in words):
        return _instances(words)
    if "." in text:
        return {"type": "name", "name": text}
    raise Invalid(f"{text[:60]!r} is no peer", "use any, NAME=VALUE, network:NAME, group:NAME, a range, or a DNS name")


def _is_address(text: str) -> bool:
    plain = text.partition("/")[0]
    return (":" in plain and not plain.startswith("network:")) or plain.replace(".", "").isdigit()


def _instances(words: list[str]) -> Object:
    found: Object = {"type": "instances", "select": selector([w for w in words if not w.startswith("network:")])}
    networks = [word.removeprefix("network:") for word in words if word.startswith("network:")]
    if len(networks) > 1:
        raise Invalid("a peer has two networks, and an address is on one", "use a rule for each")
    if networks:
        found["network"] = networks[0]
    return found


def selector(words: list[str]) -> Object:
    """Convert conditions such as ``app=web`` and ``tier!=back`` to a selector. Invalid."""
    labels: Object = {}
    expressions = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.strip("!"):
            raise Invalid(f"{word[:60]!r} is no label", "as in app=web, or app!=web")
        if key.endswith("!"):
            expressions.append({"key": key[:-1], "operator": "NotIn", "values": [value]})
        elif labels.get(key, value) != value:
            raise Invalid(f"label {key[:60]} can't have two values", "use a policy for each")
        else:
            labels[key] = value
    return {"labels": labels, "expressions": expressions}


def _ports(word: str) -> list[Object]:
    protocol, slash, ports = word.partition("/")
    if word == "any":
        return []
    if protocol not in _PROTOCOLS:
        hint = "named ports are not supported: use the number, as in tcp/80"
        raise Invalid(f"{word[:60]!r} names no protocol of tcp, udp, icmp and icmpv6", hint)
    if not slash:
        return [{"protocol": protocol}]
    if protocol == "icmp" and ports == "echo":
        return [{"protocol": "icmp", "icmp_type": 8}, {"protocol": "icmpv6", "icmp_type": 128}]
    if protocol in ("icmp", "icmpv6"):
        return [{"protocol": protocol, "icmp_type": _number(ports, word)}]
    first, dash, last = ports.partition("-")
    found = {"protocol": protocol, "port": _number(first, word)}
    return [{**found, "end_port": _number(last, word)} if dash else found]


def _number(text: str, word: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        hint = "named ports are not supported: use the number, as in tcp/80 or tcp/8000-8080"
        raise Invalid(f"{word[:60]!r} has no port", hint)
    return int(text)


# -- back to words -----------------------------------------------------------------------------------------------------


def rule_text(rule: Object) -> str:
    """Return a rule as words."""
    ports = ",".join(_port_text(each) for each in rule["ports"]) or "any"
    word = "from" if rule["direction"] == "in" else "to"
    return f"{word}:{' or '.join(_peer_text(peer) for peer in rule['peers'])} {ports}"


def _peer_text(peer: Object) -> str:
    if peer["type"] == "cidr":
        return ",".join([peer["cidr"], *(f"!{each}" for each in peer["exceptions"])])
    if peer["type"] == "group":
        return f"group:{peer['group']}"
    if peer["type"] == "instances":
        network = [f"network:{peer['network']}"] if peer.get("network") else []
        return ",".join([*network, *_conditions(peer["select"])]) or "instances"
    return str(peer.get("name", "any"))


def selector_text(select: Object) -> str:
    """Return a selector as words."""
    return ",".join(_conditions(select)) or "(all)"


def _conditions(select: Object) -> list[str]:
    found = [f"{key}={value}" for key, value in select["labels"].items()]
    for each in select["expressions"]:
        if each["operator"] == "NotIn" and len(each["values"]) == 1:
            found.append(f"{each['key']}!={each['values'][0]}")
        else:
            values = f" ({' '.join(each['values'])})" if each["values"] else ""
            found.append(f"{each['key']} {each['operator']}{values}")
    return found


def _port_text(match: Object) -> str:
    number = match.get("port") if match.get("port") is not None else match.get("icmp_type")
    last = f"-{match['end_port']}" if match.get("end_port") is not None else ""
    return str(match["protocol"]) + (f"/{number}{last}" if number is not None else "")
