"""Guests: their roots out of Debian's packages, kept in a cache, and QEMU that boots them with NICs on one bridge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

from xdp_erm_py.lab.namespace import Namespace

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache" / "nics"
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
TIMEOUT = 5400  # seconds for one guest: without KVM everything takes some ten times as long
KVM_SECONDS = 60  # in which a guest is up, where KVM works; there are machines on which it does not

#: The releases of Debian whose kernels are tried, by the first two numbers of these.
RELEASES = {"6.1": "bookworm", "6.12": "trixie"}
_PACKAGES = ("linux-image-amd64", "initramfs-tools", "kmod", "iproute2", "python3-bpfcc", "python3-yaml",
             "python3-pyroute2", "python3-rich")
_QEMU_PACKAGES = ("qemu-system-x86", "qemu-utils", "seabios", "ipxe-qemu")
_DRIVERS = ("virtio_net", "igb", "vmxnet3", "e1000e", "e1000", "bonding", "8021q", "bridge", "veth")


class Nic(NamedTuple):
    """A NIC as QEMU is told of it."""

    device: str
    queues: int = 1

    def options(self, name: str, mac: str) -> list[str]:
        several = f",queues={self.queues}" if self.queues > 1 else ""
        return ["-netdev", f"tap,id={name},ifname=t{name},script=no,downscript=no,vhost=off{several}",
                "-device", f"{self.device},netdev={name},mac={mac}"]


_NO_OFFLOADS = "guest_tso4=off,guest_tso6=off,guest_ufo=off,guest_ecn=off"
#: By the name that the interface gets in the guest. `switch` is the mirroring switch's.
NICS = {
    "switch": Nic("virtio-net-pci"),
    "virtio": Nic("virtio-net-pci,mq=on,vectors=18", 8),
    "virtio-one": Nic("virtio-net-pci"),
    "virtio-big": Nic(f"virtio-net-pci,mrg_rxbuf=off,{_NO_OFFLOADS}"),
    "virtio-fixed": Nic("virtio-net-pci,ctrl_guest_offloads=off"),
    "igb": Nic("igb"), "vmxnet3": Nic("vmxnet3"), "e1000e": Nic("e1000e"), "e1000": Nic("e1000"),
}

# The guest's first process: no more of an operating system is needed.
_INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
modprobe -a 9pnet_virtio 9p {drivers}
mkdir -p /share /xdp-erm
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 share /share
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,ro project /xdp-erm
cd /xdp-erm && PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/xdp-erm XDP_ERM_CACHE=/share/compiled \\
	/usr/bin/python3 -Xutf8 tests/nics/guest.py /share > /share/log 2>&1
sync
echo o > /proc/sysrq-trigger
sleep 60
"""


def mac(name: str) -> str:
    """The hardware address of a NIC, by which the guest knows it."""
    return f"52:54:00:00:01:{1 + list(NICS).index(name):02x}"


def prepare(kernel: str) -> None:
    """Makes what a guest with that kernel boots from, and QEMU, unless they are there."""
    _image(_guest(RELEASES[kernel]))
    _qemu("qemu-system-x86_64")


def run(kernel: str, wanted: list[str]) -> dict[str, Any]:
    """What the guest with that kernel says of each of the NICs. Its log and console stay in the cache."""
    share = CACHE / f"share-{kernel}"
    (share / "compiled").mkdir(parents=True, exist_ok=True)
    results = share / "results.json"
    (share / "wanted.json").write_text(json.dumps({"nics": {name: mac(name) for name in NICS}, "wanted": wanted}))
    root = _guest(RELEASES[kernel])
    linux = sorted(root.glob("boot/vmlinuz-*"))[-1]
    command = [
        *_qemu("qemu-system-x86_64"), "-machine", "q35", "-cpu", "max", "-smp", "2", "-m", "2048", "-display", "none",
        "-monitor", "none", "-no-reboot", "-serial", f"file:{share / 'console'}", "-kernel", str(linux),
        "-initrd", str(linux).replace("vmlinuz", "initrd.img"),
        "-append", "root=/dev/vda rw console=ttyS0 net.ifnames=0 mitigations=off panic=-1 init=/init-nics",
        "-drive", f"file={_image(root)},if=virtio,format=raw,snapshot=on",
        "-virtfs", f"local,path={share},mount_tag=share,security_model=none,multidevs=remap",
        "-virtfs", f"local,path={REPOSITORY},mount_tag=project,security_model=none,multidevs=remap,readonly=on",
        *(word for name, nic in NICS.items() for word in nic.options(name, mac(name)))]
    accelerators = ["kvm", "tcg,thread=multi"] if os.access("/dev/kvm", os.W_OK) else ["tcg,thread=multi"]
    namespace = Namespace()
    try:
        with namespace.entered():
            _bridge()
            for accelerator in accelerators:
                for name in ("log", "results.json"):
                    (share / name).unlink(missing_ok=True)
                _boot([*command, "-accel", accelerator], share, KVM_SECONDS if accelerator == "kvm" else TIMEOUT)
                if results.exists():
                    break
    finally:
        namespace.close()
    if not results.exists():
        raise SystemExit(f"the guest with Linux {kernel} says nothing: see {share / 'console'} and {share / 'log'}")
    found: dict[str, Any] = json.loads(results.read_text())
    return found


