"""Servers in the namespace that plays the outside: registries that work, hang or lead elsewhere, and their DNS.

    python -m tests.support.outside registry ADDRESS    registries at ADDRESS:5001, plain HTTP, and DNS at ADDRESS:53
    python -m tests.support.outside canary ADDRESS…     prints "connection" for each connection to a port 9000

What a registry does depends on the name by which it is asked:

    plain.test          works
    private.test        works for the user ada with `PASSWORD`
    pair.test           sends no layer until two are asked for
    hang.test           sends the beginning of a layer, and nothing more
    redirect-X.test     redirects each request for a manifest to the port 9000 of X
    blob-X.test         redirects each request for a layer there
    realm-X.test        has its tokens there

A repository below hang/ hangs at each of them. X is an IPv4 address with dashes, or `six` for ::1. DNS answers
`to-X.test` with X, and other names with ADDRESS. Each request is printed as a line: name, method, path and whether
there was a login.
"""

from __future__ import annotations

import base64
import http.server
import json
import os
import socket
import struct
import sys
import threading
from typing import Any

from tests.support.images import ARCHITECTURE, OCI, Layout, digest, member, tar

PASSWORD = "correct horse"
PORT, CANARY = 5001, 9000
FOREVER = threading.Event()
BOTH = threading.Barrier(2)


def layout() -> Layout:
    """The image that all of them have, of two layers."""
    made = Layout()
    made.image([tar(member("a", b"one" * 50_000)), tar(member("b", b"two"))])
    return made


LAYOUT = layout()
MANIFEST = LAYOUT.blobs[LAYOUT.index["manifests"][0]["digest"]]
INDEX = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": OCI + "index.v1+json",
        "manifests": [
            {
                "mediaType": OCI + "manifest.v1+json",
                "digest": digest(MANIFEST),
                "size": len(MANIFEST),
                "platform": {"os": "linux", "architecture": ARCHITECTURE},
            }
        ],
    }
).encode()
"""An index of that image, which is served by its digest."""
LAYERS = [layer["digest"] for layer in json.loads(MANIFEST)["layers"]]


def say(line: str) -> None:
    """Print a line at once, whole, from any thread."""
    os.write(1, f"{line}\n".encode())


def address(text: str) -> str:
    return "::1" if text == "six" else text.replace("-", ".")


def place(text: str) -> str:
    return f"http://[::1]:{CANARY}" if text == "six" else f"http://{address(text)}:{CANARY}"


class Registry(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.headers.get("Host", "").partition(".")[0]
        kind, _, target = name.partition("-")
        if "/hang/" in self.path:
            kind = "hang"
        login = self.headers.get("Authorization")
        say(f"{name} {self.command} {self.path} {bool(login)}")
        part = self.path.rpartition("/")[2]
        wanted = f"Basic {base64.b64encode(f'ada:{PASSWORD}'.encode()).decode()}"
        if kind == "realm":
            self.answer(401, WWW_Authenticate=f'Bearer realm="{place(target)}/token",service="x"')
        elif kind == "private" and login != wanted:
            self.answer(401, WWW_Authenticate='Basic realm="test"')
        elif kind == "redirect" and "/manifests/" in self.path:
            self.answer(307, Location=f"{place(target)}{self.path}")
        elif part == digest(INDEX):
            self.answer(200, INDEX, Content_Type=OCI + "index.v1+json", Docker_Content_Digest=part)
        elif "/manifests/" in self.path:
            self.answer(200, MANIFEST, Content_Type=OCI + "manifest.v1+json", Docker_Content_Digest=digest(MANIFEST))
        elif part in LAYERS and kind == "blob":
            self.answer(307, Location=f"{place(target)}{self.path}")
        elif part in LAYERS and kind == "hang":
            self.send_response(200)
            self.send_header("Content-Length", str(len(LAYOUT.blobs[part])))
            self.end_headers()
            self.wfile.write(LAYOUT.blobs[part][:10])
            FOREVER.wait()
        elif "/blobs/" in self.path:
            if part == LAYERS[0] and kind == "pair":
                BOTH.wait(60)
            self.answer(200, LAYOUT.blobs[part])
        else:
            self.answer(200, b"{}")

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def resolve(query: bytes, own: str) -> bytes:
    """The answer to a DNS query of one question (RFC 1035): one address at most, which nobody keeps."""
    labels, at = [], 12
    while length := query[at]:
        labels.append(query[at + 1 : at + 1 + length].decode().lower())
        at += 1 + length
    kind = struct.unpack_from("!H", query, at + 1)[0]
    found = address(labels[0].removeprefix("to-")) if labels[0].startswith("to-") else own
    family, number = (socket.AF_INET6, 28) if ":" in found else (socket.AF_INET, 1)
    packed = socket.inet_pton(family, found)
    record = struct.pack("!HHHIH", 0xC00C, number, 1, 0, len(packed)) + packed if kind == number else b""
    return query[:2] + struct.pack("!HHHHH", 0x8180, 1, bool(record), 0, 0) + query[12 : at + 5] + record


def dns(own: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((own, 53))
        while True:
            query, sender = server.recvfrom(512)
            server.sendto(resolve(query, own), sender)


def registry(own: str) -> None:
    threading.Thread(target=dns, args=(own,), daemon=True).start()
    server = http.server.ThreadingHTTPServer((own, PORT), Registry)
    say("ready")
    server.serve_forever()


def listen(where: str) -> None:
    family = socket.AF_INET6 if ":" in where else socket.AF_INET
    with socket.create_server((where, CANARY), family=family) as server:
        say("ready")
        while True:
            connection, _ = server.accept()
            connection.close()
            say("connection")


def main() -> None:
    role, *addresses = sys.argv[1:]
    if role == "registry":
        registry(addresses[0])
    for each in addresses[1:]:
        threading.Thread(target=listen, args=(each,), daemon=True).start()
    listen(addresses[0])


if __name__ == "__main__":
    main()
