#!/bin/sh
# Process 1 of domain 0: what Xen needs, libvirtd, a bridge for guests, and the agent of the tests.
export PATH=/usr/lib/xen-4.17/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -o remount,rw /
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mkdir -p /dev/pts /dev/shm /run/lock /run/xen /run/libvirt /var/lib/xenstored /var/lib/xen /var/log/xen /var/log/libvirt
# scripts of Xen lock files by /dev/stdin, and wait for ever without it
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
for module in virtio_console xenfs xen_privcmd xen_evtchn xen_gntdev xen_gntalloc xen_netback xen_blkback loop bridge tun overlay; do
    modprobe "$module" || echo "domain 0: no module $module"
done
mount -t xenfs xenfs /proc/xen
hostname domain0
ip link set lo up
ip link add xenbr0 type bridge
ip address add 10.77.0.1/24 dev xenbr0
ip link set xenbr0 up
xenstored --pid-file /run/xen/xenstored.pid
xen-init-dom0
xenconsoled --pid-file=/run/xen/xenconsoled.pid
libvirtd -d
for name in /sys/class/virtio-ports/*/name; do
    [ "$(cat "$name")" != agent ] || port=/dev/$(basename "$(dirname "$name")")
done
while :; do
    /sbin/guest-agent "$port"
    sleep 1
done
