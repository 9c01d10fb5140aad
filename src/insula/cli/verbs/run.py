"""insula run: create an instance from an image, start it, and attach to it unless `-d`."""

from __future__ import annotations

import os

from insula.cli.connection import connect
from insula.cli.machine_options import MACHINE_OPTIONS, machine_options, refuse_machine_options
from insula.cli.options import Arguments, Command, Option, UsageError, choice, whole, zero_or
from insula.cli.output import error
from insula.cli.terminal import DETACH_KEYS, detach_keys, interact, require_terminal, terminal_size
from insula.client import Client
from insula.model.errors import Conflict, InsulaError, Invalid, NotFound
from insula.model.units import parse_cpus, parse_duration, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

ENGINE_FAILURE = 125
MAX_ENV_FILE = 2 << 20
FAMILIES = ("can", "kcm", "key", "llc", "packet", "pppox", "rxrpc", "smc", "tipc", "xdp")
"""The values of --socket-family, for completion; insulad checks them (`container.seccomp_default`)."""


def run(arguments: Arguments) -> int:
    spec = build_spec(arguments)
    try:
        if arguments.tty and arguments.interactive and not arguments.detach:
            require_terminal()
        client = connect(arguments)
        _fetch(client, arguments)
        return _run(client, arguments, spec)
    except InsulaError as problem:
        error(problem.message, problem.hint)
        return problem.exit_status or ENGINE_FAILURE


def _fetch(client: Client, arguments: Arguments) -> None:
    """Pull the image as `--pull` requires, before the instance is made; progress is shown on the standard error."""
    if arguments.pull == "never":
        return
    if arguments.pull == "missing":
        try:
            client.images.get(arguments.tenant, arguments.image)
            return
        except NotFound:
            pass
    from insula.cli.output import warn

    for step in client.images.pull(arguments.tenant, arguments.image):
        if "progress" in step and not arguments.quiet:
            warn(step["progress"])


def _run(client: Client, arguments: Arguments, spec: dict[str, Any]) -> int:
    with IdFile(arguments.cidfile) as cidfile:
        if arguments.detach:
            view = client.instances.run(arguments.tenant, **spec)
            name = view["instance"]["name"]
        else:
            size = terminal_size() if arguments.tty else None
            attachment = client.instances.run_attached(arguments.tenant, size=size, **spec)
            name = attachment.name
        cidfile.write(name)
    if arguments.detach:
        if arguments.json:
            from insula.cli.output import print_json

            print_json(view)
        else:
            print(name)
        return 0
    with attachment:
        status = interact(attachment, stdin=arguments.interactive, tty=arguments.tty, keys=arguments.detach_keys)
    return 0 if status is None else status


def build_spec(arguments: Arguments) -> dict[str, Any]:
    """Return the `InstanceSpec` of the options; absent options are left to the image and the defaults."""
    spec: dict[str, Any] = {
        "image": arguments.image,
        "command": arguments.cmd,
        "name": arguments.name or "",
        "networks": networks(arguments),
        "published": arguments.publish,
        "env": environment(arguments.env, arguments.env_file),
        "labels": dict(pair(text, "label", default="") for text in arguments.label),
        "mounts": [tmpfs(text) for text in arguments.tmpfs],
        "extra_hosts": [extra_host(text) for text in arguments.add_host],
        "dns": arguments.dns,
        "dns_search": arguments.dns_search,
        "tty": arguments.tty,
        "stdin": arguments.interactive,
        "read_only": arguments.read_only,
        "remove": arguments.rm,
        "resources": {
            "cpus": arguments.cpus,
            "memory": arguments.memory,
            "pids": pids(arguments),
            **{name: value for name in ("disk", "inodes") if (value := getattr(arguments, name)) is not None},
        },
        "restart": restart(arguments.restart),
        "healthcheck": healthcheck(arguments),
        "options": machine_options(arguments) if arguments.vm else container_options(arguments),
    }
    optional = {
        "entrypoint": None if arguments.entrypoint is None else [arguments.entrypoint] if arguments.entrypoint else [],
        "user": arguments.user,
        "working_dir": arguments.workdir,
        "hostname": arguments.hostname,
        "stop_signal": arguments.stop_signal,
        "stop_timeout": arguments.stop_timeout,
        "log_size": arguments.log_size,
        "log_files": arguments.log_files,
    }
    spec.update((name, value) for name, value in optional.items() if value is not None)
    return spec


