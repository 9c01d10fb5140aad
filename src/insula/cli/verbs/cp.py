"""insula cp: copy files between an instance and the host, as `docker cp`."""

from __future__ import annotations

import os
from collections.abc import Iterator

from insula.cli.archive import StreamReader, pack, unpack
from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError
from insula.cli.output import clean
from insula.cli.terminal import STDIN, STDOUT, write_all
from insula.client import Client
from insula.client.http import CHUNK
from insula.model.errors import Invalid


def run(arguments: Arguments) -> int:
    source, target = side(arguments.source), side(arguments.target)
    client = connect(arguments)
    if source[0] is not None and target[0] is None:
        fetch(client, arguments.tenant, source[0], source[1], target[1], keep=arguments.archive)
    elif source[0] is None and target[0] is not None:
        send(client, arguments.tenant, source[1], target[0], target[1], keep=arguments.archive)
    else:
        raise UsageError(
            "cp copies between an instance and the host", "write one side as NAME:PATH, the other as a path or -"
        )
    return 0


def side(text: str) -> tuple[str | None, str]:
    """Parse ``NAME:PATH``, a path from an instance's root; without a colon, or with / or . first, it is a path here."""
    name, colon, path = text.partition(":")
    if not colon or text.startswith(("/", ".")):
        return None, text
    if not path:
        raise UsageError(f"{text[:60]!r} names no path in the instance", "write NAME:PATH")
    return name, path if path.startswith("/") else "/" + path


def fetch(client: Client, tenant: str, name: str, path: str, target: str, *, keep: bool = False) -> None:
    """Copy NAME:PATH to the host: into `target` if that is a directory, else as `target`; ``-`` writes a tar.

    For ``PATH/.`` and the root only the content is put into `target`.
    """
    with client.instances.archive_get(tenant, name, path) as response:
        if target == "-":
            for data in response:
                write_all(STDOUT, data)
            return
        if not unpack(StreamReader(iter(response)), target, last_name(path), keep=keep):
            raise Invalid(f"{clean(path)} is neither file, directory nor link", "devices and sockets can't be copied")


def send(client: Client, tenant: str, source: str, name: str, path: str, *, keep: bool = False) -> None:
    """Copy the host's file or tree into the directory `path` of the instance, or as `path`; ``-`` reads a tar.

    For ``SOURCE/.`` only the content is put into the directory `path`.
    """
    if source == "-":
        client.instances.archive_put(tenant, name, path, _stdin())
        return
    if not os.path.lexists(source):
        raise Invalid(f"{clean(source)} does not exist", "name a file or directory of this host")
    if not (os.path.isfile(source) or os.path.isdir(source) or os.path.islink(source)):
        raise Invalid(f"{clean(source)} is neither file, directory nor link", "devices and sockets can't be copied")
    copy = "tree" if last_name(source) else "content"
    called = os.path.basename(os.path.abspath(source)) or "root"
    client.instances.archive_put(tenant, name, path, pack(source, called, keep=keep), copy)


def last_name(path: str) -> str:
    """Return the name of a copy of `path`; empty for ``DIRECTORY/.`` and the root, whose content is copied."""
    name = os.path.basename(path.rstrip("/"))
    return "" if name in (".", "..") else name


def _stdin() -> Iterator[bytes]:
    while data := os.read(STDIN, CHUNK):
        yield data


COMMANDS = {
    "cp": Command(
        run,
        "Copy a file or a tree between an instance and the host.",
        "SOURCE TARGET",
        [Option("-a --archive", "keep the owners, by number")],
        complete={"SOURCE": "instance:path", "TARGET": "instance:path"},
        details="""\
One side is NAME:PATH, the other a path of this host, or - for a tar stream. A directory is copied into one that
exists; of DIRECTORY/. the content is. Copied files belong to you, or to root in the instance, unless -a is given;
symbolic links are copied, not followed, but for one that is the target and leads to a directory; files with holes keep
them; devices are left out, and on the host set-uid bits.""",
    )
}
