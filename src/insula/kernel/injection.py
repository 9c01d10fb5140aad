"""Frames that a network device of ours receives although nobody sent them: injection.

A frame that a process writes to a packet socket leaves by a device, and the device's other end sees it. Here it
arrives: the kernel handles the frame as if the other end had sent it, with every filter of the device, and the other
end sees nothing. An eBPF program does this (bpf_clone_redirect() with BPF_F_INGRESS, bpf-helpers(7)). It is run by
BPF_PROG_TEST_RUN with the frame as its packet, so nothing is attached to any device and nothing is left behind.
Linux 5.2 or later.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Final

from insula.kernel import descriptors
from insula.kernel.ebpf import load as ebpf_load
from insula.kernel.ebpf.assembler import Assembler

_CLONE_REDIRECT: Final = 13  # enum bpf_func_id
_INGRESS: Final = 1  # BPF_F_INGRESS
_IFINDEX: Final = 40  # offset of `ifindex` in struct __sk_buff


class Injector:
    """The program, loaded. Its methods may be called from any thread. OSError if the kernel refuses it."""

    def __init__(self) -> None:
        self._program = descriptors.high(ebpf_load.load(_program(), ebpf_load.PROG_TYPE_SCHED_CLS, "insula_inject"))

    def close(self) -> None:
        os.close(self._program)

    def __enter__(self) -> Injector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def inject(self, index: int, frame: bytes) -> None:
        """Have the device with that index, in the calling thread's network namespace, receive an Ethernet frame.

        ENODEV if there is no such device, ENETDOWN if it doesn't take the frame because it is down.
        """
        answer = ebpf_load.run(self._program, frame, struct.pack(f"={_IFINDEX}xI", index))
        if answer:
            number = errno.ENETDOWN if answer > 0 else -answer
            raise OSError(number, os.strerror(number))


def _program() -> bytes:
    """bpf_clone_redirect(packet, packet->ifindex, BPF_F_INGRESS): its answer, 0, NET_RX_DROP (1) or -errno."""
    code = Assembler()
    code.load32(2, 1, _IFINDEX)
    code.move(3, _INGRESS)
    code.call(_CLONE_REDIRECT)
    code.exit()
    return code.assemble()
