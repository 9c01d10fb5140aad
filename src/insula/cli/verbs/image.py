"""insula image ls | pull | push | load | save | import | build-base | tag | rm"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from errno import EISDIR

from insula.cli.connection import connect
from insula.cli.disk_image import OPTIONS, disk_options, refuse_disk_options
from insula.cli.options import Arguments, Command, Option, choice
from insula.cli.output import age, clean, listing, print_json, size, warn
from insula.cli.terminal import STDIN, STDOUT, write_all
from insula.cli.verbs.lifecycle import each
from insula.client import Client
from insula.client.http import CHUNK
from insula.model.errors import Invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO

    Object = dict[str, Any]


def ls(arguments: Arguments) -> int:
    images = connect(arguments).images.list(arguments.tenant)
    header = ["NAME", "OWNER", "DIGEST", "LAYERS", "SIZE", "AGE"]
    return listing(arguments.json, images, header, map(row, images))


def row(image: Object) -> list[Any]:
    digest = image["digest"].removeprefix("sha256:")[:12]
    owner = image["tenant"] or "(shared)"
    layers = image["disk"]["media"] if image.get("disk") else len(image["layers"])
    return [image["name"], owner, digest, layers, size(image["size"]), age(image["created"])]


def pull(arguments: Arguments) -> int:
    options = {"name": arguments.name, "insecure": arguments.insecure, "auth": auth(arguments)}
    return _follow(arguments, connect(arguments).images.pull(arguments.tenant, arguments.reference, **options))


def push(arguments: Arguments) -> int:
    options = {"insecure": arguments.insecure, "auth": auth(arguments)}
    reference = arguments.reference or arguments.name
    return _follow(arguments, connect(arguments).images.push(arguments.tenant, arguments.name, reference, **options))


def build_base(arguments: Arguments) -> int:
    distribution = choice(*DISTRIBUTIONS)(arguments.distribution)
    steps = connect(arguments).images.build_base(arguments.tenant, distribution, arguments.release)
    return _follow(arguments, steps)


def _follow(arguments: Arguments, steps: Iterable[Object]) -> int:
    """Show progress on the standard error, and the image at the end on the standard output."""
    image = None
    for step in steps:
        if "progress" in step and not arguments.quiet:
            warn(step["progress"])
        image = step.get("image", image)
    if arguments.json:
        print_json(image)
    elif image is not None:
        show(image)
    return 0


def show(image: Object) -> None:
    """Print the image's name on the standard output, and notes on left out parts on the standard error."""
    for note in image.get("notes", ()):
        warn(f"note: {image['name']}: {note}")
    print(clean(image["name"]))


def auth(arguments: Arguments) -> dict[str, str] | None:
    """Return the login at the registry; the password is in INSULA_REGISTRY_PASSWORD or is asked for."""
    if arguments.username is None:
        return None
    password = os.environ.get("INSULA_REGISTRY_PASSWORD")
    if password is None:
        from getpass import getpass

        if not os.isatty(STDIN):
            raise Invalid("there is no terminal to ask for the password", "set INSULA_REGISTRY_PASSWORD")
        password = getpass(f"password of {arguments.username}: ")
    return {"username": arguments.username, "password": password}


def load(arguments: Arguments) -> int:
    archive = read_archive(arguments.archive)
    images = connect(arguments).images.load(arguments.tenant, archive, arguments.name)
    if arguments.json:
        print_json(images)
    else:
        for image in images:
            show(image)
    return 0


def import_(arguments: Arguments) -> int:
    if arguments.vm:
        options = disk_options(arguments)
        disk = read_archive(arguments.file)
        image = connect(arguments).images.import_disk(arguments.tenant, arguments.name, disk, **options)
    else:
        refuse_disk_options(arguments)
        image = connect(arguments).images.import_(arguments.tenant, arguments.name, read_archive(arguments.file))
    print_json(image) if arguments.json else show(image)
    return 0


def tag(arguments: Arguments) -> int:
    image = connect(arguments).images.tag(arguments.tenant, arguments.source, arguments.name)
    print_json(image) if arguments.json else print(clean(image["name"]))
    return 0


