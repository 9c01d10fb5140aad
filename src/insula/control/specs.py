"""What a user may ask for: every field of an `InstanceSpec` checked before anything is made. Pure.

The kernel and the runtime would refuse most of this as well, but late and in words that help nobody.
"""

from __future__ import annotations

import re
import secrets
import signal
from collections.abc import Iterable

import msgspec

from insula.control.quotas import check_resources
from insula.kernel.capabilities import normalise as normalise_capability
from insula.model.errors import Invalid
from insula.model.objects import InstanceSpec, Rlimit, Tmpfs
from insula.model.units import check_label, shorten
from insula.model.views import ExecSpec

MAX_ARGUMENTS = 1 << 20  # execve(2) allows more, but the store's values don't
MAX_LOG = 1 << 40
_RLIMIT_NAMES = "as core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime sigpending stack"
RLIMITS = frozenset(_RLIMIT_NAMES.split())
SIGNALS = {f"SIG{s.name.removeprefix('SIG')}": int(s) for s in signal.Signals}
_SYSCTL = re.compile(r"(net|fs\.mqueue)(\.[a-zA-Z0-9_-]+)+|kernel\.(shm[a-z_]+|msg[a-z_]+|sem)")
_USER = re.compile(r"[^\s:\0/]{1,64}(:[^\s:\0/]{1,64})?")
_VARIABLE = re.compile(r"[^=\0]+")
_HIGHEST_ID = (1 << 16) - 1


def check(spec: InstanceSpec) -> InstanceSpec:
    """The spec with canonical names of capabilities and signals, or Invalid. An empty name stays empty."""
    if spec.name:
        check_label("instance", spec.name)
    if spec.network is not None:
        check_label("network", spec.network)
    elif spec.address or spec.address6:
        raise Invalid("an instance without a network can't have an address", "leave out the address, or --network none")
    check_words("command", [*spec.command, *(spec.entrypoint or [])])
    check_environment(spec.env)
    if spec.user is not None:
        check_user(spec.user)
    if spec.working_dir is not None:
        check_path("working directory", spec.working_dir)
    if spec.hostname is not None:
        for label in spec.hostname.split(".") if len(spec.hostname) <= 64 else [spec.hostname * 2]:
            check_label("host", label)
    check_labels(spec.labels)
    check_resources(spec.resources)
    _check_numbers(spec)
    for name, value in spec.sysctls.items():
        if not _SYSCTL.fullmatch(name) or "\0" in value or "\n" in value:
            raise Invalid(f"sysctl {shorten(name)} can't be set", "use net.*, fs.mqueue.*, kernel.shm*, kernel.msg*")
    _check_unique("tmpfs", (_check_tmpfs(tmpfs).path for tmpfs in spec.tmpfs))
    _check_unique("rlimit", (_check_rlimit(limit).name for limit in spec.rlimits))
    return msgspec.structs.replace(
        spec,
        cap_add=[_capability(name) for name in spec.cap_add],
        cap_drop=[_capability(name) for name in spec.cap_drop],
        stop_signal=None if spec.stop_signal is None else signal_name(parse_signal(spec.stop_signal)),
    )


def check_exec(spec: ExecSpec) -> ExecSpec:
    """What is asked of `exec`, or Invalid."""
    if not spec.command:
        raise Invalid("there is nothing to execute", "give a command")
    check_words("command", spec.command)
    check_environment(spec.env)
    if spec.user is not None:
        check_user(spec.user)
    if spec.working_dir is not None:
        check_path("working directory", spec.working_dir)
    return spec


def check_words(what: str, words: list[str]) -> None:
    if any("\0" in word for word in words):
        raise Invalid(f"the {what} has a NUL byte", "no argument of a program can have one (execve(2))")
    if sum(len(word.encode("utf-8", "surrogatepass")) + 9 for word in words) > MAX_ARGUMENTS // 2:
        raise Invalid(f"the {what} is too long", f"use less than {MAX_ARGUMENTS // 2} bytes")


def check_environment(env: dict[str, str]) -> None:
    for name, value in env.items():
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            raise Invalid(f"{shorten(name)} is no name of a variable, or its value has a NUL byte", "write NAME=VALUE")
    check_words("environment", [*env, *env.values()])


def check_user(user: str) -> None:
    """``name``, ``uid``, ``name:group`` or ``uid:gid``; numbers up to what a tenant's range holds."""
    if user and not _USER.fullmatch(user):
        raise Invalid(f"user {shorten(user)} does not parse", "write a name or number, with :group if you like")
    for part in user.split(":"):
        if part.isdigit() and int(part) > _HIGHEST_ID:
            raise Invalid(f"user or group {shorten(part)} is too high", f"use at most {_HIGHEST_ID}")