def networks(arguments: Arguments) -> list[dict[str, Any]]:
    """Return the `NetworkAttachment`s of the options. --ip, --ip6 and --mac-address are of the first network."""
    given = arguments.network or ["default"]
    own = {"address": arguments.ip, "address6": arguments.ip6, "mac": arguments.mac_address}
    if "none" in given:
        if any(own.values()) or len(given) > 1:
            raise UsageError("an instance without a network can't have an address", "leave it out, or --network none")
        return []
    first, *others = [attachment(text) for text in given]
    return [with_own(first, own), *others]


def with_own(wanted: dict[str, Any], own: dict[str, str | None]) -> dict[str, Any]:
    """Return a `NetworkAttachment` with the values of options of their own."""
    asked = {name: value for name, value in own.items() if value is not None}
    if twice := asked.keys() & wanted.keys():
        what = f"network {wanted['network'][:60]!r} has {', '.join(sorted(twice))} twice"
        raise UsageError(what, "write it beside the network, or in an option of its own")
    return {**wanted, **asked}


_ATTACHMENT = {"ip": "address", "ip6": "address6", "mac": "mac"}


def attachment(text: str) -> dict[str, Any]:
    """Parse ``NET[,ip=ADDRESS][,ip6=ADDRESS][,mac=MAC][,allow=ADDRESS[/LENGTH][@MAC]]…``."""
    network, *options = text.split(",")
    found: dict[str, Any] = {"network": network}
    for option in options:
        name, _, value = option.partition("=")
        if not value or (name != "allow" and (name not in _ATTACHMENT or _ATTACHMENT[name] in found)):
            what = f"option {option[:60]!r} of network {network[:60]!r} is unknown, empty or twice there"
            raise UsageError(what, "ip=ADDRESS, ip6=ADDRESS, mac=MAC, allow=ADDRESS[@MAC]")
        if name == "allow":
            found.setdefault("allowed_pairs", []).append(address_pair(value))
        else:
            found[_ATTACHMENT[name]] = value
    return found


def address_pair(text: str) -> dict[str, str]:
    """Parse ``ADDRESS[/LENGTH][@MAC]``, an `AddressPair`."""
    address, _, mac = text.partition("@")
    return {"address": address, "mac": mac} if mac else {"address": address}


class IdFile:
    """A new file for the instance's name, or none if `path` is None. An error in the block removes it."""

    def __init__(self, path: str | None) -> None:
        self.path = path

    def __enter__(self) -> IdFile:
        """Create the file. Conflict if it exists; Invalid if it can't be made."""
        if self.path is None:
            return self
        try:
            self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            raise Conflict(f"there is a file {self.path} already", "remove it, or choose another --cidfile") from None
        except OSError as problem:
            raise Invalid(f"{self.path} can't be made: {problem.strerror}", "choose another --cidfile") from None
        return self

    def write(self, name: str) -> None:
        """Write the name."""
        if self.path is not None:
            os.write(self.fd, name.encode())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.path is not None:
            os.close(self.fd)
            if kind is not None:
                os.unlink(self.path)


def environment(words: list[str], files: Sequence[str] = ()) -> dict[str, str]:
    """Return variables from ``NAME=VALUE``, or ``NAME`` for its value here, if any; `words` override `files`."""
    result = {}
    for word in [*(line for file in files for line in env_lines(file)), *words]:
        if "=" in word or word in os.environ:
            name, value = pair(word, "variable", default=os.environ.get(word))
            result[name] = value
    return result


def pair(text: str, what: str, default: str | None = None) -> tuple[str, str]:
    """Split ``NAME=VALUE``; without a value it is `default`, or a UsageError if that is None."""
    name, equals, value = text.partition("=")
    if not name or (not equals and default is None):
        raise UsageError(f"{what} {text[:60]!r} is not NAME=VALUE")
    return name, value if equals or default is None else default


