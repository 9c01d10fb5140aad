"""System calls that expose kernel code which no container needs, or that change state of all containers.

Each is a way in of its own: a published exploit began with it. The arguments harm nobody where the call is allowed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
from collections.abc import Callable

from tests.system.escape.attacks.calls import NUMBERS, syscall

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
NOWHERE = "/no/such/path"


def bpf_map() -> int:
    """An eBPF map: verifier bugs are read-write of kernel memory (CVE-2020-8835, CVE-2021-31440, CVE-2022-23222)."""
    attributes = struct.pack("IIII", 2, 4, 8, 1)  # BPF_MAP_TYPE_ARRAY of one
    return syscall("bpf", 0, attributes.ljust(128, b"\0"), 128)


def perf_event() -> int:
    """A performance counter (CVE-2013-2094, CVE-2023-5717): it also samples the kernel's addresses."""
    attributes = struct.pack("IIQ", 1, 112, 0).ljust(112, b"\0")  # PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK
    return syscall("perf_event_open", attributes, 0, -1, -1, 0)


def io_uring() -> int:
    """A ring of system calls, done by kernel threads that seccomp doesn't see (CVE-2022-29582, CVE-2023-2598)."""
    return syscall("io_uring_setup", 4, bytes(120))


def userfault() -> int:
    """Page faults answered by a program: it stops the kernel in the middle of a copy, which wins nearly any race."""
    return syscall("userfaultfd", os.O_CLOEXEC)


def mount_tmpfs() -> int:
    """mount(2), with which masked paths could be uncovered, a new procfs mounted, and cgroups made writable."""
    return syscall("mount", b"none", b"/tmp", b"tmpfs", 0, None)


def uncover() -> int:
    """Unmounts what covers a masked path."""
    return syscall("umount2", NOWHERE.encode(), 2)


def file_system_context() -> int:
    """fsopen(2), the new mount API: CVE-2022-0185 overflowed in it."""
    return syscall("fsopen", b"tmpfs", 0)


def clone_of_a_mount() -> int:
    """open_tree(2) with OPEN_TREE_CLONE: a copy of a mount without what covers it."""
    return syscall("open_tree", -100, b"/", 1)


def mount_attributes() -> int:
    """mount_setattr(2): read-only becomes writable again."""
    return syscall("mount_setattr", -1, b"", 0x1000, bytes(32), 32)


def another_root() -> int:
    """pivot_root(2)."""
    return syscall("pivot_root", NOWHERE.encode(), NOWHERE.encode())


def user_namespace() -> int:
    """unshare(CLONE_NEWUSER): all capabilities in it, hence nf_tables, fs contexts, … (CVE-2022-0185,
    CVE-2024-1086)."""
    return syscall("unshare", CLONE_NEWUSER)


def user_namespace_by_clone() -> int:
    """A user namespace by clone(2)."""
    if (child := syscall("clone", CLONE_NEWUSER | 17, 0, 0, 0, 0)) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def user_namespace_by_clone3() -> int:
    """A user namespace by clone3(2), whose flags are in memory, where a seccomp filter doesn't see them."""
    arguments = struct.pack("8Q", CLONE_NEWUSER, 0, 0, 0, 17, 0, 0, 0)
    if (child := syscall("clone3", arguments, 64)) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def mount_namespace() -> int:
    """unshare(CLONE_NEWNS): a place to mount in."""
    return syscall("unshare", CLONE_NEWNS)


def join_a_namespace() -> int:
    """setns(2), the way back to the host's namespaces once a descriptor has leaked."""
    return syscall("setns", os.open("/proc/self/ns/mnt", os.O_RDONLY), 0)


def load_a_module() -> int:
    """init_module(2): code of one's own in the kernel."""
    return syscall("init_module", b"\x7fELF", 4, b"")


def another_kernel() -> int:
    """kexec_load(2)."""
    return syscall("kexec_load", 0, 1 << 40, 0, 0)


def restart_the_host() -> int:
    """reboot(2); the magic number is wrong, so it does nothing."""
    return syscall("reboot", 1, 2, 3, 0)


