"""What the kernel offers: bpf(2), rtnetlink, sysfs, capabilities. Nothing here knows of mirrored traffic."""