def env_lines(path: str) -> list[str]:
    """Read variables from a file in the format of docker-run(1) --env-file: ``NAME=VALUE`` or ``NAME`` lines, unquoted;
    empty lines and those that begin with ``#`` are left out. Raises UsageError."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            text = file.read(MAX_ENV_FILE + 1)
    except (OSError, UnicodeDecodeError) as problem:
        why = problem.strerror if isinstance(problem, OSError) else "it is not UTF-8"
        raise UsageError(f"the environment file {path} can't be read: {why}", "as in --env-file ./variables") from None
    if len(text) > MAX_ENV_FILE:
        raise UsageError(f"the environment file {path} is too long", "use at most 2m, the limit of the kernel")
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r").lstrip()
        name = line.partition("=")[0]
        if not line or line.startswith("#"):
            continue
        if not name or name != name.strip() or len(name.split()) > 1 or "\0" in line:
            raise UsageError(
                f"line {number} of {path} is not NAME=VALUE: {line[:60]!r}", "a name has no blanks; # begins a comment"
            )
        found.append(line)
    return found


def extra_host(text: str) -> dict[str, str]:
    """Parse ``NAME:ADDRESS`` or ``NAME=ADDRESS``, an IPv6 address in brackets or not, as docker-run(1) --add-host."""
    equals, colon = text.find("="), text.find(":")
    at = equals if equals > 0 else colon
    name, address = text[: max(at, 0)], text[at + 1 :]
    if not name or not address:
        raise UsageError(f"host {text[:60]!r} is not NAME:ADDRESS", "as in db:10.0.0.7")
    if address == "host-gateway":
        raise UsageError("an instance can't reach the host", "use an address that its network can reach")
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
    return {"name": name, "address": address}


_FLAGS = {
    "exec": ("executable", True),
    "noexec": ("executable", False),
    "ro": ("read_only", True),
    "rw": ("read_only", False),
}
_ALWAYS = ("nosuid", "nodev")


def container_options(arguments: Arguments) -> dict[str, Any]:
    """Return the `ContainerOptions` of the options."""
    refuse_machine_options(arguments)
    options: dict[str, Any] = {
        "kind": "container",
        "init": arguments.init,
        "group_add": arguments.group_add,
        "rlimits": [rlimit(text) for text in arguments.ulimit],
        "cap_add": arguments.cap_add,
        "cap_drop": arguments.cap_drop,
        "sysctls": dict(pair(text, "sysctl") for text in arguments.sysctl),
        "pid_of": pid_of(arguments.pid),
        "nesting": arguments.nesting,
        "socket_families": arguments.socket_family,
        "aio": arguments.aio,
    }
    return options if arguments.shm_size is None else {**options, "shm_size": arguments.shm_size}


def tmpfs(text: str) -> dict[str, Any]:
    """Parse ``PATH[:OPTION,…]`` with the options of tmpfs(5): exec, noexec, ro, rw, size, mode, uid, gid."""
    path, _, options = text.partition(":")
    result: dict[str, Any] = {"type": "tmpfs", "path": path}
    for option in options.split(",") if options else []:
        name, equals, value = option.partition("=")
        if not equals and name in _FLAGS:
            key, on = _FLAGS[name]
            result[key] = on
        elif not equals and name in ("suid", "dev"):
            raise UsageError(
                f"tmpfs option {name} is not supported", "set-uid programs and devices have no effect inside; omit it"
            )
        elif name == "size" and value:
            result["size"] = _usage(parse_size, value)
        elif name == "mode" and value.isascii() and value.isdigit() and not set(value) & {"8", "9"}:
            result["mode"] = int(value[:8], 8)
        elif name in ("uid", "gid") and value:
            result[name] = _usage(whole(0), value)
        elif equals or name not in _ALWAYS:
            what = f"tmpfs option {option[:60]!r} is unknown"
            raise UsageError(what, "exec, noexec, ro, rw, size=SIZE, mode=OCTAL, uid=N, gid=N")
    return result


def rlimit(text: str) -> dict[str, Any]:
    """Parse ``nofile=1024`` or ``nofile=1024:4096``, soft and hard."""
    name, value = pair(text, "ulimit")
    soft, _, hard = value.partition(":")
    try:
        return {"name": name.lower(), "soft": int(soft), "hard": int(hard or soft)}
    except ValueError:
        raise UsageError(f"ulimit {text[:60]!r} is not NAME=SOFT[:HARD]") from None


def restart(text: str) -> dict[str, Any]:
    """Parse ``no``, ``always``, ``unless-stopped``, ``on-failure`` or ``on-failure:RETRIES``."""
    name, _, retries = text.partition(":")
    known = name in ("no", "always", "unless-stopped", "on-failure")
    if not known or (retries and (name != "on-failure" or not retries.isdigit())):
        raise UsageError(
            f"restart policy {text[:60]!r} is unknown", "no, on-failure[:RETRIES], always or unless-stopped"
        )
    return {"name": name, "max_retries": int(retries or 0)}


def healthcheck(arguments: Arguments) -> dict[str, Any] | None:
    """Return the `Healthcheck` of the options; None leaves everything to the image."""
    given = {
        "interval": arguments.health_interval,
        "timeout": arguments.health_timeout,
        "retries": arguments.health_retries,
        "start_period": arguments.health_start_period,
        "start_interval": arguments.health_start_interval,
        "test": arguments.health_cmd and ["CMD-SHELL", arguments.health_cmd],
    }
    given = {name: value for name, value in given.items() if value is not None}
    if not arguments.no_healthcheck:
        return given or None
    if given:
        raise UsageError("--no-healthcheck and the other --health options exclude each other")
    return {"test": ["NONE"]}


def pids(arguments: Arguments) -> int:
    """Return the limit of processes, which includes those of nested containers."""
    return arguments.pids or (16384 if arguments.nesting else 4096)


def pid_of(text: str | None) -> str | None:
    """Parse ``container:NAME`` to the instance's name."""
    if text is None:
        return None
    kind, _, name = text.partition(":")
    if kind == "container" and name:
        return name
    if text == "host":
        raise UsageError(
            "an instance can't share the host's PID namespace", "use container:NAME for that of another instance"
        )
    raise UsageError(f"PID namespace {text[:60]!r} is unknown", "write container:NAME")


