#!/bin/busybox sh
# The first process of a tiny guest (vm/images/tiny.py), from its initramfs: loads the drivers,
# finds the disk's root partition and hands over to busybox's init there.
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs dev /dev
while read -r module; do
    busybox insmod "/modules/$module"
done < /modules/order

read -r line < /proc/cmdline
for word in $line; do
    case $word in root=*) wanted=${word#root=} ;; esac
done
for attempt in 0 1 2 3 4 5 6 7 8 9; do
    root=$(busybox findfs "$wanted" 2> /dev/null) && break
    busybox sleep 1
done
if ! busybox mount -t ext4 "$root" /mnt; then
    echo "no disk has the root file system $wanted; a shell to look for it:"
    exec busybox sh < /dev/ttyS0 > /dev/ttyS0 2>&1
fi
for folder in proc sys dev; do
    busybox mount -o move "/$folder" "/mnt/$folder"
done
exec busybox switch_root /mnt /sbin/init
