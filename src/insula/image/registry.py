"""Pull from and push to registries (OCI distribution-spec), with skopeo(1).

skopeo copies between a registry and a directory of plain files (containers-transports(5), ``dir:``) without changing
any bytes, so digests stay the same. It runs as a user who owns no files, without capabilities, in namespaces of its
own; its network is the tenant's (`insula.image.egress`), or the host's if the operator asks. It does not use the
administrator's logins, because its home is in the staging directory. In the host's network trust is configured as
usual: policy.json, registries.conf and the certificates in /etc, if they are readable by everyone. Credentials are
passed in a file that only it can read, not on its command line.
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

from insula.image import egress, manifest, platform
from insula.image.blobs import disk_errors, write
from insula.image.confine import OOM, USER, missing
from insula.image.egress import Egress
from insula.image.job import Job
from insula.image.limits import LEAST, MAX_DOCUMENT, MAX_SIZE, STALL, check_room
from insula.image.reference import Reference
from insula.model.errors import Denied, Failed, InsulaError, Invalid, NotFound, Unavailable
from insula.model.units import format_size, shorten

Progress = Callable[[str], None]
"""Called with lines of text while an operation goes on, from any thread."""

POLL = 0.2
MAX_LINES = 10_000
VERSION = b"Directory Transport Version: 1.1\n"
_MAX_LINE = 4096
_CPU = 3600  # seconds of processor time of one skopeo
_KILLED = (-9, 128 + 9)  # as its parents report it
_PLACE = "/mnt"
# it needs a mount namespace, because only root may enter the directories above the staging directory; the shell stays
# as PID 1 of the PID namespace, since a change of user would clear its PR_SET_PDEATHSIG
_BEGIN = f"""for each in $3; do echo 0 >"$each" || exit 1; done
echo {OOM} >/proc/self/oom_score_adj
mount --bind "$1" {_PLACE} && cd {_PLACE}/"$2" || exit 1
etc={_PLACE}/"$2"-home/etc
shift 3"""
_END = '"$@"\nexit $?'
_NAMESPACES = (
    *("setpriv", "--pdeathsig=KILL"),
    *("unshare", "--mount", "--propagation=slave", "--ipc", "--uts", "--pid", "--fork", "--kill-child=KILL"),
)
_NO_CONNECTION = (
    *("connection refused", "no such host", "timeout", "timed out", "unreachable", "no route to host"),
    *("connection reset", "pinging container registry", "server misbehaving", "dial tcp", "lookup"),
)
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
    """A login at a registry. Its repr does not contain the password."""

    username: str
    password: str

    def __repr__(self) -> str:
        return f"Auth(username={self.username!r})"

    __str__ = __repr__


class Access(msgspec.Struct, frozen=True):
    """Access to a registry: the login, whether plain HTTP or any certificate is accepted, a callback for progress, and
    the network; None is the host's."""

    auth: Auth | None
    insecure: bool
    progress: Progress
    job: Job
    egress: Egress | None = None


def pull(reference: Reference, directory: Path, limit: int, access: Access) -> None:
    """Copy the image for this machine into the new `directory`, at most `limit` bytes."""
    directory.mkdir(mode=0o700)
    options = ["--override-os=linux", f"--override-arch={platform.architecture()}"]
    verify = f"--src-tls-verify={_flag(not access.insecure)}"
    if platform.level() > 1:
        reference = _best(reference, directory, access)
    _copy(options, [verify, f"docker://{reference.locator}", "dir:."], reference, directory, limit, access)


