#!/bin/busybox sh
# What `drivebay demo` lets its guest do; run by init's command port.
#   demo.sh table        print the disks as the kernel sees them
#   demo.sh work MIB     on an empty disk: write MIB of random data and a marker with its sum;
#                        on a disk with the marker (the second boot): read the data again
# The last line of `work` is "written SUM", "same SUM" or "different SUM".
disk=/dev/vda
mark=drivebay-demo

table() {
    row='%-5s %9s  %-20s %6s %5s  %-13s %-10s %s\n'
    printf "$row" NAME SIZE SERIAL QUEUES BLOCK CACHE SCHEDULER DISCARD
    for dir in /sys/block/vd*; do
        queue=$dir/queue
        scheduler=$(sed 's/.*\[\(.*\)\].*/\1/' "$queue/scheduler")
        discard=yes
        [ "$(cat "$queue/discard_max_bytes")" = 0 ] && discard=no
        printf "$row" "${dir##*/}" "$(($(cat "$dir/size") / 2048)) MiB" "$(cat "$dir/serial")" \
            "$(ls "$dir/mq" | wc -l)" "$(cat "$queue/logical_block_size")" \
            "$(cat "$queue/write_cache")" "$scheduler" "$discard"
    done
}

first_boot() {
    dd if=/dev/urandom of=/tmp/data bs=1M count="$1" 2> /dev/null || exit 1
    set -- "$1" $(sha256sum /tmp/data)
    dd if=/tmp/data of="$disk" bs=1M seek=1 conv=fsync,notrunc 2> /tmp/dd || { cat /tmp/dd; exit 1; }
    echo "$mark $1 $2" | dd of="$disk" bs=512 conv=sync,fsync,notrunc 2> /tmp/dd ||
        { cat /tmp/dd; exit 1; }
    sync
    rm /tmp/data
    echo "written $2"
}

second_boot() {
    # $1 is the marker, $2 the length in MiB and $3 the sum, all as they were on the disk
    mib=$2
    sum=$3
    set -- $(dd if="$disk" bs=1M skip=1 count="$mib" 2> /dev/null | sha256sum)
    if [ "$1" = "$sum" ]; then
        echo "same $1"
    else
        echo "different $1"
    fi
}

case $1 in
table)
    table
    ;;
work)
    found=$(dd if="$disk" bs=512 count=1 2> /dev/null | tr -d '\0')
    case $found in
    "$mark "*) second_boot $found ;;
    *) first_boot "$2" ;;
    esac
    ;;
esac
