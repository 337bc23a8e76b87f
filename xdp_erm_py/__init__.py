"""xdp-erm: strips HP ERM from mirrored traffic in XDP, before AF_PACKET's fanout sees it."""

__version__ = "0.1.0"