def push(directory: Path, reference: Reference, access: Access) -> None:
    """Copy the image in `directory` (manifest.json and blobs by their hex digests) to the registry."""
    write(directory / "version", VERSION)
    directory.chmod(0o755)
    for path in directory.iterdir():
        path.chmod(0o644)  # also the blobs, which are hard links: only root can enter the directories above
    verify = f"--dest-tls-verify={_flag(not access.insecure)}"
    copy = ["--preserve-digests", verify, "dir:.", f"docker://{reference.locator}"]
    _copy([], copy, reference, directory, None, access)


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _best(reference: Reference, directory: Path, access: Access) -> Reference:
    """Return the digest of the best image for this processor if `reference` is an index: skopeo ignores levels."""
    verify = f"--tls-verify={_flag(not access.insecure)}"
    process = _start(["inspect", "--raw", verify], [f"docker://{reference.locator}"], reference, directory, access)
    access.job.limit(STALL)
    out, err = access.job.communicate(process)
    access.job.limit(None)
    _check_end(process, reference, err.decode(errors="replace").splitlines()[-20:], access)
    if len(out) > MAX_DOCUMENT:
        raise Invalid(f"the manifest of {reference.familiar} is too large", f"at most {MAX_DOCUMENT} bytes are read")
    document = manifest.read_document(out)
    if isinstance(document, manifest.Manifest):
        return reference
    for entry in manifest.by_preference([e for e in document.manifests if e.platform and manifest.matches(e.platform)]):
        if entry.media_type in manifest.MANIFESTS:
            return msgspec.structs.replace(reference, digest=entry.digest)
    return reference


def _copy(
    options: list[str], copy: list[str], reference: Reference, directory: Path, limit: int | None, access: Access
) -> None:
    process = _start([*options, "copy"], copy, reference, directory, access)
    _watch(process, reference, directory, limit, access)


def _start(
    verb: list[str], arguments: list[str], reference: Reference, directory: Path, access: Access
) -> subprocess.Popen[bytes]:
    """Start skopeo in `directory`, to which it may write if it is empty."""
    home = directory.with_name(directory.name + "-home")
    if not home.exists():
        home.mkdir(mode=0o700)
        _write_authfile(home / "auth.json", reference.registry, access.auth)
        if access.egress is not None:
            egress.prepare(home / "etc", access.egress)
    directory.parent.chmod(0o711)  # can be entered; the store above can be entered only by root
    owned = [home, home / "auth.json", *([] if (directory / "version").exists() else [directory])]
    for path in owned if os.geteuid() == 0 else ():
        os.chown(path, USER, USER)
    there = Path(_PLACE) / home.name
    script = "\n".join([_BEGIN, *([egress.SCRIPT] if access.egress else []), _END])
    command = [
        *_NAMESPACES,
        *("sh", "-c", script, "sh", str(directory.parent), directory.name, " ".join(access.job.groups)),
        *("prlimit", f"--cpu={_CPU}", "--core=0", "--nofile=1024", f"--fsize={MAX_SIZE}", "--memlock=0", "--"),
        *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs"),
        *("--inh-caps=-all", "--bounding-set=-all"),
        *("skopeo", f"--tmpdir={there}", *verb, f"--authfile={there}/auth.json", *arguments),
    ]
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        # no logins, caches and settings of a user
        **{
            name: str(there)
            for name in ("HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "DOCKER_CONFIG")
        },
        "_CONTAINERS_ROOTLESS_UID": str(USER),  # root's cache is always in /var/lib/containers
        **{name: os.environ[name] for name in _PROXIES if name in os.environ},
    }
    if access.egress is not None:
        environment = egress.without_proxies(environment)

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    try:
        return access.egress.call(start) if access.egress else start()
    except FileNotFoundError as e:
        raise missing(e) from None


