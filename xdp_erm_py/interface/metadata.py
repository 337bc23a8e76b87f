"""Whether the mark that isolation needs can travel beside a frame: XDP metadata, which not every driver has."""

from __future__ import annotations

from ..kernel import sysfs, version
from ..kernel.links import Link, Links
from . import topology

#: Drivers that are known to hand a native program's metadata on with the frame, and since which Linux; (0, 0): any that
#: xdp-erm runs on. Their sources say so: they let a program have metadata (the last argument of xdp_prepare_buff()) and
#: give it to the frame that it has passed (skb_metadata_set()). mlx4 does the former only, and the mark is lost. mvpp2
#: has it since Linux 6.15, but passed frames on as if a program had taken nothing off them until far later.
_DRIVERS: dict[str, tuple[int, int]] = {
    "bnxt_en": (6, 12), "fbnic": (6, 18), "fsl_dpa": (6, 12), "i40e": (0, 0), "ice": (0, 0), "igb": (0, 0),
    "igc": (0, 0), "ixgbe": (0, 0), "ixgbevf": (0, 0), "mlx5_core": (5, 18), "nfp": (0, 0), "virtio_net": (0, 0),
}
#: Kinds of virtual interfaces with native XDP that have not always had it. Others have it, or no native XDP.
_KINDS: dict[str, tuple[int, int]] = {"tun": (6, 15)}


def lacking(links: Links, link: Link) -> str | None:
    """The driver, of the interface or of one below it that its frames come from, which is not known to hand on what a
    native program marks; None: they all do."""
    for each in (link, *topology.below(links, link)):
        driver = sysfs.driver(each)
        since = _KINDS.get(each.kind or "", (0, 0)) if driver is None else _DRIVERS.get(driver)
        if since is None or version.running() < since:
            where = "" if each == link else f" of {each.name}"
            return f"{driver or each.kind}{where}" + (f" before Linux {since[0]}.{since[1]}" if since else "")
    return None
