"""The kernel inside of a bzImage: the ELF file that a hypervisor can enter directly.

Linux on x86 is installed as a *bzImage*: a small program that unpacks the kernel proper, which is compressed behind it,
and jumps into it. A BIOS needs that program. A hypervisor can do without: it loads the unpacked kernel, an ELF file
called vmlinux, and enters it at the address of its PVH note, in 32-bit mode with a structure that lists memory, initrd
and command line (the start info of Xen's PVH boot protocol, which QEMU speaks for `-kernel` too). This is
*para-virtualized* boot: the guest knows that it is one.

The header of a bzImage tells where the compressed kernel is (Documentation/arch/x86/boot.rst of Linux, `payload_offset`
and `payload_length`, since protocol 2.08), so nothing is searched for.
"""

from __future__ import annotations

import lzma
import struct
import subprocess
import zlib

_SETUP_SECTORS = 0x1F1
_MAGIC = 0x202
_VERSION = 0x206
_PAYLOAD = struct.Struct("<II")
_PAYLOAD_AT = 0x248
_SECTOR = 512
_TIMEOUT = 60
_TOOLS = {b"\x28\xb5\x2f\xfd": "zstd", b"\x02\x21\x4c\x18": "lz4"}
"""Formats that the standard library has no module for, and the programs that unpack them."""
ELF = b"\x7fELF"


def vmlinux(image: bytes) -> bytes:
    """The ELF file in the bzImage `image`. ValueError if it is none, or is compressed in a way that is not known here;
    OSError if the program that unpacks it is not installed."""
    if len(image) < _PAYLOAD_AT + _PAYLOAD.size or image[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise ValueError("it is no bzImage")
    if struct.unpack_from("<H", image, _VERSION)[0] < 0x208:
        raise ValueError("its boot protocol is older than 2.08")
    offset, length = _PAYLOAD.unpack_from(image, _PAYLOAD_AT)
    begin = ((image[_SETUP_SECTORS] or 4) + 1) * _SECTOR + offset
    if begin + length > len(image):
        raise ValueError("it is cut off")
    kernel = _unpacked(image[begin : begin + length])
    if not kernel.startswith(ELF):
        raise ValueError("what it has inside is no ELF file")
    return kernel


def _unpacked(payload: bytes) -> bytes:
    """The kernel, without the four bytes with its size that follow formats which don't have it themselves."""
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(31).decompress(payload)
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(payload)
    tool = _TOOLS.get(payload[:4])
    if tool is None:
        raise ValueError(f"it is compressed in a way that is not known: {payload[:4].hex()}")
    done = subprocess.run([tool, "-dc"], input=payload[:-4], capture_output=True, timeout=_TIMEOUT)
    if done.returncode:
        raise ValueError(f"{tool} can't unpack it: {done.stderr.decode(errors='replace').strip()[-200:]}")
    return done.stdout
