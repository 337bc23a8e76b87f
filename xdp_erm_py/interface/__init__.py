"""An interface with the program on it: attached, prepared, isolated, spread over CPUs, read."""
