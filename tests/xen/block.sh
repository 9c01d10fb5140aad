#!/bin/sh
# Stands for Xen's script /etc/xen/scripts/block, which executes some sixty programs for each disk: emulated, they take
# longer than the 40 seconds that libxl waits. A file gets a loop device, as there; that nobody else has it is not checked.
path=$XENBUS_PATH
case $1 in
    add)
        case $(xenstore-read "$path/mode") in w*) only= ;; *) only=-r ;; esac
        # shellcheck disable=SC2086  # none, or an option
        node=$(losetup -f --show $only "$(xenstore-read "$path/params")") || exit 1
        xenstore-write "$path/node" "$node" "$path/physical-device" "$(stat -L -c %t:%T "$node")" \
            "$path/physical-device-path" "$node" "$path/hotplug-status" connected
        ;;
    remove) losetup -d "$(xenstore-read "$path/node")" ;;
esac
