"""Compiled seccomp filters against a plain interpretation of their profile, and against libseccomp's filters."""

from __future__ import annotations

import ctypes
import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insula.control.instances.drivers.container import seccomp_default
from insula.kernel import capabilities, syscall_numbers
from insula.kernel.seccomp import bpf, compiler
from insula.kernel.syscall_numbers import AARCH64, ARM, X32, X32_BIT, X86, X86_64, Arch, native
from insula.model.errors import Invalid
from tests.bpf_machine import libseccomp, run

ALLOW, ERRNO, KILL = compiler.RET_ALLOW, compiler.RET_ERRNO, compiler.RET_KILL_THREAD
EPERM, ENOSYS = ERRNO | 1, ERRNO | 38
BITS64 = (1 << 64) - 1
NOTIFY: dict[str, Any] = {
    "listenerPath": "/run/agent.sock",
    "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}],
}

if native() != X86_64:
    pytest.skip("the expectations below are of x86-64", allow_module_level=True)


def default_profile(*add: str) -> dict[str, Any]:
    return seccomp_default.profile(capabilities.to_names(capabilities.adjust(capabilities.DEFAULT, add)))


def number(name: str, arch: Arch = X86_64) -> int:
    return syscall_numbers.numbers(name, arch)[-1].value


# -- the reference: what the profile says, read literally --------------------------------------------------------------


def holds(condition: compiler.Condition, args: list[int]) -> bool:
    value, (_, op, a, b) = args[condition.argument], condition
    return {
        "EQ": value == a,
        "NE": value != a,
        "LT": value < a,
        "LE": value <= a,
        "GT": value > a,
        "GE": value >= a,
        "MASKED_EQ": value & a == b,
    }[op]


def expected(profile: dict[str, Any], audit: int, nr: int, args: list[int]) -> int:
    checked = compiler.parse(profile)
    x32 = audit == X32.audit and nr >= X32_BIT
    arch = next((a for a in checked.archs if a.audit == audit and (a == X32) == x32), None)
    if arch is None:
        return checked.default if x32 and nr == 0xFFFFFFFF else KILL
    if not arch.wide:
        args = [value & 0xFFFFFFFF for value in args]
    last, applying = 0, []
    for rule in checked.rules:
        for name in rule.names:
            for way in syscall_numbers.numbers(name, arch):
                last = max(last, way.value)
                if way.value == nr and rule.action != checked.default:
                    conditions = rule.conditions
                    if way.multiplexer is not None:
                        here = compiler.Condition(0, "EQ", way.multiplexer)
                        conditions = (here, *(c for c in conditions if c.argument))
                    applying.append(rule._replace(conditions=conditions))
    permissive = checked.default in (ALLOW, compiler.RET_LOG) or checked.default >> 16 == compiler.RET_TRACE >> 16
    if last and nr > last and not permissive:
        return ENOSYS
    for rule in [r for r in applying if not r.conditions] + applying:
        if all(holds(c, args) for c in rule.conditions):
            return rule.action
    return checked.default


NAMES = ["read", "write", "open", "socket", "clone", "personality", "ptrace", "bind", "shmget", "semop", "socketcall",
         "ipc", "chown32", "arch_prctl", "mseal", "openat2", "rt_sigaction", "no_such_call"]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(
        [0, 1, 2, 8, 40, 0x7E020000, 0xFFFFFFFF, 1 << 32, (1 << 32) + 1, (5 << 32) | 7, BITS64 - 1, BITS64]
    ),
    st.integers(0, 5),
    st.integers(0, BITS64),
)
OPERATORS = st.sampled_from(sorted(compiler._OPERATORS))
CONDITIONS = st.fixed_dictionaries({"index": st.integers(0, 2), "value": VALUES, "valueTwo": VALUES, "op": OPERATORS})
ACTIONS: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {"action": "SCMP_ACT_ALLOW"},
        {"action": "SCMP_ACT_ERRNO"},
        {"action": "SCMP_ACT_ERRNO", "errnoRet": 0},
        {"action": "SCMP_ACT_ERRNO", "errnoRet": 95},
        {"action": "SCMP_ACT_KILL_PROCESS"},
        {"action": "SCMP_ACT_TRAP"},
        {"action": "SCMP_ACT_LOG"},
    ]
)
RULES = st.builds(
    lambda names, action, args: {"names": names, "args": args, **action},
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=3),
    ACTIONS,
    st.lists(CONDITIONS, max_size=3),
)
PROFILES = st.builds(
    lambda default, archs, rules: {**default, "architectures": archs, "syscalls": rules},
    st.sampled_from(
        [
            {"defaultAction": "SCMP_ACT_ERRNO"},
            {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13},
            {"defaultAction": "SCMP_ACT_ALLOW"},
            {"defaultAction": "SCMP_ACT_KILL"},
            {"defaultAction": "SCMP_ACT_LOG"},
            {"defaultAction": "SCMP_ACT_TRACE", "defaultErrnoRet": 7},
        ]
    ),
    st.lists(st.sampled_from([X86_64.name, X86.name, X32.name, AARCH64.name]), max_size=4),
    st.lists(RULES, max_size=8),
)


