/* bcc carries the kernel's BPF interface with it. */
#include <bcc/bpf.h>
