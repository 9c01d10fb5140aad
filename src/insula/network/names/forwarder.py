"""The DNS forwarder: what an instance with name rules is answered.

A query is egress: one about a name outside the instance's rules is answered here, and nothing leaves. The tenant's own
names are asked of its dnsmasq, which never forwards them. The addresses of an answer are leased before the client gets
it, so its first packet may follow at once; if they can't be leased, the answer is SERVFAIL.
"""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_address
from typing import Final

from insula.network.names import answers, edns, upstream, wire
from insula.network.names.edns import FILTERED, NETWORK_ERROR, PROHIBITED, Edns
from insula.network.names.patterns import normalise
from insula.network.names.permission import may_lease
from insula.network.names.public import is_public
from insula.network.names.rates import RateLimit
from insula.network.names.requests import LessorClient
from insula.network.names.rules import ClientRules, EgressRules, is_own
from insula.network.names.upstream import NoAnswer
from insula.network.names.wire import AAAA, HTTPS, PTR, SVCB, A, MalformedMessage, Message, Question, Record

RATE: Final = 50.0  # queries a second, for each instance
BURST: Final = 200.0  # at once
LONG_LABEL: Final = 40  # characters: longer labels carry data more often than names
LONG_COST: Final = 5.0  # queries that one with a long label counts as
PENDING: Final = 2_000  # queries of a tenant that wait for an upstream server


