"""Domain 0 of Xen, in a QEMU that emulates the processor. scripts/xen makes it; tests/xen/domain0.sh is process 1."""

from __future__ import annotations

import shlex

from tests.support.guest import Guest

XEN_OPTIONS = "dom0_mem=768M,max:768M dom0_max_vcpus=1 console=com1 com1=115200 noreboot loglvl=warning"
KERNEL_OPTIONS = "console=hvc0 panic=-1 quiet rdinit=/init net.ifnames=0"


class Domain0(Guest):
    """As `Guest`, with Xen below it. QEMU loads Xen by the multiboot specification, and Xen its first two modules: the
    kernel of domain 0, with its command line, and the initramfs."""

    def _options(self, agent: int) -> str:
        kernel = f"{self._directory}/kernel {KERNEL_OPTIONS}".replace(",", ",,")
        return f"""
            -nodefaults -no-user-config -machine pc -accel tcg,thread=multi -cpu Nehalem -smp 2
            -m 1536M -no-reboot
            -kernel {self._directory}/xen -append {shlex.quote(XEN_OPTIONS)}
            -initrd {shlex.quote(f"{kernel},{self._directory}/initrd")}
            {self._devices(agent)}
        """