def interesting(profile: dict[str, Any], rng: random.Random) -> tuple[int, int, list[int]]:
    """A call that is near to what the profile talks about."""
    arch = rng.choice([X86_64, X86, X32, AARCH64])
    numbers = [way.value for name in NAMES for way in syscall_numbers.numbers(name, arch)]
    nr = rng.choice([*numbers, rng.randrange(500), X32_BIT, 0xFFFFFFFF, rng.getrandbits(32)])
    values = [0, 1, 2, 8, 40, 0xFFFFFFFF, BITS64]
    for rule in profile["syscalls"]:
        values += [c[f] for c in rule.get("args", ()) for f in ("value", "valueTwo")]
    args = [(rng.choice(values) + rng.choice([-1, 0, 0, 0, 1, 1 << 32])) & BITS64 for _ in range(6)]
    return arch.audit, (nr + rng.choice([0, 0, 0, 1, -1])) & 0xFFFFFFFF, args


@given(profile=PROFILES, seed=st.integers(0, 1 << 32))
@settings(max_examples=150, deadline=None)
def test_the_filter_does_what_the_profile_says(profile: dict[str, Any], seed: int) -> None:
    program, rng = compiler.compile(profile), random.Random(seed)
    for _ in range(60):
        audit, nr, args = interesting(profile, rng)
        assert run(program, audit, nr, args) == expected(profile, audit, nr, args), (hex(audit), nr, args)


@pytest.mark.parametrize("add", [[], ["SYS_ADMIN"], ["ALL"], ["SYS_PTRACE", "BPF"]])
def test_default_profile_for_every_number(add: list[str]) -> None:
    profile, rng = default_profile(*add), random.Random(3)
    program = compiler.compile(profile)
    for arch in (X86_64, X86, X32):
        for nr in [*range(arch.first, arch.first + 560), 0xFFFFFFFF, 0x80000000]:
            args = [
                rng.choice([0, 1, 8, 16, 38, 39, 40, 41, 0x10000000, 0x20008, 0xFFFFFFFF, BITS64]) for _ in range(6)
            ]
            assert run(program, arch.audit, nr, args) == expected(profile, arch.audit, nr, args), (arch.name, nr, args)


def known_to_libseccomp(profile: dict[str, Any]) -> dict[str, Any]:
    resolve = ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name
    rules = [{**r, "names": [n for n in r["names"] if resolve(n.encode()) != -1]} for r in profile["syscalls"]]
    return {**profile, "syscalls": [rule for rule in rules if rule["names"]]}


def highest(profile: dict[str, Any], arch: Arch) -> int:
    """The number above which runc answers ENOSYS before it asks the filter."""
    names = {name for rule in profile["syscalls"] for name in rule["names"]}
    return max((way.value for name in names for way in syscall_numbers.numbers(name, arch)), default=0)


def test_default_profile_is_libseccomps_filter_for_every_number() -> None:
    profile, rng = known_to_libseccomp(default_profile()), random.Random(5)
    ours, theirs = compiler.compile(profile), libseccomp(profile)
    assert len(ours) < len(theirs) / 3
    compared = 0
    for arch in (X86_64, X86, X32):
        for nr in range(arch.first, highest(profile, arch) + 1):
            for _ in range(3):
                args = [rng.choice([0, 1, 8, 16, 38, 40, 41, 0x10000000, 0xFFFFFFFF]) for _ in range(6)]
                assert run(ours, arch.audit, nr, args) == run(theirs, arch.audit, nr, args), (arch.name, nr, args)
                compared += 1
    assert compared > 3000


