"""Insula's own certificate authorities (X.509, RFC 5280), and what they sign.

There are two, each in a file with its key (ECDSA P-256) below ROOT/pki, mode 600: one signs the server's certificate,
the other those of clients. A client's certificate is no server's, and the other way round, whatever is in it.

A certificate names nothing but its serial number: the store says whose it is. So roles are never frozen in it, and it
ends when its record does. An authority is rotated with an overlap: the one before stays trusted for a time, and signs
the server's certificate meanwhile, so that clients who trust only the old one have the time to fetch the new one.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from insula.model.errors import Conflict

AUTHORITY_LIFE = timedelta(days=3650)
SERVER_LIFE = timedelta(days=90)
RENEWAL = timedelta(days=30)
"""A certificate that ends sooner is renewed."""
_EARLIER = timedelta(minutes=5)  # clocks differ
Holder = Literal["server", "client"]
OVERLAP: dict[Holder, timedelta] = {"server": timedelta(days=30), "client": timedelta(days=90)}
"""How long the authority before is trusted: the server's until clients have fetched the new one, that of clients until
the last certificate that it has signed ends."""


class CertificateAuthority:
    """A certificate authority: its certificate, and its key."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self.key = key

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def sign(
        self, public_key: ec.EllipticCurvePublicKey, names: Sequence[str], kind: Holder, serial: int, life: timedelta
    ) -> x509.Certificate:
        """Sign a certificate for a server with these names, or for a client."""
        now = datetime.now(UTC)
        usage = ExtendedKeyUsageOID.SERVER_AUTH if kind == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(f"insula {kind}"))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(serial)
            .not_valid_before(now - _EARLIER)
            .not_valid_after(now + life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(map(_general_name, names)), critical=False)
        return builder.sign(self.key, hashes.SHA256())


class Certificates:
    """The authorities and the server's certificate in a directory. Its methods block."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def authority(self, kind: Holder) -> CertificateAuthority:
        """Return the newest authority. It is made if there is none, and rotated a year before it ends."""
        path = self._path(kind)
        with contextlib.suppress(FileNotFoundError):
            found = _load(path)
            if found.certificate.not_valid_after_utc - datetime.now(UTC) > AUTHORITY_LIFE / 10:
                return found
            os.replace(path, self._path(kind, "old."))
        key = ec.generate_private_key(ec.SECP256R1())
        made = CertificateAuthority(_self_signed(f"Insula {kind} authority", key), key)
        _write(path, key, [made.certificate])
        return made

    def rotate(self, kind: Holder, *, now: bool = False) -> None:
        """Make a new authority, and trust the one before for the time of `OVERLAP`; with `now`, no longer. Conflict
        while the overlap of an earlier rotation lasts, since only two are trusted."""
        self.authority(kind)
        if not now and self.before(kind):
            raise Conflict(f"the authority of {kind}s is being rotated already", "wait, or end the old one with --now")
        if now:
            self._path(kind, "old.").unlink(missing_ok=True)
            self._path(kind).unlink()
        else:
            os.replace(self._path(kind), self._path(kind, "old."))
        self.authority(kind)

    def before(self, kind: Holder) -> CertificateAuthority | None:
        """Return the authority before the last rotation, as long as it is trusted."""
        new = self.authority(kind)  # first, since it may be rotated now
        try:
            old = _load(self._path(kind, "old."))
        except FileNotFoundError:
            return None
        over = new.certificate.not_valid_before_utc + _EARLIER + OVERLAP[kind]
        return old if datetime.now(UTC) < min(over, old.certificate.not_valid_after_utc) else None

    def trusted(self, kind: Holder) -> bytes:
        """Return the certificates of the authorities that are trusted, the newest first: PEM."""
        before = self.before(kind)
        return self.authority(kind).pem + (before.pem if before else b"")

    def server(self, names: Iterable[str]) -> Path:
        """Return the file with the server's key and certificate chain, renewed if it ends soon or lacks a name."""
        path, wanted = self.directory / "server.pem", sorted(set(names))
        authority = self.before("server") or self.authority("server")
        with contextlib.suppress(FileNotFoundError, ValueError):
            certificate = x509.load_pem_x509_certificates(path.read_bytes())[0]
            left = certificate.not_valid_after_utc - datetime.now(UTC)
            signed = certificate.issuer == authority.certificate.subject
            if left > RENEWAL and signed and _names(certificate) == wanted:
                certificate.verify_directly_issued_by(authority.certificate)
                return path
        key = ec.generate_private_key(ec.SECP256R1())
        serial = x509.random_serial_number()
        made = authority.sign(key.public_key(), wanted, "server", serial, SERVER_LIFE)
        _write(path, key, [made, authority.certificate])
        return path

    def client(self, serial: int, life: timedelta) -> bytes:
        """Make a key and a client's certificate with this serial number: PEM of both."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = self.authority("client").sign(key.public_key(), (), "client", serial, life)
        return _pem(key, [made])

    def _path(self, kind: Holder, infix: str = "") -> Path:
        return self.directory / f"{kind}-ca.{infix}pem"


def _self_signed(name: str, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    now = datetime.now(UTC)
    subject = x509.Name([*_name(name), x509.NameAttribute(NameOID.SERIAL_NUMBER, os.urandom(4).hex())])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_KEY_USAGE, critical=True)
        .sign(key, hashes.SHA256())
    )


_KEY_USAGE = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _names(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return sorted(str(name.value) for name in names)


def _load(path: Path) -> CertificateAuthority:
    data = path.read_bytes()
    key = serialization.load_pem_private_key(data, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return CertificateAuthority(x509.load_pem_x509_certificates(data)[0], key)


def _pem(key: ec.EllipticCurvePrivateKey, certificates: Iterable[x509.Certificate]) -> bytes:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


def _write(path: Path, key: ec.EllipticCurvePrivateKey, certificates: Iterable[x509.Certificate]) -> None:
    """Write a key and certificates to a file with mode 600, whole or not at all."""
    data = _pem(key, certificates)
    draft = path.with_name(f"{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        draft.unlink()
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(draft, path)
