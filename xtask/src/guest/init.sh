#!/bin/busybox sh
# The guest's first process. Mounts the host's root file system read-only with a scratch layer on top, loads the
# modules, hands over to /out/.guest/main.sh within that root, reports how it ended, and powers off.
#
# ttyS0 is the kernel's console. ttyS1 carries the program's output and the markers which xtask looks for; the kernel
# writes nothing there. kvpush_nonce comes from the kernel command line.
b=/bin/busybox

marker() { $b echo "@@kvpush-guest $kvpush_nonce $*@@" >/dev/ttyS1; }

power_off() {
    # Setting a terminal waits until what was written to it has been sent.
    $b stty -F /dev/ttyS1 raw
    $b stty -F /dev/ttyS0 sane
    $b poweroff -f
    $b sleep 60
}

broken() {
    marker "broken $*"
    power_off
}

$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
$b stty -F /dev/ttyS1 raw

for module in $($b cat /modules/order); do
    $b insmod "/modules/$module" || broken "cannot load module $module"
done

nine="trans=virtio,version=9p2000.L,msize=512000"
$b mount -t 9p -o "$nine,cache=loose,ro" hostroot /host || broken "cannot mount the host's root"
$b mount -t tmpfs -o mode=755 scratch /scratch
$b mkdir /scratch/upper /scratch/work
$b mount -t overlay -o lowerdir=/host,upperdir=/scratch/upper,workdir=/scratch/work overlay /root ||
    broken "cannot lay a scratch layer over the host's root"

cd /root || broken "no root"
$b mkdir -p dev proc sys run tmp out
$b mount --bind /dev dev
$b mkdir -p dev/shm dev/pts
$b mount -t devpts devpts dev/pts
$b mount -t tmpfs -o mode=1777 shm dev/shm
$b mount -t proc proc proc
$b mount -t sysfs sysfs sys
$b mount -t tmpfs run run
$b mount -t 9p -o "$nine,cache=none" out out || broken "cannot mount the output folder"

$b chroot /root /bin/bash /out/.guest/main.sh </dev/null >/dev/ttyS1 2>&1
status=$?
$b echo "$status" >/root/out/.guest/status
marker "exit $status"
power_off
