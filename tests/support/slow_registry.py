"""A registry whose image never arrives completely, or one that works.

    python -m tests.support.slow_registry               over HTTP: sends the beginning of a layer, and nothing more
    python -m tests.support.slow_registry CERTIFICATE   over HTTPS: the image is busybox; the file has the key, too

It listens on loopback, prints its port, and "layer" for each layer that is asked for. It takes uploads, but never
answers to their content, and prints "upload".
"""

from __future__ import annotations

import http.server
import json
import ssl
import sys
import threading
from pathlib import Path
from typing import Any

from tests.support.images import OCI, Layout, digest, member, tar

FOREVER = threading.Event()


def busybox_layer() -> bytes:
    """A root file system with one program that runs by itself."""
    return tar(
        member("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755), member("bin/sh", linkname="busybox")
    )


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    layout: Layout
    works = False

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        if "/blobs/" in self.path:
            self.answer(404, b"", head=True)
        else:
            self.do_GET()

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        manifest = self.layout.blobs[self.layout.index["manifests"][0]["digest"]]
        config = json.loads(manifest)["config"]["digest"]
        if "/manifests/" in self.path:
            self.answer(200, manifest, OCI + "manifest.v1+json", head=self.command == "HEAD")
        elif name == config:
            self.answer(200, self.layout.blobs[config])
        elif "/blobs/" in self.path:
            print("layer", flush=True)
            if self.works:
                self.answer(200, self.layout.blobs[name])
            else:
                self.send_response(200)
                self.send_header("Content-Length", "100000000")
                self.end_headers()
                self.wfile.write(bytes(1000))
                FOREVER.wait()
        else:
            self.answer(200, b"{}")

    def do_POST(self) -> None:
        print("upload", flush=True)
        FOREVER.wait()

    def answer(self, status: int, body: bytes, kind: str = "application/octet-stream", *, head: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Docker-Content-Digest", digest(body))
        self.end_headers()
        if not head:
            self.wfile.write(body)


def main() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.layout, Handler.works = Layout(), len(sys.argv) > 1
    Handler.layout.image([busybox_layer()])
    if Handler.works:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[1])
        server.socket = context.wrap_socket(server.socket, server_side=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
