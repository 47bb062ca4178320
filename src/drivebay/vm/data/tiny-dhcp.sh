#!/bin/sh
# What udhcpc calls for a tiny guest, with the lease in variables.
case $1 in
deconfig)
    ip addr flush dev "$interface"
    ;;
bound | renew)
    ip addr flush dev "$interface"
    ip addr add "$ip/$mask" dev "$interface"
    echo "$(hostname) has $ip/$mask" > /dev/console
    for gateway in $router; do
        ip route add default via "$gateway" dev "$interface" && break
    done
    for server in $dns; do
        echo "nameserver $server"
    done > /etc/resolv.conf
    ;;
esac
