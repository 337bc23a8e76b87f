"""The XDP program before it is on an interface: compiled from bpf/, and written once more in plain Python."""
