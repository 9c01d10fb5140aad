"""`HttpsRemote`: a daemon on another machine, by HTTPS.

The server is trusted by Insula's own certificate authority, which the client has from an invitation; authorities of the
system are not looked at. TLS 1.3 only. The rest of the client works with a plain socket, which it also polls: that is
one end of a socket pair, and a thread passes bytes between the other end and TLS.
"""

from __future__ import annotations

import select
import signal
import socket
import ssl
import threading

from insula.client.http import Remote
from insula.model.errors import Denied, InsulaError, Invalid, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_PIECE = 65536
CONNECT = 10.0
"""Seconds to connect to an address, and for the handshake."""


class HttpsRemote(Remote):
    """A daemon at one of `addresses` (HOST:PORT), tried in order. `authority` is PEM; `certificate` names a file with
    the client's key and certificate, which proves who it is if there is no `token`."""

    def __init__(
        self, addresses: Sequence[str], authority: str, token: str | None = None, certificate: str | None = None
    ) -> None:
        super().__init__(addresses[0] if addresses else "", token)
        self.addresses = list(addresses)
        self.context = context_of(authority, certificate)

    def connect(self, timeout: float | None = None) -> socket.socket:
        """Connect to the first address that answers. Unavailable, Denied if its certificate is not of the authority."""
        problems = []
        for address in self.addresses:
            host, port = split(address)
            try:
                plain = socket.create_connection((host, port), CONNECT)
            except OSError as error:
                problems.append(f"{address}: {error.strerror or error}")
                continue
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else the request waits for an acknowledgement
            return self._open(plain, host, address, timeout)
        raise Unavailable("; ".join(problems) or "there is no address", "is insulad running there, and reachable?")

    def _open(self, plain: socket.socket, host: str, address: str, timeout: float | None) -> socket.socket:
        """Return a plain socket whose bytes are passed by TLS over the connection `plain`."""
        ours, theirs = socket.socketpair()
        shaken = threading.Event()
        failed: list[OSError] = []

        def run() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})  # TLS writes without MSG_NOSIGNAL
            try:
                secure = self.context.wrap_socket(plain, server_hostname=host)
            except OSError as error:
                plain.close()
                theirs.close()
                failed.append(error)
                return
            finally:
                shaken.set()
            _pass(secure, theirs)

        threading.Thread(target=run, name="tls", daemon=True).start()
        shaken.wait()
        if failed:
            ours.close()
            raise explained(failed[0], address, self._other_authority(failed[0], address))
        ours.settimeout(timeout)
        return ours

    def _other_authority(self, error: OSError, address: str) -> str:
        """Return which authority the server names after it has not proved itself, and which one is trusted; "" if that
        is not the reason."""
        from hashlib import sha256

        from insula.client.client import Client

        if not isinstance(error, ssl.SSLCertVerificationError):
            return ""
        trusted = {f"SHA256:{sha256(each).hexdigest()}" for each in self.context.get_ca_certs(binary_form=True)}
        try:
            login = Client(remote=_Unverified(address), timeout=CONNECT).identities.login()
            named = set(certificates(str(login["authority"])))
        except (InsulaError, OSError, LookupError, TypeError, ValueError):  # it is whatever
            named = set()
        if named & trusted:
            return ""
        return f": its authority is {' or '.join(sorted(named)) or 'unknown'}, not {' or '.join(sorted(trusted))}"


class _Unverified(HttpsRemote):
    """A server that has not proved who it is. Nothing secret is sent to it."""

    def __init__(self, address: str) -> None:
        Remote.__init__(self, address)
        self.addresses = [address]
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.check_hostname = False
        self.context.verify_mode = ssl.CERT_NONE


