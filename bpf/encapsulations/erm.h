/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * HP ERM: UDP, 12 bytes, the mirrored Ethernet frame. The frame's 802.1Q tag is gone from it: VLAN and priority are in
 * the header, which has them for untagged frames as well. The session is the UDP source port (network byte order).
 */

/* Where the priority, CFI, VLAN id and the tagged bit stand in the u32 that ends the header. */
struct erm {
	u8 unknown[8];
	__be32 tag;
};

#define ERM_QUEUE(tag) ((tag) >> 21 & 7)
#define ERM_CFI_AND_VLAN(tag) ((tag) >> 8 & 0x1fff)
#define ERM_IS_TAGGED 0x80

/*
 * The priority is the switch's queue (traffic class), in which the default class, PCP 0, ranks above the two background
 * classes 1 and 2. Each hexadecimal digit is the PCP of a queue, that of queue 0 stands last.
 */
#define ERM_PCP_OF_QUEUE 0x76543021

static __always_inline enum verdict take_erm(struct cursor *cursor, struct udp *udp, struct wrapping *wrapping)
{
	struct erm *erm = take(cursor, sizeof(*erm));
	u32 tag;

	if (!erm)
		return VERDICT_TRUNCATED;
	tag = bpf_ntohl(erm->tag);
	wrapping->session = udp->source;
	wrapping->tag = (ERM_PCP_OF_QUEUE >> 4 * ERM_QUEUE(tag) & 7) << 13 | ERM_CFI_AND_VLAN(tag);
	if (tag & ERM_IS_TAGGED)
		wrapping->tag |= TAG_SAID;
	return VERDICT_DECAPSULATED;
}
