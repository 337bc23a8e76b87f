/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * Makes each frame of a test run with live frames one of `xdp-erm generate`: writes its headers and sends it out.
 *
 * xdp_erm_py/lab/generate.py compiles it with what is asked for:
 *	GENERATE_IFINDEX	the interface it goes out of
 *	GENERATE_FLOWS, GENERATE_SESSIONS	they take turns, and a flow stays in one session
 *	GENERATE_HEADERS	bytes of headers, wrapping included
 *	GENERATE_SESSION	where the last 16 bits of the session's id stand, which are those of session 0
 *	GENERATE_NUMBER		where the frame's number in its session stands, 4 bytes; undefined: it has none
 *	GENERATE_FLOW, GENERATE_CHECKSUM	where the flow's 16 bits and the checksum over them stand
 */
#define BPF_LICENSE Dual BSD/GPL

#include <linux/types.h>

struct generator {
	u64 number;			/* of the next frame */
	u8 headers[GENERATE_HEADERS];	/* of flow 0 */
};

BPF_ARRAY(generator, struct generator, 1);

int generate(struct xdp_md *ctx)
{
	u8 *data = (void *)(long)ctx->data;
	u32 zero = 0, flow, sum;
	struct generator *next = generator.lookup(&zero);
	__be16 *session;

	if (!next || data + GENERATE_HEADERS > (u8 *)(long)ctx->data_end)
		return XDP_ABORTED;

	/* All headers: the kernel uses a frame's memory again as the receiver has left it. */
	__builtin_memcpy(data, next->headers, GENERATE_HEADERS);
	flow = next->number++ % GENERATE_FLOWS;
	session = (__be16 *)(data + GENERATE_SESSION);
	*session = bpf_htons(bpf_ntohs(*session) + 1 + flow % GENERATE_SESSIONS);
#ifdef GENERATE_NUMBER
	/* A session has as many frames in each round of all flows as it has flows. */
	*(__be32 *)(data + GENERATE_NUMBER) = bpf_htonl(
		(next->number - 1) / GENERATE_FLOWS *
		((GENERATE_FLOWS - flow % GENERATE_SESSIONS + GENERATE_SESSIONS - 1) / GENERATE_SESSIONS) +
		flow / GENERATE_SESSIONS);
#endif
	*(__be16 *)(data + GENERATE_FLOW) = bpf_htons(flow);

	/* RFC 1624: the flow's bits were 0 when the checksum was made. */
	sum = (u16)~bpf_ntohs(*(__be16 *)(data + GENERATE_CHECKSUM)) + flow;
	sum = (sum & 0xffff) + (sum >> 16);
	*(__be16 *)(data + GENERATE_CHECKSUM) = bpf_htons((u16)~sum);
	return bpf_redirect(GENERATE_IFINDEX, 0);
}
