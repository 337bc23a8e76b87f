/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * GRE: 4 bytes, three optional fields, and an Ethernet frame with its tag (type 0x6558), or an IPv4 or IPv6 packet. The
 * session is the key, or 0. The optional fields are the same where GRE carries ERSPAN.
 */

static __always_inline enum verdict take_gre(struct cursor *cursor, struct gre *gre, struct wrapping *wrapping)
{
	u16 flags = bpf_ntohs(gre->flags), type = bpf_ntohs(gre->type);
	u32 checksum = !!(flags & GRE_CHECKSUM), key = !!(flags & GRE_KEY), sequence = !!(flags & GRE_SEQUENCE);
	__be32 *fields = cursor->next;
	long length = (checksum + key + sequence) * sizeof(*fields);

	if (flags & (GRE_ROUTING | GRE_VERSION))
		return VERDICT_MALFORMED;
	cursor->next += length;
	cursor->left -= length;
	if (cursor->next > cursor->data_end || cursor->left < 0)
		return VERDICT_TRUNCATED;
	if (key) {
		fields += checksum;
		if ((void *)(fields + 1) > cursor->data_end)
			return VERDICT_TRUNCATED;
		wrapping->session = bpf_ntohl(*fields);
	}
	if (sequence) {
		/* The last of them. */
		fields = cursor->next - sizeof(*fields);
		if ((void *)(fields + 1) > cursor->data_end)
			return VERDICT_TRUNCATED;
		wrapping->numbered = true;
		wrapping->number = bpf_ntohl(*fields);
	}
	if (type == ETHERTYPE_IPV4 || type == ETHERTYPE_IPV6)
		wrapping->ethertype = type;
	return VERDICT_DECAPSULATED;
}
