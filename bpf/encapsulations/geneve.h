/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * GENEVE (RFC 8926): UDP, 8 bytes, up to 252 of options, and the mirrored Ethernet frame with its tag, or an IPv4 or IPv6
 * packet. The session is the network identifier (VNI), as with VXLAN. Control packets have no frame.
 */

struct geneve {
	u8 version_length;	/* that of the options in 4 bytes */
	u8 flags;
	__be16 type;
	__be32 vni;		/* in its upper 24 bits */
};

#define GENEVE_CONTROL 0x80

static __always_inline enum verdict take_geneve(struct cursor *cursor, struct wrapping *wrapping)
{
	struct geneve *geneve = take(cursor, sizeof(*geneve));
	long options;
	u16 type;

	if (!geneve || cursor->left < 0)
		return VERDICT_TRUNCATED;
	if (geneve->version_length >> 6)
		return VERDICT_MALFORMED;
	type = bpf_ntohs(geneve->type);
	if (geneve->flags & GENEVE_CONTROL ||
	    (type != ETHERTYPE_BRIDGING && type != ETHERTYPE_IPV4 && type != ETHERTYPE_IPV6))
		return VERDICT_OTHER;
	if (type != ETHERTYPE_BRIDGING)
		wrapping->ethertype = type;
	wrapping->session = bpf_ntohl(geneve->vni) >> 8;
	options = (geneve->version_length & 0x3f) * 4;
	cursor->next += options;
	cursor->left -= options;
	return VERDICT_DECAPSULATED;
}