# For each architecture: libseccomp drops the upper half of what a condition names where registers have 32 bits.
WIDE = st.lists(st.sampled_from([X86_64.name, AARCH64.name]), max_size=2, unique=True)
NARROW = st.lists(st.sampled_from([X86_64.name, X86.name, X32.name, AARCH64.name, ARM.name]), unique=True)
# calls of all of them: 2.5 jumps wrongly where another architecture has no number for one
PLAIN = ["read", "openat", "clone", "personality", "ptrace", "mount", "exit_group", "openat2", "no_such_call"]
ANY_ACTION: st.SearchStrategy[dict[str, Any]] = st.one_of(
    ACTIONS,
    st.sampled_from([{"action": "SCMP_ACT_KILL"}, {"action": "SCMP_ACT_TRACE", "errnoRet": 77}]),
    st.just({"action": "SCMP_ACT_NOTIFY"}),
)


DEFAULTS: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {"defaultAction": "SCMP_ACT_ALLOW"},
        {"defaultAction": "SCMP_ACT_ERRNO"},
        {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38},
        {"defaultAction": "SCMP_ACT_KILL_PROCESS"},
        {"defaultAction": "SCMP_ACT_TRAP"},
        {"defaultAction": "SCMP_ACT_LOG"},
    ]
)


@st.composite
def agreeing(draw: st.DrawFn) -> dict[str, Any]:
    """A profile with one rule for a call, or several that compare one argument for equality.

    Others that overlap libseccomp merges into one tree, and 2.5 loses some on the way: it calls ``a > 5 or b != 40``
    false for a = 2³² + 1 and b = 1. What ours makes of those is compared with a plain reading above.
    """
    wide = draw(st.booleans())
    top = BITS64 if wide else 0xFFFFFFFF
    value = st.one_of(VALUES.map(lambda v: v & top), st.integers(0, 3))
    condition = st.fixed_dictionaries(
        {
            "index": st.integers(0, 3),
            "value": value,
            "valueTwo": value,
            "op": st.sampled_from(sorted(compiler._OPERATORS)),
        }
    )
    several = st.lists(value, min_size=1, max_size=4, unique=True).map(
        lambda values: [[{"index": 1, "value": v, "valueTwo": 0, "op": "SCMP_CMP_EQ"}] for v in values]
    )
    single = st.lists(condition, max_size=3, unique_by=lambda c: c["index"]).map(lambda args: [args])
    rules: list[dict[str, Any]] = []
    for name in draw(st.lists(st.sampled_from(PLAIN), min_size=1, unique=True)):
        action = draw(ANY_ACTION)
        rules += [{"names": [name], "args": args, **action} for args in draw(st.one_of(single, several))]
    return {
        **draw(DEFAULTS),
        "architectures": draw(WIDE if wide else NARROW),
        "listenerPath": "/run/agent.sock",
        "syscalls": rules,
    }


@given(profile=agreeing(), seed=st.integers(0, 1 << 32))
@settings(max_examples=150, deadline=None)
def test_random_profiles_are_libseccomps_filters(profile: dict[str, Any], seed: int) -> None:
    ours, theirs, rng = compiler.compile(profile), libseccomp(profile), random.Random(seed)
    archs = {arch.audit: arch for arch in compiler.parse(profile).archs if arch != X32}
    for _ in range(60):
        audit, nr, args = interesting(profile, rng)
        arch = X32 if audit == X86_64.audit and nr >= X32.first else archs.get(audit)
        if arch is not None and nr <= highest(profile, arch):  # above it is runc's ENOSYS, not libseccomp's
            assert run(ours, audit, nr, args) == run(theirs, audit, nr, args), (hex(audit), nr, args)


# -- what the default profile means -----------------------------------------------------------------------------------


def outcome(name: str, *args: int, arch: Arch = X86_64, add: tuple[str, ...] = ()) -> int:
    return run(compiler.compile(default_profile(*add)), arch.audit, number(name, arch), args)


