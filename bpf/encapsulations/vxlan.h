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

static __always_inline enum verdict take_vxlan(struct cursor *cursor, struct wrapping *wrapping)
{
	struct vxlan *vxlan = take(cursor, sizeof(*vxlan));

	if (!vxlan || cursor->left < 0)
		return VERDICT_TRUNCATED;
	if (!(vxlan->flags & bpf_htonl(VXLAN_HAS_VNI)))
		return VERDICT_MALFORMED;
	wrapping->session = bpf_ntohl(vxlan->vni) >> 8;
	return VERDICT_DECAPSULATED;
}