def _write_authfile(path: Path, registry: str, auth: Auth | None) -> None:
    """Write a containers-auth.json(5); with an empty one skopeo reads no other."""
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
    process: subprocess.Popen[bytes], reference: Reference, directory: Path, limit: int | None, access: Access
) -> None:
    """Wait for skopeo, report its output, and kill it if it receives too much or too slowly."""
    errors: list[str] = []
    stop: list[InsulaError] = []

    def guard() -> None:
        room = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        last, since = 0, time.monotonic()
        try:
            while process.poll() is None:
                size = _size(directory)
                if size >= last + LEAST:
                    last, since = size, time.monotonic()
                if limit is not None:
                    check_room(room, "copying an image")
                    if size > limit:
                        hint = f"images may have at most {format_size(limit)}"
                        raise Invalid(f"{reference.familiar} is larger than {format_size(limit)}", hint)
                    if time.monotonic() - since > STALL:
                        raise Unavailable(f"{reference.registry} sends too slowly", "try again later")
                time.sleep(POLL)
        except InsulaError as e:
            stop.append(e)
            process.kill()
        finally:
            os.close(room)

    def collect() -> None:
        assert process.stderr is not None
        while line := process.stderr.readline(_MAX_LINE):
            errors.append(line.decode(errors="replace").strip())
            del errors[:-20]

    helpers = [threading.Thread(target=guard), threading.Thread(target=collect)]
    try:
        with access.job.killing(process):
            for helper in helpers:
                helper.start()
            assert process.stdout is not None
            number = 0
            while line := process.stdout.readline(_MAX_LINE):
                number += 1
                text = "".join(c for c in line[:200].decode(errors="replace") if c.isprintable()).strip()
                if number < MAX_LINES and text:
                    access.progress(text)
            process.wait()
    finally:
        for helper in helpers:
            helper.join()
    access.job.check()
    if stop:
        raise stop[0]
    _check_end(process, reference, errors, access)


def _check_end(process: subprocess.Popen[bytes], reference: Reference, errors: list[str], access: Access) -> None:
    """Raise the reason why skopeo has failed, if it has."""
    if process.returncode in _KILLED:
        hint = "the tenant's limit of memory may be too low, see `insula tenant show`"
        raise Failed(f"the process that copies {reference.familiar} was killed", hint)
    if process.returncode != 0:
        raise explain(reference, errors, access.egress)


def _size(directory: Path) -> int:
    with disk_errors("watching a pull"):
        total = 0
        for entry in os.scandir(directory):
            try:
                total += entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:  # skopeo renames its parts
                continue
        return total


def explain(reference: Reference, errors: list[str], network: Egress | None = None) -> InsulaError:
    """Convert skopeo's error message to an exception, without details of the host for a tenant in its own network."""
    text = " ".join(errors)
    fatal = re.findall(r'level=fatal msg="((?:[^"\\]|\\.)*)"', text)
    why = re.sub(r"\\(.)", r"\1", fatal[-1]) if fatal else (errors[-1] if errors else "no reason given")
    name, registry = reference.familiar, reference.registry
    told = _cause(why) if network is None else egress.without_details(why.rpartition(": ")[2])
    cause = f": {told}" if told else ""
    low = why.lower()
    for part in (reference.locator, f"{registry}/{reference.repository}", registry):
        low = low.replace(part.lower(), "it")  # a port or a name may look like an error message

    def has(*words: str) -> bool:
        return any(re.search(rf"(?<!\w){re.escape(word)}", low) for word in words)

    if "failed to execute" in low or ("No such file or directory" in why and "skopeo" in why):
        return Unavailable("skopeo(1) is not installed", "apt install skopeo")
    if has("no space left"):
        return Failed("the disk is full while copying an image", "free some space: insula image rm")
    if has("unauthorized", "authentication required", "denied", "invalid username/password", "403"):
        return Denied(f"{registry} denies access to {name}", "check --username and the password")
    if has("manifest unknown", "name unknown", "not found", "404"):
        return NotFound(f"{registry} has no image {name}", "check the name and the tag")
    if has("no image found in manifest list", "no image found in image index"):
        return Invalid(f"{name} is not made for this machine", "use an image made for this machine")
    if has("server gave http response to https client"):
        return Unavailable(f"{registry} speaks plain HTTP", "use --insecure only on a trusted network")
    if has("x509", "certificate", "tls:"):
        return Unavailable(f"{registry} can't be trusted{cause}", "use --insecure only on a trusted network")
    if has(*_NO_CONNECTION):
        return Unavailable(f"{registry} does not respond", "check the registry's name, and the network")
    return Failed(f"copying {name} failed{cause}", "try again; see skopeo-copy(1)")


def _cause(why: str, limit: int = 200) -> str:
    """Return the end of a chain of errors ``a: b: c``, as many whole parts as fit."""
    *links, text = why.split(": ")
    while links and len(links[-1]) + len(text) + 2 <= limit:
        text = f"{links.pop()}: {text}"
    return shorten(text, limit + 10)
