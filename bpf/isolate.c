/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * Keeps mirrored frames out of the sensor's own network stack. As a clsact ingress filter it runs behind the packet taps
 * (AF_PACKET: Zeek, tcpdump) and before everything else of the host: bridges, VLAN devices, ARP, IP. It takes the frames
 * that bpf/xdp_erm.c has marked; all others go on to the next filter.
 */
#define BPF_LICENSE Dual BSD/GPL

#include <linux/types.h>
#include "shared.h"

/* The verdicts of a classifier, uapi linux/pkt_cls.h. */
#define TC_ACT_UNSPEC (-1)
#define TC_ACT_SHOT 2

int isolate(struct __sk_buff *skb)
{
	u32 *mark = (void *)(long)skb->data_meta;

	if ((void *)(mark + 1) > (void *)(long)skb->data)
		return TC_ACT_UNSPEC;
	return *mark == MARK ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}
