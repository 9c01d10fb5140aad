"""Images that are built on this host: busybox from Debian's busybox-static, and Debian by debootstrap(8)."""

from __future__ import annotations

import io
import os
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from insula.image.job import Job
from insula.image.platform import architecture
from insula.model.errors import Failed, Invalid, NotFound, Unavailable
from insula.model.objects import ImageConfig
from insula.model.rules import RELEASE
from insula.model.units import shorten

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BUSYBOX = Path("/bin/busybox")
BUSYBOX_CONFIG = ImageConfig(env=[PATH], cmd=["sh"])
DEBIAN_CONFIG = ImageConfig(env=[PATH], cmd=["bash"])

_DIRECTORIES = {
    **dict.fromkeys(("bin", "sbin", "usr", "usr/bin", "usr/sbin", "etc", "home", "var", "var/log"), 0o755),
    **dict.fromkeys(("dev", "proc", "sys", "run", "mnt", "usr/local", "usr/local/bin", "usr/local/sbin"), 0o755),
    "root": 0o700,
    "tmp": 0o1777,
    "var/tmp": 0o1777,
}
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n"
    "daemon:x:1:1:daemon:/usr/sbin:/bin/false\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "etc/group": "root:x:0:\ndaemon:x:1:\ntty:x:5:\nusers:x:100:\nnogroup:x:65534:\n",
    "etc/shells": "/bin/sh\n/bin/ash\n",
}


# -- busybox ---------------------------------------------------------------------------------------