def save(arguments: Arguments) -> int:
    if arguments.output is None and os.isatty(STDOUT):
        raise Invalid("an archive can't be written to a terminal", "name a file with -o, or redirect the output")
    with connect(arguments).images.save(arguments.tenant, arguments.name, arguments.format) as response:
        if arguments.output is None:
            for data in response:
                write_all(STDOUT, data)
        else:
            with Replacing(arguments.output) as file:
                file.writelines(response)
    return 0


def rm(client: Client, arguments: Arguments, name: str) -> None:
    client.images.remove(arguments.tenant, name)


def read_archive(path: str) -> Iterator[bytes]:
    """Yield the file's content in pieces; ``-`` is the standard input. Invalid if it can't be read."""
    try:
        file = os.dup(STDIN) if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if os.path.isdir(path):
            os.close(file)
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
    except OSError as problem:
        raise Invalid(f"{path} can't be read: {problem.strerror}", "name a tar file, or - for standard input") from None

    def pieces() -> Iterator[bytes]:
        with open(file, "rb", buffering=0) as stream:
            while data := stream.read(CHUNK):
                yield data

    return pieces()


class Replacing:
    """A file that gets its name only when it has been written completely."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.part = f"{path}.part{os.getpid()}"

    def __enter__(self) -> BinaryIO:
        try:
            self.file = open(self.part, "xb")
        except OSError as problem:
            raise Invalid(f"{self.path} can't be written: {problem.strerror}", "choose another path") from None
        return self.file

    def __exit__(self, kind: object, *_: object) -> None:
        self.file.close()
        if kind is None:
            os.replace(self.part, self.path)
        else:
            os.unlink(self.part)


DISTRIBUTIONS = ("debian",)
FORMATS = ("oci", "docker")
_QUIET = Option("-q --quiet", "show no progress")
_IMAGE = {"NAME": "image"}
_REGISTRY = [
    Option("-u --username", "the user at the registry (password: INSULA_REGISTRY_PASSWORD, else asked for)", "NAME"),
    Option("--insecure", "plain HTTP, or a certificate that can't be checked"),
]
COMMANDS = {
    "ls": Command(ls, "List the tenant's images and the shared ones."),
    "pull": Command(
        pull,
        "Fetch an image from a registry.",
        "REFERENCE",
        [*_REGISTRY, Option("--name", "store it under this name", "NAME"), _QUIET],
    ),
    "push": Command(push, "Send an image to a registry.", "NAME [REFERENCE]", [*_REGISTRY, _QUIET], complete=_IMAGE),
    "load": Command(
        load,
        "Import the images of an OCI layout or docker-archive (`docker save`), a tar.",
        "ARCHIVE",
        [Option("--name", "store it under this name, if it is one image", "NAME")],
        complete={"ARCHIVE": "file"},
    ),
    "save": Command(
        save,
        "Write images into one archive.",
        "NAME...",
        [
            Option("-o --output", "the file (standard output)", "FILE", complete="file"),
            Option("--format", "oci or docker", "FORMAT", default="oci", parse=choice(*FORMATS), complete=FORMATS),
        ],
        complete=_IMAGE,
    ),
    "import": Command(
        import_,
        "Make an image from the tar of a root file system, or from the disk or CD of a virtual machine.",
        "FILE NAME",
        OPTIONS,
        complete={"FILE": "file"},
    ),
    "build-base": Command(
        build_base,
        "Build an image of a distribution's user land (debootstrap).",
        "DISTRIBUTION",
        [
            Option(
                "--release", "the release, as in bookworm; by default the host's, which is also called latest", "NAME"
            ),
            _QUIET,
        ],
        complete={"DISTRIBUTION": DISTRIBUTIONS},
    ),
    "tag": Command(
        tag, "Give an image another name in addition.", "SOURCE NAME", complete={"SOURCE": "image", "NAME": "image"}
    ),
    "rm": Command(each(rm), "Remove images.", "NAME...", complete=_IMAGE),
}
