"""The initramfs of domain 0, and that of a guest, from busybox and modules. Called by scripts/xen:

python -m tests.xen.initramfs first|guest MODULES BUSYBOX MODULE…
"""

from __future__ import annotations

import sys
from pathlib import Path

from insula.machine.guest.cpio import CpioArchive
from insula.machine.guest.modules import Modules

FIRST = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for file in /modules/*; do /bin/busybox insmod "$file"; done
until [ -b /dev/vda ]; do /bin/busybox sleep 0.1; done
/bin/busybox mount -t ext4 /dev/vda /new
/bin/busybox mount -o move /dev /new/dev
exec /bin/busybox switch_root /new /sbin/domain0
"""
GUEST = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
for file in /modules/*; do $b insmod "$file"; done
$b ip link set lo up
$b ip address add "$address" dev eth0
$b ip link set eth0 up
$b mkdir /www
until [ -b /dev/xvda ]; do $b sleep 0.1; done
{
    $b cat /sys/hypervisor/type /sys/hypervisor/guest_type
    $b dd if=/dev/xvda bs=64 count=1 2>/dev/null
    $b cat /proc/sys/kernel/osrelease
} >/www/index.html
echo "the guest is up" >/dev/hvc0
exec $b httpd -f -p 80 -h /www
"""
OFF = "#!/bin/busybox sh\nexec /bin/busybox poweroff -f\n"
"""What Linux executes when the hypervisor asks it to turn itself off."""


def build(kind: str, modules: Path, busybox: Path, names: list[str]) -> bytes:
    archive = CpioArchive()
    archive.device("/dev/console", 5, 1)
    for directory in ("/proc", "/sys", "/new"):
        archive.directory(directory)
    archive.file("/bin/busybox", busybox.read_bytes(), 0o755)
    for number, (name, data) in enumerate(Modules(modules).in_order(names)):
        archive.file(f"/modules/{number:02}-{name}.ko", data)
    archive.file("/init", (FIRST if kind == "first" else GUEST).encode(), 0o755)
    archive.file("/sbin/poweroff", OFF.encode(), 0o755)
    return archive.finish()


if __name__ == "__main__":
    kind, modules, busybox, *names = sys.argv[1:]
    sys.stdout.buffer.write(build(kind, Path(modules), Path(busybox), names))