def write_busybox(path: Path) -> None:
    """Write the tar of busybox's root file system, reproducibly. Unavailable if busybox is missing or not static."""
    hint = "apt install busybox-static"
    try:
        program = BUSYBOX.read_bytes()
        applets = subprocess.run([BUSYBOX, "--list-full"], capture_output=True, check=True, text=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        raise Unavailable(f"{BUSYBOX} is missing", hint) from None
    if not is_static(program):
        raise Unavailable(f"{BUSYBOX} needs shared libraries", hint)
    with tarfile.open(path, "x", format=tarfile.USTAR_FORMAT) as tar:
        _add(tar, "./", tarfile.DIRTYPE, 0o755)
        for name, mode in sorted(_DIRECTORIES.items()):
            _add(tar, name, tarfile.DIRTYPE, mode)
        for name, text in sorted(_FILES.items()):
            _add(tar, name, tarfile.REGTYPE, 0o644, text.encode())
        _add(tar, "bin/busybox", tarfile.REGTYPE, 0o755, program)
        for applet in sorted(set(applets) - {"bin/busybox"}):
            if os.path.dirname(applet) in _DIRECTORIES:
                _add(tar, applet, tarfile.SYMTYPE, 0o777, link="/bin/busybox")


def is_static(program: bytes) -> bool:
    """Whether an ELF program (elf(5), 64 bits, little endian) has no PT_INTERP, so that it needs no dynamic linker."""
    if program[:6] != b"\x7fELF\x02\x01" or len(program) < 64:
        return False
    start = int.from_bytes(program[32:40], "little")
    size, count = (int.from_bytes(program[at : at + 2], "little") for at in (54, 56))
    kinds = [program[start + i * size : start + i * size + 4] for i in range(count)]
    return (3).to_bytes(4, "little") not in kinds


def _add(tar: tarfile.TarFile, name: str, kind: bytes, mode: int, data: bytes = b"", link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.size, member.linkname = kind, mode, len(data), link
    tar.addfile(member, io.BytesIO(data))


# -- Debian ----------------------------------------------------------------------------------------


class Mirror(NamedTuple):
    """A Debian archive from which apt gets a release; `keyring` is empty for debootstrap's default."""

    uri: str
    components: list[str]
    keyring: str


_MORE = ("iproute2", "iputils-ping", "procps")  # tools for interactive use, which minbase lacks
_RELEASE = re.compile(RELEASE)
# files with data of the build host, and caches
_CLEAN = (
    *("etc/hostname", "etc/resolv.conf", "etc/machine-id", "var/lib/dbus/machine-id", "var/cache/ldconfig/aux-cache"),
    *(
        "var/log/bootstrap.log",
        "var/log/alternatives.log",
        "var/log/dpkg.log",
        "var/log/apt/history.log",
        "var/log/apt/term.log",
    ),
)
_EMPTY = ("dev", "proc", "sys", "run", "tmp", "var/cache/apt/archives", "var/lib/apt/lists", "var/cache/apt")


def write_base(
    directory: Path, distribution: str, release: str | None, progress: Callable[[str], None], job: Job
) -> tuple[Path, str]:
    """Bootstrap a minimal Debian in `directory`; returns the path of its tar, and the image's name."""
    if distribution != "debian":
        raise Invalid(f"base images of {shorten(distribution)} can't be built", "use debian")
    release = release or host_release()
    if not _RELEASE.fullmatch(release):
        raise Invalid(f"release {shorten(release)} does not parse", "use a code name, as in bookworm")
    mirror = find_mirror(release)
    root, tar = directory / "rootfs", directory / "rootfs.tar"
    root.mkdir()
    root.chmod(0o755)
    _debootstrap(release, mirror, root, progress, job)
    _pack(root, tar, job)
    return tar, f"debian:{release}"


def _debootstrap(release: str, mirror: Mirror, root: Path, progress: Callable[[str], None], job: Job) -> None:
    """Run debootstrap in namespaces of its own, so that its mounts and processes always end with it."""
    command = [
        *("setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
        *("debootstrap", "--variant=minbase", "--merged-usr", f"--arch={_debian_architecture()}"),
        f"--include={','.join(_MORE)}",
        f"--components={','.join(mirror.components)}",
        *([f"--keyring={mirror.keyring}"] if mirror.keyring else []),
        *(release, str(root), mirror.uri),
    ]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/root", **_proxy()}
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            errors="replace",
        )
    except FileNotFoundError:
        raise Unavailable("debootstrap(8) is not installed", "apt install debootstrap") from None
    last = ""
    with job.killing(process):
        assert process.stdout is not None
        for line in process.stdout:
            if text := "".join(c for c in line[:200] if c.isprintable()).strip():
                last = text if text[:2] in ("E:", "W:") or not last.startswith("E:") else last
                progress(text)
        process.wait()
    job.check()
    if process.returncode != 0:
        if "No space left" in last:
            raise Failed("the disk is full while building a base image", "free some space: insula image rm")
        raise Failed(
            f"debootstrap of {release} from {mirror.uri} failed: {shorten(last, 120)}",
            "check the release's name, and that the host's apt mirror is reachable",
        )


def _pack(root: Path, tar: Path, job: Job) -> None:
    for name in _CLEAN:
        (root / name).unlink(missing_ok=True)
    (root / "etc/machine-id").touch(mode=0o444)
    command = ["tar", "--create", f"--file={tar}", f"--directory={root}", "--numeric-owner", "--sort=name"]
    command += [
        "--format=pax",
        "--pax-option=delete=atime,delete=ctime",
        "--xattrs",
        "--xattrs-include=security.capability",
    ]
    command += ["--one-file-system", *(f"--exclude=./{name}/*" for name in _EMPTY), "."]
    status, err = job.run(command)
    if status != 0:
        if b"No space left" in err:
            raise Failed("the disk is full while building a base image", "free some space: insula image rm")
        raise Failed(f"tar failed: {shorten(err[-120:].decode(errors='replace'), 130)}", "see the log of insulad")


def host_release() -> str:
    """Return the code name of this host's Debian release (os-release(5))."""
    text = Path("/etc/os-release").read_text()
    if match := re.search(r"^VERSION_CODENAME=\"?([a-z]+)\"?$", text, re.MULTILINE):
        return match[1]
    raise Unavailable("this host's release has no code name", "name a release, as in bookworm")


def find_mirror(release: str, directory: Path = Path("/etc/apt")) -> Mirror:
    """Return the first Debian archive in apt's sources (sources.list(5)) for `release`, else for any. NotFound."""
    found = list(_sources(directory))
    for exact in (True, False):
        for mirror, suites in found:
            if "main" in mirror.components and (release in suites if exact else not any("-" in s for s in suites)):
                return mirror
    for mirror, suites in found:  # a stanza may list several suites
        if "main" in mirror.components and not any("security" in s for s in suites):
            return mirror
    raise NotFound(f"apt on this host has no source for {release}", "add one to /etc/apt/sources.list")


def _sources(directory: Path) -> Iterator[tuple[Mirror, list[str]]]:
    parts = directory / "sources.list.d"
    for path in sorted(parts.glob("*.sources")) if parts.is_dir() else []:
        yield from _deb822(path.read_text(errors="replace"))
    for path in [directory / "sources.list", *(sorted(parts.glob("*.list")) if parts.is_dir() else [])]:
        if path.is_file():
            yield from _one_line(path.read_text(errors="replace"))


def _deb822(text: str) -> Iterator[tuple[Mirror, list[str]]]:
    for stanza in re.split(r"\n\s*\n", text):
        lines = [line for line in stanza.splitlines() if not line.startswith("#")]
        joined = re.sub(r"\n[ \t]+", " ", "\n".join(lines))
        fields = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in joined.splitlines())}
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        signed = fields.get("signed-by", "")
        for uri in fields.get("uris", "").split():
            mirror = Mirror(uri, fields.get("components", "").split(), signed if signed.startswith("/") else "")
            yield mirror, fields.get("suites", "").split()


def _one_line(text: str) -> Iterator[tuple[Mirror, list[str]]]:
    for line in text.splitlines():
        if match := re.match(r"deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+([^#]+)", line):
            signed = re.search(r"signed-by=(/[^\s,]+)", match[1] or "")
            yield Mirror(match[2], match[4].split(), signed[1] if signed else ""), [match[3]]


def _proxy() -> dict[str, str]:
    """Return the proxy that apt uses as environment variables for debootstrap's wget."""
    found = {k: v for k, v in os.environ.items() if k.lower() in ("http_proxy", "https_proxy", "no_proxy")}
    for scheme in ("http", "https"):
        command = ["apt-config", "shell", "proxy", f"Acquire::{scheme}::Proxy"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        except FileNotFoundError:
            return found
        if (match := re.fullmatch(r"proxy='(.+)'\s*", answer)) and match[1] != "DIRECT":
            found.setdefault(f"{scheme}_proxy", match[1])
    return found


def _debian_architecture() -> str:
    return {"arm": "armhf", "386": "i386", "ppc64le": "ppc64el"}.get(architecture(), architecture())
