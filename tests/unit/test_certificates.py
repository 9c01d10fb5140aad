"""Certificates of HTTPS: for whom and how long, what renews them, and by whom they are signed."""

from __future__ import annotations

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from insula.api.tls import certificates
from insula.api.tls.certificates import AUTHORITY_LIFE, OVERLAP, RENEWAL, SERVER_LIFE, Certificates, Holder
from insula.model.errors import Conflict

NAMES = ["cloud.example.com", "192.0.2.7", "2001:db8::7", "localhost"]


@pytest.fixture
def own(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path / "pki")


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the clock so much later."""

    def set_clock(passed: timedelta) -> None:
        class Later(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
                return datetime.now(tz) + passed

        monkeypatch.setattr(certificates, "datetime", Later)

    return set_clock


def leaf(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificates(path.read_bytes())[0]


def signed_by(certificate: x509.Certificate, authority: bytes) -> bool:
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
    except (InvalidSignature, ValueError):
        return False
    return True


def test_it_is_for_each_name_and_address(own: Certificates) -> None:
    """Addresses are such in it, and no names: clients don't take the one for the other (RFC 9525)."""
    names = leaf(own.server(NAMES)).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"cloud.example.com", "localhost"}
    assert set(names.get_values_for_type(x509.IPAddress)) == {
        ipaddress.ip_address("192.0.2.7"), ipaddress.ip_address("2001:db8::7")
    }  # fmt: skip


def test_it_stays_until_there_is_a_reason(own: Certificates) -> None:
    serial = leaf(own.server(NAMES)).serial_number
    assert leaf(own.server(reversed(NAMES))).serial_number == serial
    assert leaf(own.server(NAMES[:1])).serial_number != serial, "a name less"


@pytest.mark.parametrize("names", [NAMES[1:], [*NAMES, "192.0.2.8"]], ids=["a name less", "an address more"])
def test_other_names_take_another_one_of_the_same_authority(names: list[str], own: Certificates) -> None:
    before, authority = leaf(own.server(NAMES)), own.trusted("server")
    made = leaf(own.server(names))
    assert made.serial_number != before.serial_number
    assert own.trusted("server") == authority and signed_by(made, authority)


def test_it_is_renewed_before_it_ends(own: Certificates, after: Any) -> None:
    before, authority = leaf(own.server(NAMES)), own.trusted("server")
    assert before.not_valid_after_utc - datetime.now(UTC) <= SERVER_LIFE
    after(SERVER_LIFE - RENEWAL - timedelta(days=1))
    assert leaf(own.server(NAMES)) == before
    after(SERVER_LIFE - RENEWAL + timedelta(days=1))
    made = leaf(own.server(NAMES))
    assert made.not_valid_after_utc > before.not_valid_after_utc + timedelta(days=50)
    assert signed_by(made, authority) and own.trusted("server") == authority


@pytest.mark.parametrize(
    "damaged", [b"", b"-----BEGIN CERTIFICATE-----\n", os.urandom(100)], ids=["empty", "cut", "random"]
)
def test_a_damaged_one_is_made_anew(damaged: bytes, own: Certificates) -> None:
    path = own.server(NAMES)
    path.write_bytes(damaged)
    assert signed_by(leaf(own.server(NAMES)), own.trusted("server"))


def test_those_of_servers_and_clients_are_told_apart(own: Certificates) -> None:
    """Other authorities, and other purposes, so that a client's certificate is no server's."""
    server = leaf(own.server(NAMES))
    client = x509.load_pem_x509_certificate(own.client(0x1F2E, timedelta(days=7)))
    purposes = [[*each.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value] for each in (server, client)]
    assert purposes == [[ExtendedKeyUsageOID.SERVER_AUTH], [ExtendedKeyUsageOID.CLIENT_AUTH]]
    assert signed_by(server, own.trusted("server")) and not signed_by(server, own.trusted("client"))
    assert signed_by(client, own.trusted("client")) and not signed_by(client, own.trusted("server"))
    assert client.serial_number == 0x1F2E and client.not_valid_after_utc < datetime.now(UTC) + timedelta(days=7)
    assert "1f2e" not in client.subject.rfc4514_string(), "it names nobody, and has no role"


def test_keys_are_elliptic_and_private(own: Certificates) -> None:
    path = own.server(NAMES)
    own.client(1, timedelta(days=1))
    assert isinstance(leaf(path).public_key(), ec.EllipticCurvePublicKey)
    assert {file.stat().st_mode & 0o777 for file in own.directory.iterdir()} == {0o600}
    assert own.directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["server", "client"])
def test_a_rotation_overlaps(kind: Holder, own: Certificates, after: Any) -> None:
    first = own.trusted(kind)
    own.rotate(kind)
    both = own.trusted(kind)
    assert both.endswith(first) and len(both) > len(first)
    if kind == "server":
        assert signed_by(leaf(own.server(NAMES)), first), "who knows only the old one, can still connect"
    with pytest.raises(Conflict, match="is being rotated already"):
        own.rotate(kind)
    after(OVERLAP[kind] + timedelta(hours=1))
    assert own.trusted(kind) == both.removesuffix(first)
    if kind == "server":
        assert signed_by(leaf(own.server(NAMES)), own.trusted(kind))


def test_an_authority_is_rotated_a_year_before_it_ends(own: Certificates, after: Any) -> None:
    first = own.trusted("client")
    after(AUTHORITY_LIFE - timedelta(days=366))
    assert own.trusted("client") == first
    after(AUTHORITY_LIFE - timedelta(days=364))
    assert own.trusted("client").endswith(first) and own.trusted("client") != first


def test_who_knows_only_the_one_before_that_can_still_connect(own: Certificates, after: Any) -> None:
    first = own.trusted("server")
    after(AUTHORITY_LIFE - timedelta(days=364))
    assert signed_by(leaf(own.server(NAMES)), first)


def test_the_one_before_a_theft_is_trusted_no_more(own: Certificates) -> None:
    first = own.trusted("server")
    own.rotate("server", now=True)
    assert first not in own.trusted("server")
    assert not signed_by(leaf(own.server(NAMES)), first)