def authority_at(address: str, wanted: str) -> str:
    """Return the certificate (PEM) of the authority with this fingerprint, as the server tells it. Denied.

    Whoever answers, only the certificate that the fingerprint is of is taken; the server has to prove itself by it.
    """
    from insula.client.client import Client

    found = certificates(str(Client(remote=_Unverified(address), timeout=CONNECT).identities.login()["authority"]))
    for name, pem in found.items():
        if name.removeprefix("SHA256:") == wanted.strip().lower().replace(":", "").removeprefix("sha256"):
            return pem
    what = f"{address} has the authority {' or '.join(found) or 'none'}, not {wanted[:100]}"
    raise Denied(what, "ask its operator for `insula remote fingerprint`; another server may answer in its place")


def certificates(pem: str) -> dict[str, str]:
    """Return certificates by their fingerprints, as in SHA256:0f3a…; malformed ones are left out."""
    from hashlib import sha256

    end, found = "-----END CERTIFICATE-----", {}
    for part in pem[:65536].split(end)[:-1]:
        one = part.strip() + "\n" + end + "\n"
        try:
            found[f"SHA256:{sha256(ssl.PEM_cert_to_DER_cert(one)).hexdigest()}"] = one
        except ValueError:
            continue
    return found


def context_of(authority: str, certificate: str | None = None) -> ssl.SSLContext:
    """Return the settings of TLS for a server of this authority (PEM), with the client's `certificate`, a file. Invalid
    if that has none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=authority)
    if certificate:
        try:
            context.load_cert_chain(certificate)
        except OSError as error:
            what = "it has no key with its certificate" if isinstance(error, ssl.SSLError) else error.strerror
            raise Invalid(f"{certificate}: {what}", "name a file from `insula certificate create`") from None
    return context


def split(address: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT; an IPv6 address stands in brackets. Invalid."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise Invalid(f"{address[:100]!r} is no address of a server", "write HOST:PORT")
    return host.strip("[]"), int(port)


def explained(error: OSError, address: str, other: str = "") -> InsulaError:
    """Return the error for a user of a handshake that failed; `other` says whose certificate it was."""
    if isinstance(error, ssl.SSLCertVerificationError):
        what = f"{address} is not the server that you were invited to{other or f': {error.verify_message}'}"
        return Denied(what, "ask its operator whether that is right, and for a new invitation")
    if isinstance(error, ConnectionError | ssl.SSLEOFError | ssl.SSLZeroReturnError):
        hint = "it closes those of an address that has too many: close some, or try again in a few seconds"
        return Unavailable(f"{address} has closed the connection before TLS began", hint)
    return Unavailable(f"{address}: no TLS: {error}", "is it an address of Insula's HTTPS?")


def _pass(secure: ssl.SSLSocket, plain: socket.socket) -> None:
    """Pass bytes in both directions until one side ends."""
    secure.setblocking(False)
    plain.setblocking(False)
    to_secure, to_plain = bytearray(), bytearray()
    with secure, plain:
        try:
            while True:
                _wait(secure, plain, to_secure, to_plain)
                if len(to_plain) < _PIECE and not _read(secure, to_plain):
                    plain.setblocking(True)
                    plain.sendall(to_plain)
                    return
                if len(to_secure) < _PIECE and not _read(plain, to_secure):
                    return
                _write(secure, to_secure)
                _write(plain, to_plain)
        except OSError:
            return


def _wait(secure: ssl.SSLSocket, plain: socket.socket, to_secure: bytearray, to_plain: bytearray) -> None:
    """Wait until something can be passed on. TLS may have decrypted bytes already, which poll(2) does not see."""
    if secure.pending() and len(to_plain) < _PIECE:
        return
    poll = select.poll()
    poll.register(secure, (select.POLLIN if len(to_plain) < _PIECE else 0) | (select.POLLOUT if to_secure else 0))
    poll.register(plain, (select.POLLIN if len(to_secure) < _PIECE else 0) | (select.POLLOUT if to_plain else 0))
    poll.poll()


def _read(source: socket.socket, target: bytearray) -> bool:
    """Read what is there; False at the end."""
    try:
        data = source.recv(_PIECE)
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return True
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError):
        return False
    target += data
    return bool(data)


def _write(target: socket.socket, data: bytearray) -> None:
    """Write what can be written."""
    if not data:
        return
    try:
        del data[: target.send(data)]
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return
