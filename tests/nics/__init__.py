"""xdp-erm on drivers of real NICs, which QEMU emulates, in guests with the kernels of distributions (`make nics`)."""
