/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * TZSP, of MikroTik: UDP, 4 bytes, tagged fields up to one that ends them, the mirrored Ethernet frame with its tag. The
 * session is the UDP source port (network byte order). Received packets have a frame, and those to be sent, as which some
 * senders mark what they mirror.
 */

struct tzsp {
	u8 version;
	u8 type;
	__be16 encapsulation;
};

#define TZSP_VERSION 1
#define TZSP_RECEIVED 0
#define TZSP_TO_BE_SENT 1
#define TZSP_ETHERNET 1
#define TZSP_PADDING 0
#define TZSP_END 1

static __always_inline enum verdict take_tzsp(struct cursor *cursor, struct udp *udp, struct wrapping *wrapping)
{
	struct tzsp *tzsp = take(cursor, sizeof(*tzsp));

	if (!tzsp || cursor->left < 0)
		return VERDICT_TRUNCATED;
	if (tzsp->version != TZSP_VERSION)
		return VERDICT_MALFORMED;
	if ((tzsp->type != TZSP_RECEIVED && tzsp->type != TZSP_TO_BE_SENT) ||
	    tzsp->encapsulation != bpf_htons(TZSP_ETHERNET))
		return VERDICT_OTHER;
	wrapping->session = udp->source;
#pragma unroll
	for (int i = 0; i < MAX_TZSP_FIELDS; i++) {
		u8 *type = take(cursor, sizeof(*type)), *length;	/* of the value; those two have none */

		if (!type || cursor->left < 0)
			return VERDICT_TRUNCATED;
		if (*type == TZSP_END)
			return VERDICT_DECAPSULATED;
		if (*type == TZSP_PADDING)
			continue;
		length = take(cursor, sizeof(*length));
		if (!length || cursor->left < 0)
			return VERDICT_TRUNCATED;
		cursor->next += *length;
		cursor->left -= *length;
		settle(cursor);
	}
	return VERDICT_MALFORMED;
}