def swap_from_a_file() -> int:
    """swapon(2): the memory of all processes comes from a file of ours."""
    return syscall("swapon", NOWHERE.encode(), 0)


def accounting() -> int:
    """acct(2): the kernel writes a record of each process that ends, where we say."""
    return syscall("acct", NOWHERE.encode())


def set_the_clock() -> int:
    """clock_settime(2): the clock is everybody's; the time is impossible, so it stays."""
    return syscall("clock_settime", 0, struct.pack("qq", 0, -1))


def host_name() -> int:
    """sethostname(2); the length is impossible."""
    return syscall("sethostname", b"x", 1 << 20)


def ports_of_the_machine() -> int:
    """iopl(2): input and output instructions, that is the whole machine."""
    return syscall("iopl", 3)


def kernel_log() -> int:
    """syslog(2), SYSLOG_ACTION_READ_ALL: addresses of the kernel and the other tenants' accidents."""
    return syscall("syslog", 3, ctypes.create_string_buffer(4096), 4096)


def quota() -> int:
    """quotactl(2): limits of other users on the shared disk."""
    return syscall("quotactl", 0x80000100, NOWHERE.encode(), 0, 0)


def watch_all_files() -> int:
    """fanotify_init(2): every file that anybody opens."""
    return syscall("fanotify_init", 0, 0)


def compare_kernel_objects() -> int:
    """kcmp(2): the order of kernel pointers."""
    return syscall("kcmp", os.getpid(), os.getpid(), 1, 0, 0)


def session_keyring() -> int:
    """keyctl(2), KEYCTL_GET_KEYRING_ID: keyrings are not namespaced, see test_keyrings (CVE-2016-0728,
    CVE-2022-0847)."""
    return syscall("keyctl", 0, -3, 0)


def add_a_key() -> int:
    """add_key(2) to the session's keyring."""
    return syscall("add_key", b"user", b"insula-escape", b"x", 1, -3)


def request_a_key() -> int:
    """request_key(2): the kernel asks a program of the host's, /sbin/request-key, for what it doesn't find."""
    return syscall("request_key", b"user", b"insula-no-such-key", None, 0)


def hypervisor_socket() -> int:
    """AF_VSOCK: to services of the hypervisor and of other guests; no network namespace holds it."""
    return socket.socket(40, socket.SOCK_STREAM).detach()


def hypervisor_socket_in_disguise() -> int:
    """The hypervisor's socket, with upper bits that the kernel ignores and a careless filter doesn't."""
    libc = ctypes.CDLL(None, use_errno=True)
    made = int(libc.syscall(41 if os.uname().machine == "x86_64" else 198, ctypes.c_ulong(1 << 32 | 40), 1, 0))
    if made < 0:
        raise OSError(ctypes.get_errno(), "socket")
    return made


def cryptography_socket() -> int:
    """AF_ALG: the kernel's cryptography, 2009's code for everybody (CVE-2019-8912)."""
    return socket.socket(38, socket.SOCK_SEQPACKET).detach()


def packet_socket() -> int:
    """AF_PACKET: its rings are memory of the kernel that no control group is charged for (CVE-2020-14386 was in it)."""
    return socket.socket(17, socket.SOCK_RAW, 0).detach()


def express_data_path() -> int:
    """AF_XDP: the same with other rings."""
    return socket.socket(44, socket.SOCK_RAW, 0).detach()


def smc_by_another_name() -> int:
    """IPPROTO_SMC of AF_INET is AF_SMC, a module with RDMA behind it."""
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM, 256).detach()


def iscsi_by_netlink() -> int:
    """A socket of NETLINK_ISCSI loads the module scsi_transport_iscsi (CVE-2021-27363 to 27365)."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 8).detach()


def filter_on_a_socket() -> int:
    """SO_ATTACH_FILTER: machine code of the kernel, bounded for the whole host (net.core.bpf_jit_limit)."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0xFFFF))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HxxxxxxQ", 1, ctypes.addressof(program)))
    return 1


def key_of_a_connection() -> int:
    """TCP_MD5SIG: each socket may have 128 KiB of keys, which no control group is charged for."""
    peer = struct.pack("H2x4s120x", socket.AF_INET, bytes((192, 0, 2, 1)))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, 14, peer + struct.pack("BBHi80s", 0, 0, 4, 0, b"abcd"))
    return 1


