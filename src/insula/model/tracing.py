"""`insula trace`: whether one end reaches another, and why or why not."""

# ruff: noqa: RUF012 (msgspec copies mutable defaults)

from __future__ import annotations

from insula.model.objects import Struct


class TraceRule(Struct, kw_only=True):
    """An installed rule that decided about the packet: the chain where it is, what it did, and its text."""

    where: str
    verdict: str
    text: str


class TraceView(Struct, kw_only=True):
    """What becomes of one packet.

    `allowed` is by the installed rules; `wanted` is by networks, routers, peerings and policies. If they differ, the
    host has drifted, and `insula verify` tells more. `steps` are the reasons, in the order of the packet's way. `seen`
    tells where a packet that was sent was seen last, None if none was.
    """

    source: str
    target: str
    source_address: str
    target_address: str
    service: str
    allowed: bool
    wanted: bool
    steps: list[str]
    rules: list[TraceRule] = []
    seen: str | None = None
