#!/bin/sh
# What a tiny guest does at its start: an ear for the power button, a host name, an address by
# DHCP for each interface, and a line on the console that says so. busybox's init runs it once,
# before the shell.
hostname "$(cat /etc/hostname)"
mount -t tmpfs tmp /tmp
acpid -l /dev/null -p /tmp/acpid.pid
ip link set lo up
for path in /sys/class/net/e*; do
    [ -e "$path" ] || continue
    name=${path##*/}
    ip link set "$name" up
    udhcpc -b -S -t 5 -T 1 -i "$name" -s /etc/dhcp -x "hostname:$(hostname)" > /dev/null 2>&1
done
until [ -e /tmp/acpid.pid ]; do # what is pressed before that is lost
    usleep 10000
done
read -r uptime idle < /proc/uptime
echo "drivebay tiny guest is up: $(hostname), $uptime s after its start"
