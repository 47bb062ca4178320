#!/bin/busybox sh
# The guest's first process: loads the drivers, then serves two serial ports for ever.
#   ttyS0  kernel messages and a shell for people
#   ttyS1  commands from the host, one a line; see vm/guest_agent.py for the other side
# In:  base64 of a shell script, a newline.
# Out: once after each boot "ready UPTIME"; per command "done EXIT_CODE LENGTH", a newline,
#      and LENGTH bytes of what the script printed.
export PATH=/bin HOME=/ TERM=vt100 PS1='guest# '
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs dev /dev
busybox mount -t tmpfs tmp /tmp
while read -r module; do
    busybox insmod "/modules/$module"
done < /modules/order

serve() {
    busybox stty -F /dev/ttyS1 raw -echo
    exec < /dev/ttyS1 > /dev/ttyS1 2> /dev/ttyS0
    read -r uptime idle < /proc/uptime
    echo "ready $uptime"
    while read -r line; do
        echo "$line" | busybox base64 -d > /tmp/.command
        busybox sh /tmp/.command > /tmp/.output 2>&1 < /dev/null
        code=$?
        echo "done $code $(busybox stat -c %s /tmp/.output)"
        busybox cat /tmp/.output
    done
}
serve &

while true; do
    busybox setsid -c busybox sh -i < /dev/ttyS0 > /dev/ttyS0 2>&1
done
