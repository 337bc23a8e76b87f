/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * Runs on each CPU that bpf/xdp_erm.c hands decapsulated frames to, and counts them there. What was steered to a CPU and
 * has not arrived was dropped because its queue was full, or still waits in it: the kernel itself tells of drops only by
 * a tracepoint, to whoever listens at the time.
 */
#define BPF_LICENSE Dual BSD/GPL

#include <linux/types.h>

/* Each CPU has its own value. */
BPF_PERCPU_ARRAY(arrived, u64, 1);

int arrive(struct xdp_md *ctx)
{
	u32 zero = 0;
	u64 *frames = arrived.lookup(&zero);

	if (frames)
		++*frames;
	return XDP_PASS;
}
