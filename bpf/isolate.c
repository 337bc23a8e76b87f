/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * Keeps mirrored frames out of the sensor's own network stack. As a tcx program, or a filter of clsact on ingress, it runs
 * behind the packet taps (AF_PACKET: Zeek, tcpdump) and before everything else of the host: bridges, VLAN devices, ARP,
 * IP. It takes the frames that bpf/xdp_erm.c has marked, and counts them; all others go on.
 */
#define BPF_LICENSE Dual BSD/GPL

#include <linux/types.h>
#include "shared.h"
#include "mark.h"

/* The verdicts of a classifier, uapi linux/pkt_cls.h; those of tcx are the same. */
#define TC_ACT_UNSPEC (-1)
#define TC_ACT_SHOT 2

#define ETHERTYPE_8021Q 0x8100
#define ETHERTYPE_8021AD 0x88a8

struct taken {
	u64 frames;
	u64 outer_tagged;	/* of those, with the VLAN tag that the wrapping had had */
};

/* Each CPU has its own value. */
BPF_PERCPU_ARRAY(taken, struct taken, 1);

/*
 * Whether the kernel has another VLAN tag for the frame than the frame itself begins with, which the kernel has taken out
 * of it. It is one that has come beside the wrapped frame, which the program could not see, and taps take it for the
 * mirrored frame's.
 */
static __always_inline bool is_outer_tagged(struct __sk_buff *skb, __be32 type)
{
	u32 first = bpf_ntohl(type), ethertype = first >> 16;
	u32 inner = ethertype == ETHERTYPE_8021Q || ethertype == ETHERTYPE_8021AD ? first : 0;

	return skb->vlan_present && (bpf_ntohs(skb->vlan_proto) << 16 | skb->vlan_tci) != inner;
}

int isolate(struct __sk_buff *skb)
{
	struct mark *mark = (void *)(long)skb->data_meta;
	u32 zero = 0;
	struct taken *counted;

	if ((void *)(mark + 1) > (void *)(long)skb->data || mark->magic != MARK)
		return TC_ACT_UNSPEC;

	counted = taken.lookup(&zero);
	if (counted) {
		/* Those that GRO has merged, where somebody has turned it on again, are still so many. */
		u32 frames = skb->gso_segs ? skb->gso_segs : 1;

		counted->frames += frames;
		if (is_outer_tagged(skb, mark->type))
			counted->outer_tagged += frames;
	}
	return TC_ACT_SHOT;
}
