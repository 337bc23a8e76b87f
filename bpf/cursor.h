/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Walking through a packet, header by header, never past its end; and what each level of wrapping says.
 */
#ifndef XDP_ERM_CURSOR_H
#define XDP_ERM_CURSOR_H

/*
 * A place in the packet. `left` is what is left of the content: once a datagram's length is known, padding behind it is
 * never taken for content. It is below 0 where headers reach into that padding. `data_end` is where the memory ends, as
 * the verifier wants to be asked.
 */
struct cursor {
	void *next;
	void *data;		/* where the packet begins */
	void *data_end;
	long left;
};

/* The next `length` bytes, or NULL where they are not there. */
static __always_inline void *take(struct cursor *cursor, u32 length)
{
	void *taken = cursor->next;

	if (taken + length > cursor->data_end)
		return NULL;
	cursor->next += length;
	cursor->left -= length;
	/* It never is, but the compiler does not know and would have every caller ask again. */
	__builtin_assume(taken != NULL);
	return taken;
}

/*
 * The same number, of which the verifier no longer knows what it can be. It walks through all that follows once for each
 * state that it knows apart, and the ways through one level would multiply with those through the next. The difference
 * of two places in the packet it does not know; the compiler must not see that it is taken off again.
 */
static __always_inline u64 forgotten(struct cursor *cursor, u64 number)
{
#ifdef CONFIG_MIXED
	u64 unknown = cursor->data_end - cursor->data;

	asm volatile("" : "+r"(unknown), "+r"(number));
	number += unknown;
	asm volatile("" : "+r"(number));
	number -= unknown;
#endif
	return number;
}

/* More than all headers of all levels can have, and all ones in binary. */
#define MOST_HEADERS 0x1fff

/* Lets the verifier forget how the cursor came to where it stands. */
static __always_inline void settle(struct cursor *cursor)
{
#ifdef CONFIG_MIXED
	cursor->next = cursor->data + (forgotten(cursor, cursor->next - cursor->data) & MOST_HEADERS);
	cursor->left = forgotten(cursor, cursor->left);
#endif
}

/* Takes the Ethernet header and its VLAN tags. The EtherType behind them (host byte order), or -1: bytes missing. */
static __always_inline int take_ethernet(struct cursor *cursor)
{
	struct ethernet *ethernet = take(cursor, sizeof(*ethernet));
	u16 ethertype;

	if (!ethernet)
		return -1;
	ethertype = bpf_ntohs(ethernet->ethertype);
#pragma unroll
	for (int i = 0; i < MAX_VLAN_TAGS; i++) {
		struct vlan_tag *tag;

		if (ethertype != ETHERTYPE_8021Q && ethertype != ETHERTYPE_8021AD)
			break;
		tag = take(cursor, sizeof(*tag));
		if (!tag)
			return -1;
		ethertype = bpf_ntohs(tag->ethertype);
	}
	return ethertype;
}

/* IPv4's fills the last word; before it, where there can be others, what RFC 4291 has for IPv4 in IPv6 (::ffff:0:0). */
struct address {
#ifdef CONFIG_MIXED
	__be32 words[4];
#else
	__be32 words[1];
#endif
};

/* What one level of wrapping says, whatever its encapsulation. */
struct wrapping {
	struct address source;
	u32 encapsulation;	/* enum encapsulation */
	u32 session;		/* between source and sensor: what it is in each encapsulation says its header */
	u32 tag;		/* the mirrored frame's, where it is no longer in the frame: TAG_...; 0: none */
	u16 ethertype;		/* of the packet, where it comes without an Ethernet header; else 0 */
	bool cut;		/* the header says that the frame is not whole */
	bool numbered;
	u32 number;		/* of the frame in its session, if they are numbered */
};

/* 802.1Q tag control information in host byte order, and whether the header says that the frame was tagged. */
#define TAG_VLAN 0x0fff
#define TAG_CONTROL 0xffff
#define TAG_SAID 0x10000

/* Lets the verifier forget what a level of wrapping says, as settle() does of the cursor. */
static __always_inline void forget(struct cursor *cursor, struct wrapping *wrapping)
{
#ifdef CONFIG_MIXED
#pragma unroll
	for (int i = 0; i < 4; i++)
		wrapping->source.words[i] = forgotten(cursor, wrapping->source.words[i]);
	wrapping->encapsulation = forgotten(cursor, wrapping->encapsulation);
	wrapping->session = forgotten(cursor, wrapping->session);
	wrapping->tag = forgotten(cursor, wrapping->tag) & (TAG_SAID | TAG_CONTROL);
	wrapping->ethertype = forgotten(cursor, wrapping->ethertype);
	wrapping->cut = forgotten(cursor, wrapping->cut) & 1;
	wrapping->numbered = forgotten(cursor, wrapping->numbered) & 1;
	wrapping->number = forgotten(cursor, wrapping->number);
#endif
}

#endif
