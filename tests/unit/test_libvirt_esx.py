"""ESXi that can't be used: what libvirt's client says of it, as Insula's errors. No more is known of ESXi here.

The server is a small one of the tests, which speaks as much of ESXi's SOAP as is needed to be asked for a password.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from insula.api.tls.certificates import Certificates
from insula.control.instances.drivers.machine import checks
from insula.machine.libvirt.keeper import ESX, LibvirtKeeper
from insula.machine.registry import open_hypervisor, read_password
from insula.model.errors import InsulaError, Unavailable
from insula.model.machine_settings import MachineSettings
from tests.support.libvirt import load

PASSWORD = "right & <proper>"
ENVELOPE = (
    '<?xml version="1.0" encoding="UTF-8"?><soapenv:Envelope'
    ' xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" xmlns:xsd="http://www.w3.org/2001/XMLSchema"'
    ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body>{}</soapenv:Body></soapenv:Envelope>'
)
CONTENT = """<RetrieveServiceContentResponse xmlns="urn:vim25"><returnval>
<rootFolder type="Folder">ha-folder-root</rootFolder>
<propertyCollector type="PropertyCollector">ha-property-collector</propertyCollector>
<about><name>VMware ESXi</name><fullName>VMware ESXi 7.0.0</fullName><vendor>VMware, Inc.</vendor>
<version>7.0.0</version><build>1</build><osType>vmnix-x86</osType><productLineId>embeddedEsx</productLineId>
<apiType>HostAgent</apiType><apiVersion>7.0.0.0</apiVersion></about>
<sessionManager type="SessionManager">ha-sessionmgr</sessionManager>
</returnval></RetrieveServiceContentResponse>"""
SESSION = """<LoginResponse xmlns="urn:vim25"><returnval><key>1</key><userName>root</userName><fullName>root</fullName>
<loginTime>2026-01-01T00:00:00Z</loginTime><lastActiveTime>2026-01-01T00:00:00Z</lastActiveTime>
<locale>en</locale><messageLocale>en</messageLocale></returnval></LoginResponse>"""
FAULT = "<soapenv:Fault><faultcode>ServerFaultCode</faultcode><faultstring>{}</faultstring></soapenv:Fault>"
WRONG = "Cannot complete login due to an incorrect user name or password."


class Esx(BaseHTTPRequestHandler):
    """Answers as ESXi does, up to the login; after that it has nothing."""

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if "<RetrieveServiceContent" in asked:
            self._answer(200, CONTENT)
        elif "<Login" in asked:
            password = re.search("<password[^>]*>(.*?)</password>", asked)
            assert password
            known = password[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") == PASSWORD
            self._answer(*((200, SESSION) if known else (500, FAULT.format(WRONG))))
        else:
            self._answer(500, FAULT.format("the test has no more than that"))

    def _answer(self, status: int, body: str) -> None:
        data = ENVELOPE.format(body.replace(">\n", ">")).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    load()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of an authority that this host does not trust."""
    return Certificates(tmp_path_factory.mktemp("pki")).server(["127.0.0.1", "localhost"])


@pytest.fixture
def port(certificate: Path) -> Iterator[int]:
    with serve(certificate) as found:
        yield found


@contextmanager
def serve(certificate: Path) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ThreadingHTTPServer(("127.0.0.1", 0), Esx) as server:
        server.daemon_threads = False  # they are waited for
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def error(uri: str, password: str = PASSWORD, seconds: float = 30.0) -> InsulaError:
    """Why the hypervisor can't be used."""
    keeper = LibvirtKeeper(uri, ESX, lambda: password, seconds)
    with pytest.raises(InsulaError) as caught:
        keeper.guests()
    keeper.close()
    return caught.value


def test_a_host_where_nobody_listens_can_not_be_reached() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        found = error(f"esx://root@127.0.0.1:{taken.getsockname()[1]}/?no_verify=1")
    assert isinstance(found, Unavailable)
    assert "can't be reached: Couldn't connect to server; hint: is it on" in str(found)


def test_a_certificate_of_nobody_that_is_trusted_is_refused(port: int) -> None:
    found = error(f"esx://root@127.0.0.1:{port}/")
    assert isinstance(found, Unavailable)
    assert f"the certificate of esx://root@127.0.0.1:{port}/ is not valid" in str(found)
    assert found.hint and "update-ca-certificates" in found.hint


def test_a_wrong_password_is_named_and_the_right_one_gets_further(port: int) -> None:
    uri = f"esx://root@127.0.0.1:{port}/?no_verify=1"
    found = error(uri, "wrong")
    assert isinstance(found, Unavailable)
    assert f"{uri} refuses the user name or the password" in str(found)
    assert found.hint and "machines.password_file" in found.hint
    further = error(uri)
    assert "the test has no more than that" in str(further) and "password" not in str(further)


def test_a_host_that_is_silent_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"esx://root@127.0.0.1:{silent.getsockname()[1]}/?no_verify=1"
        keeper = LibvirtKeeper(uri, ESX, lambda: PASSWORD, 0.5)
        with pytest.raises(Unavailable, match=r"does not answer within 0\.5 seconds"):
            keeper.guests()
        connection, _ = silent.accept()
        connection.close()  # so that the library returns, and its thread ends
    keeper.close()


def test_the_password_comes_from_a_file_that_root_alone_may_read(port: int, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n")
    file.chmod(0o600)
    assert read_password(str(file)) == PASSWORD
    uri = f"esx://root@127.0.0.1:{port}/?no_verify=1"
    found = checks.examine_hypervisors(MachineSettings(hypervisor=uri, password_file=str(file)))
    assert found.state == "degraded" and "the test has no more than that" in found.detail
    file.chmod(0o640)
    with pytest.raises(Unavailable, match="is not a file that root alone may read"):
        open_hypervisor(uri, str(file)).check()
    with pytest.raises(Unavailable, match=r"can't be read: No such file"):
        open_hypervisor(uri, str(tmp_path / "absent")).check()
    with pytest.raises(Unavailable, match=r"machines\.password_file names no file"):
        open_hypervisor(uri).check()


def test_with_another_hypervisor_than_qemu_no_machine_is_made() -> None:
    assert checks.refusal(MachineSettings()) is None
    refused = checks.refusal(MachineSettings(hypervisor="esx://root@host/"))
    assert refused and "made with qemu only, and this host is set to esx://root@host/" in str(refused)


def test_doctor_says_what_can_be_used_and_why_not() -> None:
    plain = checks.examine_hypervisors(MachineSettings())
    assert (plain.state, plain.consequence) == ("ok", None)
    assert plain.detail.startswith("qemu; xen: this host ") and plain.detail.endswith("; esx: no host is set")
    xen = checks.examine_hypervisors(MachineSettings(hypervisor="xen:///system"))
    assert xen.state == "degraded" and "xen:///system can't be reached" in xen.detail
    assert xen.hint and "libvirt-daemon-driver-xen" in xen.hint
    assert xen.consequence == "`insula run --vm` fails"