def check_path(what: str, path: str) -> str:
    if not path.startswith("/") or "\0" in path or len(path) > 4095:
        raise Invalid(f"{what} {shorten(path)} is no absolute path", "begin it with /")
    return path


def check_labels(labels: dict[str, str]) -> dict[str, str]:
    """Labels are short and few: selectors compare them with everybody else's."""
    if len(labels) > 64:
        raise Invalid(f"{len(labels)} labels are too many", "use at most 64")
    for name, value in labels.items():
        if not re.fullmatch(r"[a-zA-Z0-9]([a-zA-Z0-9._/-]{0,126}[a-zA-Z0-9])?", name):
            raise Invalid(f"{shorten(name)} is no name of a label", "use up to 128 of a-z, 0-9, '.', '_', '/' and '-'")
        if len(value) > 1024 or not value.isprintable():
            raise Invalid(f"the value of label {name} is too long or not printable", "use up to 1024 characters")
    return labels


def parse_signal(text: str) -> int:
    """The number of ``SIGTERM``, ``term`` or ``15``; Invalid if there is no such signal."""
    name = text.upper()
    if name.isdigit() and name.isascii() and 1 <= int(name[:4]) <= signal.SIGRTMAX:
        return int(name)
    if number := SIGNALS.get(f"SIG{name.removeprefix('SIG')}"):
        return number
    if match := re.fullmatch(r"(?:SIG)?RTMIN\+([0-9]{1,2})", name):
        number = signal.SIGRTMIN + int(match[1])
        if number <= signal.SIGRTMAX:
            return number
    raise Invalid(f"there is no signal {shorten(text)}", "signal(7) lists them, as in SIGTERM or 15")


def signal_name(number: int) -> str:
    """``SIGTERM`` for 15; a real-time signal stays a number."""
    return next((name for name, value in SIGNALS.items() if value == number), str(number))


def make_name(image: str) -> str:
    """A name for an instance whose user gave none: the image's, and six random hex digits."""
    repository = image.rpartition("/")[2].partition("@")[0].partition(":")[0].lower()
    base = re.sub(r"[^a-z0-9]+", "-", repository).strip("-")[:40].strip("-") or "instance"
    return f"{base}-{secrets.token_hex(3)}"


def _check_numbers(spec: InstanceSpec) -> None:
    if not 0 <= spec.stop_timeout <= 86_400:
        raise Invalid(f"a stop timeout of {spec.stop_timeout} seconds makes no sense", "use 0 to 86400")
    if not 0 <= spec.restart.max_retries <= 1_000_000:
        raise Invalid(f"{spec.restart.max_retries} retries make no sense", "use 0 (no limit) to 1000000")
    if spec.restart.max_retries and spec.restart.name != "on-failure":
        raise Invalid(f"restart policy {spec.restart.name} has no number of retries", "on-failure has")
    if spec.remove and spec.restart.name != "no":
        raise Invalid("an instance that is removed on exit can't restart", "leave out --rm or --restart")
    if not 4096 <= spec.log_size <= MAX_LOG or not 1 <= spec.log_files <= 1000:
        raise Invalid("the log's limits make no sense", "use at least 4k, and 1 to 1000 files")


def _check_tmpfs(tmpfs: Tmpfs) -> Tmpfs:
    parts = check_path("tmpfs", tmpfs.path).strip("/").split("/")
    if not parts[0] or {"..", "."} & set(parts) or any(c in tmpfs.path for c in ",\n"):
        raise Invalid(f"there can be no tmpfs at {shorten(tmpfs.path)}", "use a plain path below /")
    if not 4096 <= tmpfs.size <= MAX_LOG:
        raise Invalid(f"a tmpfs of {tmpfs.size} bytes makes no sense", "use at least 4k")
    return tmpfs


def _check_rlimit(limit: Rlimit) -> Rlimit:
    if limit.name not in RLIMITS:
        raise Invalid(f"there is no rlimit {shorten(limit.name)}", "getrlimit(2) lists them, as in nofile")
    soft, hard = (float("inf") if value == -1 else value for value in (limit.soft, limit.hard))
    if not 0 <= soft <= hard or max(limit.soft, limit.hard) >= 1 << 64:
        raise Invalid(f"rlimit {limit.name} {limit.soft}:{limit.hard} makes no sense", "soft can't be above hard")
    return limit


def _check_unique(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise Invalid(f"{what} {shorten(name)} is given twice", "give it once")
        seen.add(name)


def _capability(name: str) -> str:
    return "ALL" if name.upper() == "ALL" else normalise_capability(name)