class Forwarder:
    """Answers the queries of a tenant's instances. `rules` are replaced when others are in force."""

    def __init__(self, lessor: LessorClient) -> None:
        self.rules = EgressRules()
        self.counters: Counter[str] = Counter()
        self._lessor = lessor
        self._rate = RateLimit(RATE, BURST)
        self._pending = 0

    async def respond(self, data: bytes, source: str, over_tcp: bool) -> bytes | None:
        """Return the response to a query from `source`, None if it deserves none."""
        client = self.rules.by_address.get(source)
        if client is None:
            return None
        try:
            query = wire.parse(data)
            sender = edns.edns_of(query)
        except MalformedMessage:
            return _format_error(data)
        if query.flags & wire.RESPONSE:
            return None
        response = await self._respond(query, sender, client, source)
        if sender is None:
            response.additionals = []
        limit = 65535 if over_tcp else min(sender.size, edns.UDP_SIZE) if sender else edns.PLAIN_SIZE
        return wire.compose(response, limit)

    async def _respond(self, query: Message, sender: Edns | None, client: str, source: str) -> Message:
        """Check the query's form and rate, then answer it."""
        if query.flags & wire.OPCODE:
            return _response(query, wire.NOTIMP)
        if len(query.questions) != 1:
            return _response(query, wire.FORMERR)
        if sender is not None and sender.version > 0:
            return _response(query, wire.NOERROR, edns.opt(version_error=True))
        [question] = query.questions
        labels = wire.labels_of(question.name)
        long = any(len(label) > LONG_LABEL for label in labels)
        self.counters["long"] += long
        if not self._rate.allows(client, LONG_COST if long else 1.0):
            self.counters["limited"] += 1
            return _response(query, wire.REFUSED, edns.opt(PROHIBITED, "too many queries"))
        name = normalise(wire.text_of(question.name))
        if name is None or question.class_ != wire.IN:
            return self._filtered(query)
        rules = self.rules.clients[client]
        if name.endswith((".in-addr.arpa", ".ip6.arpa")):
            return await self._reverse(query, question, name, source)
        if is_own(name):
            return await self._forward(query, question)
        if not rules.matching(name):
            return self._filtered(query)
        if self._pending >= PENDING:
            return _response(query, wire.SERVFAIL, edns.opt(NETWORK_ERROR, "too many queries"))
        self._pending += 1
        try:
            return await self._outside(query, question, rules, source)
        finally:
            self._pending -= 1

    async def _outside(self, query: Message, question: Question, rules: ClientRules, source: str) -> Message:
        """Answer a query about a name that a rule allows."""
        six = {":" in address for address in rules.addresses}
        if (question.type == A and False in six) or (question.type == AAAA and True in six):
            return await self._addresses(query, question, rules, source)
        if question.type in (SVCB, HTTPS):
            return await self._services(query, question, rules)
        return _response(query, wire.NOERROR)

    async def _addresses(self, query: Message, question: Question, rules: ClientRules, source: str) -> Message:
        """Answer with addresses, which are leased first."""
        try:
            answer = await upstream.ask(self.rules.servers, question)
            chain, records = answers.follow(answer, question)
        except (NoAnswer, MalformedMessage):
            return _response(query, wire.SERVFAIL, edns.opt(NETWORK_ERROR))
        found = answers.found_in(chain, records, question)
        leased = [address for address in found.addresses if may_lease(self.rules, rules, address)]
        anyway = {each for each in found.addresses if any(range_.contains(each) for range_ in rules.open)}
        told = [record for record in records if _address(record) in anyway | set(leased)]
        if len(told) < len(records):
            self.counters["removed"] += 1
        if leased and not await self._lessor.grant(source, list(found.names), leased, found.ttl):
            return _response(query, wire.SERVFAIL, edns.opt(NETWORK_ERROR, "addresses can't be leased"))
        if records and not told:
            return _response(query, wire.NOERROR, edns.opt(FILTERED, "addresses that are not public"))
        response = _response(query, answer.rcode)
        response.answers, response.authorities = answers.compose_answer(answer, question, chain, told)
        return response

    async def _services(self, query: Message, question: Question, rules: ClientRules) -> Message:
        """Answer with SVCB or HTTPS records, without what would lead past the checks."""
        try:
            answer = await upstream.ask(self.rules.servers, question)
            chain, records = answers.follow(answer, question)
        except (NoAnswer, MalformedMessage):
            return _response(query, wire.SERVFAIL, edns.opt(NETWORK_ERROR))
        told = answers.services(records, question, lambda name: bool(rules.matching(name)))
        response = _response(query, answer.rcode)
        response.answers, response.authorities = answers.compose_answer(answer, question, chain if told else [], told)
        return response

    async def _reverse(self, query: Message, question: Question, name: str, source: str) -> Message:
        """Answer the name of an address (RFC 1035, 3.5): of the tenant's own, or of one that was leased."""
        address = _reversed(name)
        if address is None or question.type != PTR:
            return self._filtered(query)
        if not is_public(address):  # dnsmasq doesn't forward these
            return await self._forward(query, question)
        names = await self._lessor.names(source, address)
        if not names:
            return self._filtered(query)
        response = _response(query, wire.NOERROR)
        response.answers = [Record(question.name, PTR, wire.IN, 60, wire.name_of(each)) for each in names[:16]]
        return response

    async def _forward(self, query: Message, question: Question) -> Message:
        """Answer what the tenant's dnsmasq answers."""
        try:
            answer = await upstream.ask(self.rules.own_servers, question)
        except NoAnswer:
            return _response(query, wire.SERVFAIL, edns.opt(NETWORK_ERROR))
        response = _response(query, answer.rcode)
        response.answers, response.authorities = answer.answers, answer.authorities
        return response

    def _filtered(self, query: Message) -> Message:
        self.counters["filtered"] += 1
        return _response(query, wire.NXDOMAIN, edns.opt(FILTERED, "no rule allows this name"))


def _response(query: Message, rcode: int, opt: Record | None = None) -> Message:
    """Return an empty response to a query."""
    kept = query.flags & (wire.OPCODE | wire.RECURSION_DESIRED)
    flags = wire.RESPONSE | wire.RECURSION_AVAILABLE | kept | rcode
    return Message(query.id, flags, list(query.questions), additionals=[opt or edns.opt()])


def _format_error(data: bytes) -> bytes | None:
    """Return a response to what can't be parsed; None if it may be a response itself."""
    if len(data) < 12 or data[2] & 0x80:
        return None
    return wire.compose(Message(int.from_bytes(data[:2], "big"), wire.RESPONSE | wire.FORMERR))


def _address(record: Record) -> str:
    return str(ip_address(record.data)) if len(record.data) in (4, 16) else ""


def _reversed(name: str) -> str | None:
    """Return the address of a name below in-addr.arpa or ip6.arpa; None if it is none."""
    stem, _, zone = name.rpartition(".")[0].rpartition(".")
    parts = stem.split(".")[::-1]
    try:
        if zone == "in-addr":
            return str(ip_address(".".join(parts)))
        if len(parts) != 32 or not all(len(part) == 1 for part in parts):
            return None
        return str(ip_address(int("".join(parts), 16).to_bytes(16, "big")))
    except ValueError:
        return None
