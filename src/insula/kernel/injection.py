"""Packet injection: make a network device receive an Ethernet frame.

A frame written to a packet socket *leaves* through a device. An injected frame *arrives* at it: the kernel processes it
with all filters of the device, as if the other end had sent it, and the other end sees nothing.

This is done by an eBPF program that calls bpf_clone_redirect() with BPF_F_INGRESS (bpf-helpers(7)). BPF_PROG_TEST_RUN
runs it with the frame as its packet, so nothing is attached to any device. Needs Linux 5.2.
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
    """The loaded program. Its methods may be called from any thread. OSError if the kernel refuses the program."""

    def __init__(self) -> None:
        self._program = descriptors.move_above_select_limit(
            ebpf_load.load(_program(), ebpf_load.PROG_TYPE_SCHED_CLS, "insula_inject")
        )

    def close(self) -> None:
        os.close(self._program)

    def __enter__(self) -> Injector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def inject(self, index: int, frame: bytes) -> None:
        """Inject an Ethernet frame into the device with that index in the calling thread's network namespace.

        OSError: ENODEV if there is no such device, ENETDOWN if it drops the frame because it is down.
        """
        answer = ebpf_load.run(self._program, frame, struct.pack(f"={_IFINDEX}xI", index))
        if answer:
            number = errno.ENETDOWN if answer > 0 else -answer
            raise OSError(number, os.strerror(number))


def _program() -> bytes:
    """return bpf_clone_redirect(packet, packet->ifindex, BPF_F_INGRESS): 0, NET_RX_DROP (1) or -errno."""
    code = Assembler()
    code.load32(2, 1, _IFINDEX)
    code.move(3, _INGRESS)
    code.call(_CLONE_REDIRECT)
    code.exit()
    return code.assemble()