@pytest.mark.parametrize(
    "name", ["read", "execve", "openat2", "futex", "statx", "clone", "mseal", "futex_wait", "ptrace"]
)
def test_ordinary_calls_are_allowed(name: str) -> None:
    assert outcome(name) == ALLOW


REFUSED = """
    mount umount2 unshare setns pivot_root bpf keyctl add_key request_key kexec_load init_module reboot swapon acct
    perf_event_open userfaultfd io_uring_setup open_by_handle_at fsopen move_mount mount_setattr quotactl iopl
    syslog settimeofday sethostname vhangup mbind move_pages kcmp pidfd_getfd nfsservctl
"""


@pytest.mark.parametrize("name", REFUSED.split())
def test_dangerous_calls_are_refused(name: str) -> None:
    assert outcome(name) == EPERM


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ("SYS_ADMIN", "mount"),
        ("SYS_ADMIN", "clone3"),
        ("SYS_PTRACE", "kcmp"),
        ("BPF", "bpf"),
        ("DAC_READ_SEARCH", "open_by_handle_at"),
        ("SYS_TIME", "settimeofday"),
    ],
)
def test_capabilities_open_calls(capability: str, name: str) -> None:
    assert outcome(name) != ALLOW
    assert outcome(name, add=(capability,)) == ALLOW


def allowed(program: bytes, name: str, arch: Arch, *args: int) -> bool:
    return run(program, arch.audit, number(name, arch), [*args, *[0] * (6 - len(args))]) == ALLOW


def families(program: bytes, name: str = "socket", arch: Arch = X86_64) -> set[int]:
    """Which numbers of socket families the program lets through."""
    return {family for family in range(300) if allowed(program, name, arch, family)}


AF_UNIX, AF_INET, AF_INET6, AF_NETLINK, AF_SMC = 1, 2, 10, 16, 43
NUMBERS = {"can": 29, "kcm": 41, "key": 15, "llc": 26, "packet": 17, "pppox": 24, "rxrpc": 33, "smc": 43, "tipc": 30,
           "xdp": 44}  # fmt: skip


@pytest.mark.parametrize("arch", [X86_64, X86, X32], ids=lambda arch: arch.name)
def test_four_socket_families(arch: Arch) -> None:
    program = compiler.compile(default_profile())
    assert families(program, arch=arch) == {AF_UNIX, AF_INET, AF_INET6, AF_NETLINK}
    assert families(program, "socketpair", arch) == {AF_UNIX}, "else it would load their modules too"
    if arch.wide:  # the kernel ignores the upper half
        assert not any(allowed(program, "socket", arch, 1 << 32 | family) for family in range(300))
    everything = compiler.compile(default_profile("ALL"))
    assert families(everything, arch=arch) == families(program, arch=arch), "no capability opens a family"


@pytest.mark.parametrize("family", seccomp_default.FAMILIES)
def test_an_option_opens_one_family(family: str) -> None:
    names = capabilities.to_names(capabilities.DEFAULT)
    program = compiler.compile(seccomp_default.profile(names, families=[family]))
    assert families(program) - families(compiler.compile(default_profile())) == {NUMBERS[family]}
    assert families(program, "socketpair") == {AF_UNIX, NUMBERS[family]}
    assert allowed(program, "socket", X86_64, AF_INET, 1, 256) == (family == "smc"), "IPPROTO_SMC"
    assert allowed(program, "socket", X86_64, AF_NETLINK, 3, 6) == (family == "key"), "NETLINK_XFRM"
    assert allowed(program, "setsockopt", X86_64, 3, 1, 26) == (family == "packet"), "SO_ATTACH_FILTER"


@pytest.mark.parametrize("family", ["vsock", "alg", "", "PACKET", "17", "nesting"])
def test_no_option_opens_these(family: str) -> None:
    with pytest.raises(Invalid, match="socket family"):
        seccomp_default.profile([], families=[family])


