"""Pull from and push to registries (OCI distribution-spec), by Debian's skopeo(1).

skopeo copies between a registry and a directory of plain files (containers-transports(5), ``dir:``), which
keeps every byte as it is, so that digests are the same on both sides. It runs without capabilities and
without the administrator's own logins (its home is the staging directory); what it may trust is configured as
everywhere: policy.json, registries.conf and the certificates in /etc. Credentials travel in a file that only
root can read, never on a command line.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from insula.image.blobs import disk_errors, write
from insula.image.reference import Reference
from insula.model.errors import Denied, Failed, InsulaError, Invalid, NotFound, Unavailable
from insula.model.units import format_size, shorten

Progress = Callable[[str], None]

STALL = 300.0  # seconds without a byte
POLL = 0.2
MAX_LINES = 10_000
VERSION = b"Directory Transport Version: 1.1\n"
_PROXIES = (
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
)


class Auth(msgspec.Struct, frozen=True, kw_only=True):
    """A login at a registry. Its text never shows the password."""

    username: str
    password: str

    def __repr__(self) -> str:
        return f"Auth(username={self.username!r})"

    __str__ = __repr__


def pull(
    reference: Reference, directory: Path, limit: int, auth: Auth | None, insecure: bool, progress: Progress
) -> None:
    """Copies the image for this machine into the new `directory`, at most `limit` bytes."""
    from insula.image.manifest import architecture

    directory.mkdir(mode=0o700)
    options = ["--override-os=linux", f"--override-arch={architecture()}"]
    copy = [f"--src-tls-verify={_flag(not insecure)}", f"docker://{reference.locator}", "dir:."]
    _skopeo(options, copy, reference, directory, limit, auth, progress)


def push(directory: Path, reference: Reference, auth: Auth | None, insecure: bool, progress: Progress) -> None:
    """Copies the image in `directory` (manifest.json and blobs by their hex digests) to the registry."""
    write(directory / "version", VERSION)
    copy = ["--preserve-digests", f"--dest-tls-verify={_flag(not insecure)}", "dir:.", f"docker://{reference.locator}"]
    _skopeo([], copy, reference, directory, None, auth, progress)


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _skopeo(
    options: list[str],
    copy: list[str],
    reference: Reference,
    directory: Path,
    limit: int | None,
    auth: Auth | None,
    progress: Progress,
) -> None:
    home = directory.with_name(directory.name + "-home")
    home.mkdir(mode=0o700)
    authfile = home / "auth.json"
    _write_authfile(authfile, reference.registry, auth)
    command = [
        *("setpriv", "--pdeathsig=KILL", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"),
        *("skopeo", *options, f"--tmpdir={home}", "copy", f"--authfile={authfile}", *copy),
    ]
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        # the user's logins, caches and settings: none but what is in our own directory
        **{
            name: str(home) for name in ("HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "DOCKER_CONFIG")
        },
        "_CONTAINERS_ROOTLESS_UID": "1",  # root's cache is always in /var/lib/containers
        **{name: os.environ[name] for name in _PROXIES if name in os.environ},
    }
    try:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            errors="replace",
        )
    except FileNotFoundError:
        raise Unavailable("setpriv(1) is not installed", "apt install util-linux") from None
    _watch(process, reference, directory, limit, progress)


def _write_authfile(path: Path, registry: str, auth: Auth | None) -> None:
    """containers-auth.json(5); an empty one keeps skopeo from looking elsewhere."""
    logins = {}
    if auth is not None:
        if ":" in auth.username or any("\0" in text or "\n" in text for text in (auth.username, auth.password)):
            raise Invalid("the user name or password has a character that can't be sent", "user names have no colon")
        login = base64.b64encode(f"{auth.username}:{auth.password}".encode()).decode()
        logins = {registry: {"auth": login}}
        if registry == "docker.io":
            logins["index.docker.io/v1/"] = {"auth": login}
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "w") as file:
        json.dump({"auths": logins}, file)


def _watch(
    process: subprocess.Popen[str], reference: Reference, directory: Path, limit: int | None, progress: Progress
) -> None:
    """Waits for skopeo, passing on what it prints, and ends it when too much comes or nothing more does."""
    errors: list[str] = []
    stop: list[InsulaError] = []

    def guard() -> None:
        last, since = -1, time.monotonic()
        while process.poll() is None:
            size = _size(directory)
            if size != last:
                last, since = size, time.monotonic()
            if limit is not None and size > limit:
                hint = f"images may have at most {format_size(limit)}"
                stop.append(Invalid(f"{reference.familiar} is larger than {format_size(limit)}", hint))
            elif limit is not None and time.monotonic() - since > STALL:
                stop.append(Unavailable(f"{reference.registry} sends nothing more", "try again later"))
            if stop:
                process.kill()
                return
            time.sleep(POLL)

    def collect() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            errors.append(line.strip()[:4096])
            del errors[:-20]

    helpers = [threading.Thread(target=guard), threading.Thread(target=collect)]
    try:
        for helper in helpers:
            helper.start()
        assert process.stdout is not None
        for number, line in enumerate(process.stdout):
            if number < MAX_LINES and (text := "".join(c for c in line[:200] if c.isprintable()).strip()):
                progress(text)
        process.wait()
    finally:
        process.kill()
        process.wait()
        for helper in helpers:
            helper.join()
    if stop:
        raise stop[0]
    if process.returncode != 0:
        raise explain(reference, errors)


def _size(directory: Path) -> int:
    with disk_errors("watching a pull"):
        total = 0
        for entry in os.scandir(directory):
            try:
                total += entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:  # skopeo renames its parts
                continue
        return total


def explain(reference: Reference, errors: list[str]) -> InsulaError:
    """skopeo's last words as one of ours."""
    text = " ".join(errors)
    fatal = re.findall(r'level=fatal msg="((?:[^"\\]|\\.)*)"', text)
    why = re.sub(r"\\(.)", r"\1", fatal[-1]) if fatal else (errors[-1] if errors else "no reason given")
    low, name, registry = why.lower(), reference.familiar, reference.registry

    def has(*words: str) -> bool:
        return any(word in low for word in words)

    if "failed to execute" in low or ("No such file or directory" in why and "skopeo" in why):
        return Unavailable("skopeo(1) is not installed", "apt install skopeo")
    if has("no space left"):
        return Failed("the disk is full while copying an image", "free some space: insula image rm")
    if has("unauthorized", "authentication required", "denied", "invalid username/password", "403"):
        return Denied(f"{registry} does not let you in to {name}", "check --username and the password")
    if has("manifest unknown", "name unknown", "not found", "404"):
        return NotFound(f"{registry} has no image {name}", "check the name and the tag")
    if has("no image found in manifest list"):
        return Invalid(f"{name} is not made for this machine", "use an image made for this machine")
    if has("server gave http response to https client"):
        return Unavailable(f"{registry} speaks plain HTTP", "use --insecure if nobody can listen or meddle on the way")
    if has("x509", "certificate", "tls:"):
        return Unavailable(
            f"{registry} can't be trusted: {shorten(why[-120:], 130)}", "use --insecure only if you know why"
        )
    if has(
        "connection refused", "no such host", "timeout", "unreachable", "connection reset", "pinging container registry"
    ):
        return Unavailable(f"{registry} does not answer", "check the registry's name, and the network")
    return Failed(f"copying {name} failed: {shorten(why[-200:], 210)}", "try again; see skopeo-copy(1)")
