#!/bin/busybox sh
# PID 1 of every guest until the agent takes over: loads modules, mounts the root file system, puts the agent on /run
# and becomes it. What it prints is only seen when something fails; then the guest reboots, which ends the VMM
# (reboot=k). Disks: vda root image; vdb scratch disk (role vm) or data disk (role machine, which its agent mounts).
# Kernel parameters: fcvm.role=vm|machine, fcvm.debug prints the uptime at each step.

fail() {
    echo "fcvm: init: $1" >/dev/console
    /bin/busybox sync
    exec /bin/busybox reboot -f
}

step() {
    [ -z "$debug" ] || { read -r now _ </proc/uptime; echo "fcvm: init: $now $1" >/dev/console; }
}

disk() { # wait for a disk whose driver is still probing; normally it is there at once
    tries=0
    until [ -b "$1" ]; do
        tries=$((tries + 1))
        [ $tries -lt 500 ] || fail "$1 did not appear"
        /bin/busybox usleep 10000
    done
}

/bin/busybox mount -t devtmpfs devtmpfs /dev || fail "cannot mount /dev"
/bin/busybox mount -t proc proc /proc || fail "cannot mount /proc"
/bin/busybox mount -t sysfs sysfs /sys || fail "cannot mount /sys"

role=vm
debug=
read -r cmdline </proc/cmdline
for word in $cmdline; do
    case $word in
    fcvm.role=*) role=${word#*=} ;;
    fcvm.debug) debug=1 ;;
    esac
done
step "started"

while read -r module; do
    /bin/busybox insmod "/modules/$module" || echo "fcvm: init: cannot load $module" >/dev/console
done </modules/order
step "modules loaded"

disk /dev/vda
/bin/busybox mount -t erofs -o ro,noatime /dev/vda /lower || fail "cannot mount the root image /dev/vda"
# Firecracker's block device takes one segment a request, and a request costs more than what it carries: ask for much at
# a time, and have the 45 MB that Podman starts from read while this CPU does the rest. Emulated: 3000 requests to 1800.
echo 2048 >/sys/block/vda/queue/read_ahead_kb
[ "$role" != vm ] || /bin/busybox cat /lower/usr/bin/podman >/dev/null &

case $role in
vm)
    disk /dev/vdb
    # noinit_itable: nobody needs inode tables zeroed on a disk that ends with its VM; it took 3000 writes in the background
    /bin/busybox mount -t ext4 -o rw,noatime,noinit_itable /dev/vdb /scratch || fail "cannot mount the scratch disk /dev/vdb"
    ;;
machine)
    for cpu in /sys/devices/system/cpu/cpu*/online; do # see MACHINE in fcvm/setup/kernel.py
        echo 1 >"$cpu"
    done
    step "all CPUs started"
    /bin/busybox mount -t tmpfs -o mode=755 tmpfs /scratch || fail "cannot mount a tmpfs"
    ;;
*) fail "unknown fcvm.role=$role" ;;
esac
/bin/busybox mkdir -p /scratch/root/upper /scratch/root/work /scratch/containers
/bin/busybox mount -t overlay -o noatime,lowerdir=/lower,upperdir=/scratch/root/upper,workdir=/scratch/root/work \
    overlay /root || fail "cannot mount the overlay on /"
step "root mounted"

# The image has all these directories. Podman's storage must not sit on the overlay.
/bin/busybox mount --move /scratch /root/scratch || fail "cannot move /scratch"
if [ "$role" = vm ]; then
    /bin/busybox mount --bind /root/scratch/containers /root/var/lib/containers || fail "cannot bind /var/lib/containers"
fi
/bin/busybox mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs /root/run || fail "cannot mount /run"
/bin/busybox mkdir /root/run/fcvm
/bin/busybox cp /fc_agent.pyz /root/run/fcvm/fc_agent.pyz || fail "cannot copy the agent"
for directory in dev proc sys; do
    /bin/busybox mount --move /$directory /root/$directory || fail "cannot move /$directory"
done
[ -z "$debug" ] || { read -r now _ </root/proc/uptime; echo "fcvm: init: $now starting the agent" >/root/dev/console; }
exec /bin/busybox switch_root -c /dev/console /root /usr/bin/python3 -ISE /run/fcvm/fc_agent.pyz