def flow_label() -> int:
    """IPV6_FLOWLABEL_MGR: 4096 for the whole host, of which users without CAP_NET_ADMIN may take three quarters."""
    request = struct.pack("16s4sBBHHH4x", bytes(15) + b"\x01", bytes(4), 0, 255, 3, 0, 6)  # GET, any, for CREATE | EXCL
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(41, 32, request)
    return 1


def asynchronous_io() -> int:
    """io_setup(2): its events are taken from the host's (fs.aio-max-nr), 65536 of which one process can have."""
    return syscall("io_setup", 1, (ctypes.c_char * 8)())


def page_cache() -> int:
    """mincore(2): which pages of a file in a shared image layer have been read, by whomever."""
    fd = os.open("/proc/self/exe", os.O_RDONLY)
    page = mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return syscall("mincore", address, mmap.PAGESIZE, (ctypes.c_char * 1)())


def no_random_addresses() -> int:
    """personality(ADDR_NO_RANDOMIZE): a set-uid program at known addresses."""
    return syscall("personality", 0x0040000)


def mount_by_32_bits() -> int:
    """mount(2) by `int 0x80`: the call table of 32-bit x86 has other numbers, which a 64-bit filter doesn't know."""
    if os.uname().machine != "x86_64":
        raise OSError(38, "no such instruction")
    # push rbx; mov eax, 21; xor ebx, ecx, edx, esi, edi; int 0x80; pop rbx; ret
    code = b"\x53\xb8\x15\0\0\0\x31\xdb\x31\xc9\x31\xd2\x31\xf6\x31\xff\xcd\x80\x5b\xc3"
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    result = ctypes.CFUNCTYPE(ctypes.c_int32)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    if result < 0:
        raise OSError(-result, "mount")
    return int(result)


def unshare_by_x32() -> int:
    """unshare(CLONE_NEWUSER) of the x32 ABI: the same number with bit 30 set, which a naive filter doesn't compare."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(NUMBERS["unshare"] | 0x40000000), ctypes.c_ulong(CLONE_NEWUSER)) < 0:
        raise OSError(ctypes.get_errno(), "unshare")
    return 0


def device_of(path: str) -> int:
    """The number of its file system."""
    return os.stat(path).st_dev


def handle_of(path: str) -> str:
    """The handle of a file from name_to_handle_at(2), in hexadecimal: its file system's own identifier of an inode."""
    handle = bytearray(struct.pack("Ii", 128, 0) + bytes(128))
    syscall("name_to_handle_at", -100, path.encode(), (ctypes.c_char * len(handle)).from_buffer(handle), bytes(4), 0)
    return handle.hex()


def file_by_handle(handle: str, place: str) -> str:
    """open_by_handle_at(2), "Shocker": a file by its inode's number, if any file of its file system is in reach."""
    fd = syscall("open_by_handle_at", os.open(place, os.O_RDONLY), bytes.fromhex(handle), os.O_RDONLY)
    with os.fdopen(fd) as file:
        return file.read(100)


Call = Callable[[], int]
REFUSED: list[Call] = [
    bpf_map, perf_event, io_uring, userfault, mount_tmpfs, uncover, file_system_context, clone_of_a_mount,
    mount_attributes, another_root, user_namespace, user_namespace_by_clone, user_namespace_by_clone3, mount_namespace,
    join_a_namespace, load_a_module, another_kernel, restart_the_host, swap_from_a_file, accounting, set_the_clock,
    host_name, ports_of_the_machine, kernel_log, quota, watch_all_files, compare_kernel_objects, session_keyring,
    add_a_key, request_a_key, hypervisor_socket, hypervisor_socket_in_disguise, cryptography_socket,
    packet_socket, express_data_path, smc_by_another_name, iscsi_by_netlink, filter_on_a_socket, asynchronous_io,
    page_cache, key_of_a_connection, flow_label,
    no_random_addresses, mount_by_32_bits, unshare_by_x32,
]  # fmt: skip
