/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * ERSPAN: GRE, a header of its own, the mirrored Ethernet frame. Type I has no header, and no GRE sequence number, by
 * which it is known; II has 8 bytes, III 12 and 8 more where it says so. The tag is in the header where the switch has
 * taken it off, but some leave it in the frame as well. The session is the id in the header, or 0.
 */

#define ERSPAN_VERSION(word) ((word) >> 28)
#define ERSPAN_II 1
#define ERSPAN_III 2
#define ERSPAN_VLAN(word) ((word) >> 16 & 0xfff)
#define ERSPAN_COS(word) ((word) >> 13 & 7)
#define ERSPAN_ENCAPSULATION(word) ((word) >> 11 & 3)	/* II: how the frame was tagged */
#define ERSPAN_UNTAGGED 0
#define ERSPAN_TAG_LEFT 3				/* it still is */
#define ERSPAN_CUT 0x400
#define ERSPAN_SESSION(word) ((word) & 0x3ff)

struct erspan_ii {
	__be32 word;
	__be32 index;
};

struct erspan_iii {
	__be32 word;
	__be32 timestamp;
	__be16 group;
	__be16 flags;
};

#define ERSPAN_III_FRAME_TYPE(flags) ((flags) >> 10 & 0x1f)
#define ERSPAN_ETHERNET 0
#define ERSPAN_IP 2
#define ERSPAN_III_SUBHEADER 0x0001
#define ERSPAN_III_SUBHEADER_LEN 8

/* Whether the frame that the cursor stands on has a tag of its own. */
static __always_inline bool is_tagged(struct cursor frame)
{
	struct ethernet *ethernet = take(&frame, sizeof(*ethernet));

	return ethernet && frame.left >= 0 && (ethernet->ethertype == bpf_htons(ETHERTYPE_8021Q) ||
					       ethernet->ethertype == bpf_htons(ETHERTYPE_8021AD));
}

/* The EtherType of an IP packet that the cursor stands on, or 0. */
static __always_inline u16 ip_ethertype(struct cursor packet)
{
	u8 *first = take(&packet, sizeof(*first));

	if (!first || packet.left < 0)
		return 0;
	return *first >> 4 == 4 ? ETHERTYPE_IPV4 : *first >> 4 == 6 ? ETHERTYPE_IPV6 : 0;
}

static __always_inline enum verdict take_erspan(struct cursor *cursor, struct gre *gre, struct wrapping *wrapping)
{
	bool third = gre->type == bpf_htons(ETHERTYPE_ERSPAN_III);
	enum verdict verdict = take_gre(cursor, gre, wrapping);
	u32 word;

	wrapping->session = 0;
	if (verdict != VERDICT_DECAPSULATED)
		return verdict;
	if (!third && !wrapping->numbered)
		return VERDICT_DECAPSULATED;
	if (third) {
		struct erspan_iii *header = take(cursor, sizeof(*header));
		u16 flags;

		if (!header || cursor->left < 0)
			return VERDICT_TRUNCATED;
		word = bpf_ntohl(header->word);
		if (ERSPAN_VERSION(word) != ERSPAN_III)
			return VERDICT_MALFORMED;
		flags = bpf_ntohs(header->flags);
		if (flags & ERSPAN_III_SUBHEADER && (!take(cursor, ERSPAN_III_SUBHEADER_LEN) || cursor->left < 0))
			return VERDICT_TRUNCATED;
		if (ERSPAN_III_FRAME_TYPE(flags) == ERSPAN_IP) {
			if (cursor->left < 1)
				return VERDICT_TRUNCATED;
			wrapping->ethertype = ip_ethertype(*cursor);
			if (!wrapping->ethertype)
				return VERDICT_MALFORMED;
		} else if (ERSPAN_III_FRAME_TYPE(flags) != ERSPAN_ETHERNET) {
			return VERDICT_MALFORMED;
		}
	} else {
		struct erspan_ii *header = take(cursor, sizeof(*header));

		if (!header || cursor->left < 0)
			return VERDICT_TRUNCATED;
		word = bpf_ntohl(header->word);
		if (ERSPAN_VERSION(word) != ERSPAN_II)
			return VERDICT_MALFORMED;
	}
	wrapping->session = ERSPAN_SESSION(word);
	wrapping->cut = word & ERSPAN_CUT;
	if (wrapping->ethertype || is_tagged(*cursor) ||
	    (!third && ERSPAN_ENCAPSULATION(word) == ERSPAN_TAG_LEFT))
		return VERDICT_DECAPSULATED;
	wrapping->tag = ERSPAN_COS(word) << 13 | ERSPAN_VLAN(word);
	/* III does not say whether there was a tag, but which VLAN it was: it is taken at its word. */
	if (third || ERSPAN_ENCAPSULATION(word) != ERSPAN_UNTAGGED)
		wrapping->tag |= TAG_SAID;
	return VERDICT_DECAPSULATED;
}