def published(text: str) -> dict[str, Any]:
    """Parse ``[ADDRESS:]PORT[-LAST]:PORT[-LAST][/PROTOCOL]``."""
    from insula.model import publishing  # not needed by most commands

    found: dict[str, Any] = _usage(publishing.parse, text)
    return found


def _usage(parse: Any, text: str) -> Any:
    try:
        return parse(text)
    except Invalid as problem:
        raise UsageError(problem.message, problem.hint) from None


OPTIONS = [
    Option("-d --detach", "print its name and leave it running"),
    Option("-i --interactive", "keep its standard input open and connected"),
    Option("-t --tty", "give it a terminal"),
    Option("--detach-keys", "keys that detach and leave it running", "KEYS", default=DETACH_KEYS, parse=detach_keys),
    Option("--rm", "remove it when it exits"),
    Option("--cidfile", "write its name into this new file", "FILE", complete="file"),
    Option(
        "--pull",
        "fetch the image first: always, if it is missing, or never",
        "WHEN",
        default="never",
        parse=choice("always", "missing", "never"),
        complete=("always", "missing", "never"),
    ),
    Option("-q --quiet", "with --pull: show no progress"),
    Option("--name", "its name, a DNS label; generated by default", "NAME"),
    Option(
        "--network",
        "a network (default), or none; options ip=, ip6=, mac=, allow=ADDRESS[@MAC]",
        "NET[,OPTION…]",
        many=True,
        complete="network",
    ),
    Option("--ip", "its IPv4 address in the first network; by default the next free one", "ADDRESS"),
    Option("--ip6", "its IPv6 address there", "ADDRESS"),
    Option("--mac --mac-address", "its MAC address there; by default made of its network and IPv4 address", "MAC"),
    Option(
        "-p --publish",
        "publish a port or range of the host: 8080:80, [::1]:53:53/udp",
        "[ADDRESS:]PORT:PORT[/udp]",
        many=True,
        parse=published,
    ),
    *MACHINE_OPTIONS,
    Option("--hostname", "its host name (its name)", "NAME"),
    Option("--cpus", "at most so many CPUs, as in 0.5 (0: as many as its tenant)", "N", parse=zero_or(parse_cpus)),
    Option("-m --memory", "at most so much memory, as in 64m (0: as its tenant)", "SIZE", parse=zero_or(parse_size)),
    Option("--pids", "at most so many processes (4096; with --nesting 16384)", "N", parse=whole(1)),
    Option("--disk", "at most so many bytes on disk, as in 1g", "SIZE", parse=zero_or(parse_size)),
    Option("--inodes", "at most so many files and directories (one for each 16k of --disk)", "N", parse=whole(16)),
    Option("-e --env", "set a variable; without a value, to its value here", "NAME[=VALUE]", many=True),
    Option("--env-file", "set the variables in a file: NAME=VALUE a line", "FILE", many=True, complete="file"),
    Option("-u --user", "run as this user: name or number, with :group", "USER"),
    Option("-w --workdir", "start in this directory", "PATH"),
    Option("--entrypoint", "run this instead of the image's entrypoint", "PROGRAM"),
    Option("-l --label", "set a label", "NAME[=VALUE]", many=True),
    Option("--init", "a small PID 1 that reaps processes and forwards signals"),
    Option("--read-only", "make its root file system read-only"),
    Option("--tmpfs", "a tmpfs at PATH (64m): exec, ro, size=, mode=, uid=, gid=", "PATH[:OPTION,…]", many=True),
    Option("--shm-size", "the size of /dev/shm (64m)", "SIZE", parse=parse_size),
    Option("--add-host", "a line in /etc/hosts", "NAME:ADDRESS", many=True),
    Option("--dns", "use this name server instead of the network's", "ADDRESS", many=True),
    Option("--dns-search", "look up short names in this domain; . for none", "DOMAIN", many=True),
    Option("--group-add", "add its user to a group: name or number", "GROUP", many=True),
    Option("--ulimit", "a resource limit, as in nofile=1024:4096", "NAME=SOFT[:HARD]", many=True),
    Option("--cap-add", "add a capability (capabilities(7))", "CAP", many=True),
    Option("--cap-drop", "drop a capability, or ALL", "CAP", many=True),
    Option("--sysctl", "set a kernel parameter of its namespaces", "NAME=VALUE", many=True),
    Option(
        "--restart",
        "when it exits: no, on-failure[:RETRIES], always, unless-stopped",
        "POLICY",
        default="no",
        complete=("no", "on-failure", "always", "unless-stopped"),
    ),
    Option("--health-cmd", "check its health with this command line, in its shell", "LINE"),
    Option("--health-interval", "the time between checks (30s)", "TIME", parse=parse_duration),
    Option("--health-timeout", "the time limit of a check (30s)", "TIME", parse=parse_duration),
    Option("--health-retries", "the number of failures in a row that make it unhealthy (3)", "N", parse=whole(1)),
    Option(
        "--health-start-period",
        "the time after its start in which failures are not counted (0s)",
        "TIME",
        parse=parse_duration,
    ),
    Option("--health-start-interval", "the time between checks in the start period (5s)", "TIME", parse=parse_duration),
    Option("--no-healthcheck", "disable the image's health check"),
    Option("--pid", "share the processes of another instance", "container:NAME", complete="container"),
    Option("--nesting", "allow containers inside of it (docs/nesting.md)"),
    Option("--socket-family", "allow a further family of sockets", "FAMILY", many=True, complete=FAMILIES),
    Option("--aio", "allow io_setup(2), which uses contexts of the host's limit"),
    Option("--stop-signal", "the signal that `insula stop` sends", "SIGNAL"),
    Option("--stop-timeout", "the time until SIGKILL after it (10s)", "TIME", parse=parse_duration),
    Option("--log-size", "rotate its log at this size (10m)", "SIZE", parse=parse_size),
    Option("--log-files", "keep so many rotated log files (3)", "N", parse=whole(1)),
]

_PUBLISH_ALL = "name the ports that others may reach, as in -p 8080:80"
_VOLUME = "volumes are not supported yet: an instance keeps its files, and `insula cp` copies files in or out"
_PRIVILEGED = "an instance can't be privileged on the host; --cap-add adds capabilities in its own namespaces"
ELSEWHERE = {
    **dict.fromkeys(("-P", "--publish-all"), _PUBLISH_ALL),
    **dict.fromkeys(("-v", "--volume", "--mount", "--volumes-from"), _VOLUME),
    **dict.fromkeys(("--privileged", "--ipc", "--device", "--security-opt"), _PRIVILEGED),
    "--net": "did you mean --network?",
    "--pids-limit": "did you mean --pids?",
    "--platform": "images are of this host's architecture",
}

COMMANDS = {
    "run": Command(
        run,
        "Create an instance from IMAGE and start it.",
        "IMAGE [CMD...]",
        OPTIONS,
        rest=True,
        complete={"IMAGE": "image"},
        elsewhere=ELSEWHERE,
        details="Without -d its output is shown here and its exit status becomes ours\n"
        "(125: the engine failed, 126: CMD can't be executed, 127: CMD does not exist).",
    )
}
