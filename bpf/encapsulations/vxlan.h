/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * VXLAN (RFC 7348): UDP, 8 bytes, the mirrored Ethernet frame with its tag. The session is the network identifier (VNI);
 * the UDP source port is a hash of the inner flow with many senders.
 */

struct vxlan {
	__be32 flags;
	__be32 vni;		/* in its upper 24 bits */
};

#define VXLAN_HAS_VNI 0x08000000
#define VXLAN_HAS_NEXT 0x04000000		/* VXLAN-GPE: what follows has a number */
#define VXLAN_NEXT(flags) ((flags) & 0xff)
#define VXLAN_ETHERNET 3

static __always_inline enum verdict take_vxlan(struct cursor *cursor, struct wrapping *wrapping)
{
	struct vxlan *vxlan = take(cursor, sizeof(*vxlan));
	u32 flags;

	if (!vxlan || cursor->left < 0)
		return VERDICT_TRUNCATED;
	flags = bpf_ntohl(vxlan->flags);
	if (!(flags & VXLAN_HAS_VNI))
		return VERDICT_MALFORMED;
	if (flags & VXLAN_HAS_NEXT && VXLAN_NEXT(flags) != VXLAN_ETHERNET)
		return VERDICT_OTHER;
	wrapping->session = bpf_ntohl(vxlan->vni) >> 8;
	return VERDICT_DECAPSULATED;
}