@pytest.mark.parametrize("arch", [X86_64, X86, X32], ids=lambda arch: arch.name)
def test_protocols_that_are_families_or_modules(arch: Arch) -> None:
    program = compiler.compile(default_profile())
    for family in (AF_INET, AF_INET6):
        found = {protocol for protocol in range(1000) if allowed(program, "socket", arch, family, 1, protocol)}
        assert found == {*range(256), 262}, "the protocols of IP and IPPROTO_MPTCP; 256 is IPPROTO_SMC"
        assert not arch.wide or not allowed(program, "socket", arch, family, 1, 1 << 32 | 256)
    found = {protocol for protocol in range(1000) if allowed(program, "socket", arch, AF_NETLINK, 3, protocol)}
    assert found == {0, 1, 2, 3, 4, 5, 9, 12, 13, 14, 15, 16}, "8 is iSCSI's, 20 RDMA's: modules"
    assert not arch.wide or not allowed(program, "socket", arch, AF_NETLINK, 3, 1 << 32 | 8)


@pytest.mark.parametrize("arch", [X86_64, X86, X32], ids=lambda arch: arch.name)
def test_socket_options_but_filters(arch: Arch) -> None:
    program, refused = compiler.compile(default_profile()), {(1, 26), (1, 51), (6, 14), (6, 32), (6, 38), (41, 32)}
    levels, options = (0, 1, 2, 6, 41, 263, 270, 0xFFFFFFFF), (*range(80), 0xFFFFFFFF)
    upper = (0, 1 << 32, 0xFFFFFFFF << 32) if arch.wide else (0,)
    for level, option, high, higher in itertools.product(levels, options, upper, upper):
        wanted = ERRNO | 92 if (level, option) in refused else ALLOW
        args = [3, high | level, higher | option, 0, 0, 0]
        assert run(program, arch.audit, number("setsockopt", arch), args) == wanted, (level, option)


def test_a_routers_socket_options_come_with_net_admin() -> None:
    program = compiler.compile(default_profile("NET_ADMIN"))
    assert all(allowed(program, "setsockopt", X86_64, 3, *pair) for pair in [(6, 14), (6, 32), (6, 38), (41, 32)])
    assert not allowed(program, "setsockopt", X86_64, 3, 1, 26)


def test_calls_that_reach_shared_tables_are_refused() -> None:
    names = capabilities.to_names(capabilities.DEFAULT)
    assert outcome("io_setup") == outcome("mincore") == outcome("mincore", add=("ALL",)) == ENOSYS
    assert run(compiler.compile(seccomp_default.profile(names, aio=True)), X86_64.audit, number("io_setup")) == ALLOW


def test_conditions_of_the_default_profile() -> None:
    assert outcome("personality", 0) == outcome("personality", 0xFFFFFFFF) == ALLOW
    assert outcome("personality", 0x0040000) == EPERM  # ADDR_NO_RANDOMIZE
    assert outcome("clone", 0x11) == ALLOW
    assert outcome("clone", 0x10000011) == EPERM  # CLONE_NEWUSER
    assert outcome("clone", 0x10000011, add=("SYS_ADMIN",)) == ALLOW
    assert outcome("clone3") == ENOSYS
    assert run(compiler.compile(default_profile()), X86.audit, 102, [1]) == ENOSYS  # socketcall(SYS_SOCKET)


def test_other_architectures_and_newer_calls() -> None:
    program = compiler.compile(default_profile())
    assert run(program, AARCH64.audit, 0) == KILL
    assert run(program, 0, 0) == KILL
    for arch in (X86_64, X86, X32):
        assert run(program, arch.audit, arch.first + 3000) == ENOSYS
    without_x32 = compiler.compile({**default_profile(), "architectures": [X86_64.name]})
    assert run(without_x32, X86_64.audit, X32_BIT | 1) == KILL
    assert run(without_x32, X86_64.audit, 0xFFFFFFFF) == EPERM
    assert run(without_x32, X86.audit, 4) == KILL


def test_the_filter_is_small() -> None:
    assert len(compiler.compile(default_profile())) // 8 < 400