def _boot(command: list[str], share: Path, patience: float) -> None:
    """Runs a guest to its end, unless it has not begun to write its log in so many seconds."""
    with (share / "qemu").open("w") as output, \
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as qemu:
        deadline = time.monotonic() + patience
        while qemu.poll() is None:
            if time.monotonic() > deadline:
                if not (share / "log").exists():
                    qemu.kill()
                    return
                deadline = time.monotonic() + TIMEOUT
            time.sleep(1)


def _bridge() -> None:
    """In the thread's network namespace: taps for all NICs on one bridge."""
    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    ip("link", "add", "name", "bridge", "type", "bridge", "mcast_snooping", "0", "forward_delay", "0")
    ip("link", "set", "dev", "bridge", "mtu", "9600", "up")
    for filtered in Path("/proc/sys/net/bridge").glob("bridge-nf-call-*"):
        filtered.write_text("0")  # it would cut the padding off
    for name, nic in NICS.items():
        several = ["multi_queue"] if nic.queues > 1 else []
        ip("tuntap", "add", "dev", f"t{name}", "mode", "tap", "vnet_hdr", *several)
        ip("link", "set", "dev", f"t{name}", "mtu", "9600", "txqueuelen", "20000", "master", "bridge", "up")


def _guest(release: str) -> Path:
    root = _root(release, release, _PACKAGES)
    init, text = root / "init-nics", _INIT.format(drivers=" ".join(_DRIVERS))
    if not init.exists() or init.read_text() != text:  # else the disk can stay as it is
        init.write_text(text)
        init.chmod(0o755)
    return root


def _root(name: str, release: str, packages: tuple[str, ...]) -> Path:
    """A file system with these packages of a release of Debian."""
    root = CACHE / name
    ready = root / "ready"
    if not ready.exists():
        print(f"making {root} (minutes)", flush=True)
        shutil.rmtree(root, ignore_errors=True)
        root.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["debootstrap", "--variant=minbase", release, str(root), MIRROR], check=True,
                       stdout=subprocess.DEVNULL)
        subprocess.run(["chroot", str(root), "apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages],
                       check=True, stdout=subprocess.DEVNULL, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
        ready.touch()
    return root


def _image(root: Path) -> Path:
    """The root as a disk, made anew where something in it is newer."""
    image = root.with_suffix(".ext4")
    if not image.exists() or image.stat().st_mtime < (root / "init-nics").stat().st_mtime:
        image.unlink(missing_ok=True)
        subprocess.run(["truncate", "-s", "6G", str(image)], check=True)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(root), str(image)], check=True)
    return image


def _qemu(command: str) -> list[str]:
    """QEMU with igb (version 8): the machine's, else that of Debian 13, run in place with its own libraries."""
    own = shutil.which(command)
    if own and '"igb"' in subprocess.run([own, "-device", "help"], stdout=subprocess.PIPE, text=True).stdout:
        return [own]
    root = _root("qemu", "trixie", _QEMU_PACKAGES)
    libraries = root / "usr/lib/x86_64-linux-gnu"
    return ["env", f"QEMU_MODULE_DIR={libraries}/qemu", str(root / "lib64/ld-linux-x86-64.so.2"), "--library-path",
            str(libraries), str(root / "usr/bin" / command),
            *(word for place in ("qemu", "seabios") for word in ("-L", str(root / "usr/share" / place))),
            "-L", str(root / "usr/lib/ipxe/qemu")]
