#!/bin/sh
# Becomes systemd, as process 1 of fresh mount, PID, network, cgroup, IPC and UTS namespaces (unshare(1)) that it is run
# in. It sees the machine's files, but /etc, /run, /dev and /sys are its own, /proc/sys is read-only, and it knows no
# unit, udev rule or generator of the machine but those named here.
set -eu

mount --make-rprivate /
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup

mount -t tmpfs tmpfs /run
mkdir -p /run/boot/dev /run/boot/etc /run/boot/work /run/boot/rules /run/boot/generators /run/boot/units
mount -t overlay -o lowerdir=/etc,upperdir=/run/boot/etc,workdir=/run/boot/work overlay /etc
rm -f /etc/xdp-erm.yaml
mkdir -p /etc/systemd/system /etc/systemd/journald.conf.d /etc/udev/rules.d
mount -t tmpfs tmpfs /etc/systemd/system
printf '[Journal]\nStorage=volatile\n' >/etc/systemd/journald.conf.d/volatile.conf

for node in null zero full random urandom tty; do
    : >/run/boot/dev/$node
    mount --bind /dev/$node /run/boot/dev/$node
done
mount --rbind /run/boot/dev /dev

mkdir /run/udev
: >/run/udev/control  # systemd listens to udev only where it finds this, or a devtmpfs on /dev
mount -t tmpfs tmpfs /etc/udev/rules.d
cp /lib/udev/rules.d/99-systemd.rules /run/boot/rules  # makes device units
mount --bind /run/boot/rules /lib/udev/rules.d

units=/run/boot/units
stock=/lib/systemd/system
for unit in basic.target multi-user.target sysinit.target sockets.target shutdown.target umount.target; do
    cp $stock/$unit $units
done
mkdir $units/sockets.target.wants $units/sysinit.target.wants
for unit in systemd-journald.socket systemd-journald-dev-log.socket systemd-udevd-control.socket \
        systemd-udevd-kernel.socket; do
    cp $stock/$unit $units
    ln -s ../$unit $units/sockets.target.wants
done
for unit in systemd-journald.service systemd-udevd.service; do
    cp $stock/$unit $units
    ln -s ../$unit $units/sysinit.target.wants
done
ln -s basic.target $units/default.target

exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/systemd/generator:$units \
    SYSTEMD_GENERATOR_PATH=/run/boot/generators SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/run/boot/none \
    /lib/systemd/systemd --system