# -- bad profiles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"defaultAction": None}, "defaultAction"),
        ({"defaultAction": "ALLOW"}, "defaultAction"),
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "defaultAction"),
        ({"defaultErrnoRet": 5000}, "defaultErrnoRet"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1}, "defaultErrnoRet"),
        ({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_KILL", "errnoRet": 1}]}, "syscalls[0].errnoRet"),
        ({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 4096}]}, "syscalls[0].errnoRet"),
        ({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_NOTIFY"}]}, "listenerPath"),
        ({"listenerMetadata": "x"}, "listenerPath"),
        ({"listenerPath": 3}, "listenerPath"),
        ({"flags": [[]]}, "flag"),
        ({"architectures": [None]}, "architecture"),
        ({"architectures": ["SCMP_ARCH_VAX"]}, "architecture"),
        ({"architectures": "SCMP_ARCH_X86"}, "architectures"),
        ({"flags": ["SECCOMP_FILTER_FLAG_FAST"]}, "flag"),
        ({"syscalls": [1]}, "syscalls[0]"),
        ({"syscalls": [{"names": [], "action": "SCMP_ACT_ALLOW"}]}, "syscalls[0].names"),
        ({"syscalls": [{"names": [3], "action": "SCMP_ACT_ALLOW"}]}, "syscalls[0].names"),
        ({"syscalls": [{"names": ["read"]}]}, "syscalls[0].action"),
        ({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 6, "op": "SCMP_CMP_EQ"}]}]},
         "syscalls[0].args[0].index"),
        ({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "op": "EQ"}]}]},
         "syscalls[0].args[0].op"),
        ({"syscalls": [{"names": ["write"], "action": "SCMP_ACT_NOTIFY"}]}, "write"),
    ],
)  # fmt: skip
def test_bad_profiles_name_the_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as caught:
        compiler.compile({**default_profile(), **change})
    assert field in caught.value.message
    assert caught.value.hint


def test_too_many_conditions_are_refused() -> None:
    rules = [
        {
            "names": ["read"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": i, "value": (1 << 40) + 7 * n + i, "op": "SCMP_CMP_NE"} for i in range(6)],
        }
        for n in range(400)
    ]
    with pytest.raises(Invalid, match="4096"):
        compiler.compile({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules})
    assert compiler.compile({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules[:100]})


def test_far_jumps() -> None:
    """Programs longer than a conditional jump reaches still decide right."""
    graph, rng = bpf.Graph(), random.Random(9)
    wanted = {n: rng.randrange(1 << 30) for n in range(0, 4000, 4)}
    program = graph.assemble(graph.load(0, graph.switch([(n, graph.ret(v)) for n, v in wanted.items()])))
    assert len(program) // 8 > 1000
    for n in range(4000):
        assert run(program, 0, n) == wanted[n // 4 * 4]


def test_flags() -> None:
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC"]}
    assert compiler.parse(profile).flags == 2
    assert compiler.parse({**profile, "flags": ["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]}).flags == 4
    # who notifies has a listener; without one there is no receiver to be waited for, and the kernel says EINVAL
    wait = {**profile, "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}
    assert compiler.parse(wait).flags == 0
    assert compiler.parse({**wait, **NOTIFY}).flags == 8 | 32


def test_an_errno_is_of_the_default_where_none_is_given() -> None:
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38}
    rule = {"names": ["mount"], "action": "SCMP_ACT_ERRNO"}
    program = compiler.compile({**profile, "syscalls": [rule, {**rule, "names": ["bpf"], "errnoRet": 0}]})
    assert run(program, X86_64.audit, number("getpid")) == ENOSYS
    assert run(program, X86_64.audit, number("mount")) == EPERM
    assert run(program, X86_64.audit, number("bpf")) == ERRNO


def test_architectures_that_cannot_run_here_change_nothing() -> None:
    profile = default_profile()
    more = [*profile["architectures"], "SCMP_ARCH_MIPSEL64N32", "SCMP_ARCH_S390X", "SCMP_ARCH_LOONGARCH64"]
    assert compiler.compile({**profile, "architectures": more}) == compiler.compile(profile)


def test_unknown_names_are_ignored() -> None:
    profile = default_profile()
    hostile = ["no_such_call", "mount\0", "read write", "\ud800", "é", "x" * 10_000, "-1", "sys_mount"]
    rule = {"names": hostile, "action": "SCMP_ACT_ALLOW"}
    assert compiler.compile({**profile, "syscalls": [*profile["syscalls"], rule]}) == compiler.compile(profile)
