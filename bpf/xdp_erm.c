/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * Strips the encapsulation in which a switch, hypervisor or cloud sends a mirrored frame, so that the kernel sees the
 * frame as it was on the mirrored port. Every packet gets one verdict, is counted at one exit and is passed on, or handed
 * to another CPU that passes it on: this program never drops. What each encapsulation is stands in bpf/encapsulations/.
 *
 * xdp_erm_py/program/compiler.py compiles it with what is configured:
 *	CONFIG_IS_ERM_PORT(port), CONFIG_IS_VXLAN_PORT(port), CONFIG_IS_GENEVE_PORT(port), CONFIG_IS_TZSP_PORT(port)
 *				whether a UDP destination port (host byte order) carries it
 *	CONFIG_ERSPAN, CONFIG_PLAIN_GRE	whether GRE carries it
 *	CONFIG_UDP, CONFIG_GRE	whether anything comes over it
 *	CONFIG_MIXED		defined where there can be more than ERM: sessions name their encapsulation, addresses have
 *				room for IPv6
 *	CONFIG_DEPTH		levels that are peeled, 1 to MAX_DEPTH
 *	CONFIG_VLAN		one of VLAN_RESTORE, VLAN_TAGGED, VLAN_STRIP
 *	CONFIG_IS_SOURCE(words)	whether a sender (struct address) may send; undefined where CONFIG_SOURCES is defined
 *	CONFIG_SOURCES		entries in the allow list of senders, where it is too long to be compared one by one
 *	CONFIG_IS_TARGET(words), CONFIG_TARGETS	the same of the addresses that it may be sent to
 *	CONFIG_SENDERS		defined where there is an allow list: there can be foreign senders
 *	CONFIG_SESSIONS		defined where sessions are counted
 *	CONFIG_ISOLATE		defined where decapsulated frames are marked, for bpf/isolate.c to keep them out of the host
 *	CONFIG_LANES		CPUs that decapsulated frames are spread over; undefined where they stay on the one they
 *				came to
 *	CONFIG_CPUS		CPUs that the machine can have, where CONFIG_LANES is defined
 *	CONFIG_SPREAD_PORTS	defined where ports count in that
 *	CONFIG_FRAGS		defined where a frame may be longer than the memory in one piece that it begins in
 *	CONFIG_PULL		defined where the kernel can put headers that lie in several pieces into the first
 */
#define BPF_LICENSE Dual BSD/GPL

#include <linux/types.h>
#include "shared.h"
#include "mark.h"
#include "packet.h"
#include "cursor.h"
#include "encapsulations/erm.h"
#include "encapsulations/gre.h"
#include "encapsulations/erspan.h"
#include "encapsulations/vxlan.h"
#include "encapsulations/geneve.h"
#include "encapsulations/tzsp.h"

struct counter {
	u64 packets;
	u64 bytes;		/* of the frame as it arrived, wrapping included */
};

BPF_PERCPU_ARRAY(counters, struct counter, COUNTER_COUNT);

/* What somebody sent. */
struct sent {
	u64 packets;
	u64 bytes;
	u64 last_seen;		/* jiffies: of all clocks the only one that costs nothing to read */
};

#ifdef CONFIG_SESSIONS
/* A mirror session. */
struct session_key {
	struct address source;
	u32 session;
#ifdef CONFIG_MIXED
	u32 encapsulation;
#endif
};

/*
 * A CPU's own sessions: what it counts here it shares with no other CPU. The first session to come has the place its
 * key hashes to, until it has been silent for long; another one that wants the place is counted in `sessions`.
 */
struct own_session {
	struct session_key key;
	struct sent counted;	/* no packets: nobody has the place */
};

struct own_sessions {
	struct own_session at[OWN_SESSIONS];
};

BPF_PERCPU_ARRAY(own_sessions, struct own_sessions, 1);

/* All others. LRU: a flood of spoofed sources replaces idle sessions, and memory stays as it is. */
BPF_TABLE("lru_hash", struct session_key, struct sent, sessions, MAX_SESSIONS);

#if CONFIG_GRE
/*
 * How the frames of a session are numbered, for all CPUs together, since a NIC may spread one session over several.
 * Missing are `highest` - `start` + 1 - `frames`; what comes late makes them fewer again. Numbers of 32 bits are extended
 * to 64, and `start` moves along where the sender has begun anew. While a leap is not settled, `missing` is what was
 * missing before it.
 */
struct numbers {
	u64 highest;
	u64 start;
	u64 frames;
	u64 late;		/* that came behind one with a higher number */
	u64 leapt;		/* `frames` at the leap */
	u64 missing;
};

BPF_TABLE("lru_hash", struct session_key, struct numbers, numbers, MAX_SESSIONS);
#endif
#endif

/* Key of the allow lists. */
struct prefix {
	u32 length;		/* bits of the address that count */
	struct address address;
};

#define ADDRESS_BITS (8 * sizeof(struct address))

#ifdef CONFIG_SOURCES
BPF_LPM_TRIE(sources, struct prefix, u8, CONFIG_SOURCES);

static __always_inline bool is_source(struct address *address)
{
	struct prefix host = { .length = ADDRESS_BITS, .address = *address };

	return sources.lookup(&host);
}
#else
static __always_inline bool is_source(struct address *address)
{
	return CONFIG_IS_SOURCE(address->words);
}
#endif

#ifdef CONFIG_TARGETS
BPF_LPM_TRIE(targets, struct prefix, u8, CONFIG_TARGETS);

static __always_inline bool is_target(struct address *address)
{
	struct prefix host = { .length = ADDRESS_BITS, .address = *address };

	return targets.lookup(&host);
}
#else
static __always_inline bool is_target(struct address *address)
{
	return CONFIG_IS_TARGET(address->words);
}
#endif

#ifdef CONFIG_SENDERS
/* Foreign senders, whose source or whose target is not on the list, by source address. LRU as `sessions`. */
BPF_TABLE("lru_hash", struct address, struct sent, senders, MAX_SENDERS);
#endif

#ifdef CONFIG_LANES
/* The queues of frames to other CPUs, by CPU number. What arrives there, bpf/arrive.c counts. */
struct cpu {
	u32 queue_size;		/* frames */
	int program;		/* that runs there; a file descriptor when written, an id when read */
};

BPF_XDP_REDIRECT_MAP("cpumap", struct cpu, cpus, CONFIG_CPUS);

/* The CPUs that take part. */
BPF_ARRAY(lanes, u32, CONFIG_LANES);

/* Frames handed to each CPU, by CPU number. */
BPF_PERCPU_ARRAY(steered, u64, CONFIG_CPUS);
#endif

/* The IP header of one level of wrapping. */
struct outer {
	struct address source;
	struct address destination;
	u8 protocol;
	bool ipv4;
	u16 fragment;		/* not 0: it is the first of several */
	long length;		/* of what is behind the header, as it says itself */
	long missing;		/* of these bytes; below 0: there are more */
};

static __always_inline void set_ipv4(struct address *address, __be32 ipv4)
{
#ifdef CONFIG_MIXED
	address->words[0] = address->words[1] = 0;
	address->words[2] = bpf_htonl(0xffff);
	address->words[3] = ipv4;
#else
	address->words[0] = ipv4;
#endif
}

/* Whether an IP protocol can carry what is configured. */
static __always_inline bool is_carrier(u8 protocol)
{
	return (CONFIG_UDP && protocol == PROTOCOL_UDP) || (CONFIG_GRE && protocol == PROTOCOL_GRE);
}

static __always_inline enum verdict take_ipv4(struct cursor *cursor, struct outer *outer)
{
	long left = cursor->left, header_length;	/* signed: they are compared */
	struct ipv4 *ip = take(cursor, sizeof(*ip));
	u16 fragment;

	if (!ip)
		return VERDICT_TRUNCATED;
	header_length = (ip->version_ihl & 0xf) * 4;
	if (ip->version_ihl >> 4 != 4 || header_length < (long)sizeof(*ip))
		return VERDICT_MALFORMED;
	if (!is_carrier(ip->protocol))
		return VERDICT_OTHER;
	/* Only a datagram's first fragment says which port it is for. Of the others nobody knows whose they are. */
	fragment = bpf_ntohs(ip->fragment);
	if (fragment & IPV4_FRAGMENT_OFFSET)
		return VERDICT_OTHER;

	set_ipv4(&outer->source, ip->source);
	set_ipv4(&outer->destination, ip->destination);
	outer->protocol = ip->protocol;
	outer->ipv4 = true;
	outer->fragment = fragment & IPV4_MORE_FRAGMENTS;
	outer->length = bpf_ntohs(ip->total_length) - header_length;
	outer->missing = bpf_ntohs(ip->total_length) - left;
	cursor->next = (void *)ip + header_length;
	return VERDICT_DECAPSULATED;
}

#ifdef CONFIG_MIXED
static __always_inline bool is_extension(u8 protocol)
{
	return protocol == PROTOCOL_HOP_BY_HOP || protocol == PROTOCOL_ROUTING || protocol == PROTOCOL_FRAGMENT ||
	       protocol == PROTOCOL_AUTHENTICATION || protocol == PROTOCOL_DESTINATION;
}

static __always_inline enum verdict take_ipv6(struct cursor *cursor, struct outer *outer)
{
	struct ipv6 *ip = take(cursor, sizeof(*ip));
	struct ipv6_extension *extension;

	if (!ip)
		return VERDICT_TRUNCATED;
	if (bpf_ntohl(ip->version_class_flow) >> 28 != 6)
		return VERDICT_MALFORMED;
	outer->protocol = ip->next_header;
	outer->length = bpf_ntohs(ip->payload_length);
	outer->missing = outer->length - cursor->left;
	if (is_extension(outer->protocol)) {
		extension = take(cursor, sizeof(*extension));
		if (!extension)
			return VERDICT_TRUNCATED;
		/* Linux's tunnels send one by default, with the encapsulation limit (RFC 2473) for the destination. */
		if (is_extension(extension->next_header) ||
		    (is_carrier(extension->next_header) &&
		     (outer->protocol != PROTOCOL_DESTINATION || extension->length)))
			return VERDICT_EXTENSION;
		outer->protocol = extension->next_header;
		outer->length -= sizeof(*extension);
	}
	if (!is_carrier(outer->protocol))
		return VERDICT_OTHER;

	__builtin_memcpy(&outer->source, ip->source, sizeof(outer->source));
	__builtin_memcpy(&outer->destination, ip->destination, sizeof(outer->destination));
	outer->ipv4 = false;
	outer->fragment = 0;
	return VERDICT_DECAPSULATED;
}
#endif

/* Takes the outer IP header, behind an Ethernet header with this EtherType. VERDICT_DECAPSULATED: so far it can be. */
static __always_inline enum verdict take_outer(struct cursor *cursor, int ethertype, struct outer *outer)
{
	if (ethertype < 0)
		return VERDICT_TRUNCATED;
	if (ethertype == ETHERTYPE_IPV4)
		return take_ipv4(cursor, outer);
#ifdef CONFIG_MIXED
	if (ethertype == ETHERTYPE_IPV6)
		return take_ipv6(cursor, outer);
#endif
	return VERDICT_OTHER;
}

/* What a UDP destination port carries: enum encapsulation, or ENCAPSULATION_COUNT: nothing of ours. */
static __always_inline u32 carried_by_udp(u16 port, bool ipv4)
{
	if (ipv4 && CONFIG_IS_ERM_PORT(port))
		return ENCAPSULATION_ERM;
	if (CONFIG_IS_VXLAN_PORT(port))
		return ENCAPSULATION_VXLAN;
	if (CONFIG_IS_GENEVE_PORT(port))
		return ENCAPSULATION_GENEVE;
	if (ipv4 && CONFIG_IS_TZSP_PORT(port))
		return ENCAPSULATION_TZSP;
	return ENCAPSULATION_COUNT;
}

/* Likewise what a GRE type does. */
static __always_inline u32 carried_by_gre(u16 type)
{
	if (CONFIG_ERSPAN && (type == ETHERTYPE_ERSPAN || type == ETHERTYPE_ERSPAN_III))
		return ENCAPSULATION_ERSPAN;
	if (CONFIG_PLAIN_GRE && (type == ETHERTYPE_BRIDGING || type == ETHERTYPE_IPV4 || type == ETHERTYPE_IPV6))
		return ENCAPSULATION_GRE;
	return ENCAPSULATION_COUNT;
}

/*
 * Takes the rest of one level of wrapping, behind an Ethernet header with this EtherType. VERDICT_DECAPSULATED: the
 * cursor stands on the mirrored frame. The allow lists are asked of the outermost level only; whoever takes a level
 * within asks for its source. Its target is another sensor's, of which nothing is configured here.
 */
static __always_inline enum verdict take_wrapping(struct cursor *cursor, int ethertype, struct wrapping *wrapping,
						  bool outermost)
{
	struct cursor payload = *cursor;
	struct outer outer;
	enum verdict verdict = take_outer(&payload, ethertype, &outer);
	long length;
	struct gre *gre = NULL;
	struct udp *udp = NULL;

	if (verdict != VERDICT_DECAPSULATED)
		return verdict;
	settle(&payload);
	if (!CONFIG_UDP || (CONFIG_GRE && outer.protocol == PROTOCOL_GRE)) {
		gre = take(&payload, sizeof(*gre));
		if (!gre)
			return VERDICT_TRUNCATED;
		wrapping->encapsulation = carried_by_gre(bpf_ntohs(gre->type));
	} else {
		udp = take(&payload, sizeof(*udp));
		if (!udp)
			return VERDICT_TRUNCATED;
		wrapping->encapsulation = carried_by_udp(bpf_ntohs(udp->destination), outer.ipv4);
	}
	if (wrapping->encapsulation == ENCAPSULATION_COUNT)
		return VERDICT_OTHER;

	wrapping->source = outer.source;
	if (outermost && !is_source(&outer.source))
		return VERDICT_FOREIGN_SOURCE;
	if (outermost && !is_target(&outer.destination))
		return VERDICT_FOREIGN_TARGET;
	if (outer.fragment)
		return VERDICT_FRAGMENT;

	/* A datagram ends where UDP says. What follows is padding or a trailer, and no part of the mirrored frame. */
	length = udp ? bpf_ntohs(udp->length) : outer.length;
	if (length < (long)(udp ? sizeof(*udp) : sizeof(*gre)) || length > outer.length)
		return VERDICT_MALFORMED;
	if (outer.missing > 0)
		return VERDICT_TRUNCATED;
	payload.left = length - (udp ? sizeof(*udp) : sizeof(*gre));

	if (udp && wrapping->encapsulation == ENCAPSULATION_ERM)
		verdict = take_erm(&payload, udp, wrapping);
	else if (udp && wrapping->encapsulation == ENCAPSULATION_VXLAN)
		verdict = take_vxlan(&payload, wrapping);
	else if (udp && wrapping->encapsulation == ENCAPSULATION_GENEVE)
		verdict = take_geneve(&payload, wrapping);
	else if (udp && wrapping->encapsulation == ENCAPSULATION_TZSP)
		verdict = take_tzsp(&payload, udp, wrapping);
	else if (gre && wrapping->encapsulation == ENCAPSULATION_ERSPAN)
		verdict = take_erspan(&payload, gre, wrapping);
	else if (gre)
		verdict = take_gre(&payload, gre, wrapping);
	if (verdict != VERDICT_DECAPSULATED)
		return verdict;
	if (payload.left < (wrapping->ethertype ? 1 : (long)sizeof(struct ethernet)))
		return VERDICT_TRUNCATED;
	settle(&payload);
	forget(&payload, wrapping);
	*cursor = payload;
	return VERDICT_DECAPSULATED;
}

/* Whether the mirrored frame is IP and its own length field promises more than was mirrored. */
static __always_inline bool is_inner_truncated(struct cursor packet, int ethertype)
{
	long left = packet.left;

	if (left < 0)
		return false;	/* not even its Ethernet header and VLAN tags are whole */
	if (ethertype == ETHERTYPE_IPV4) {
		struct ipv4 *ip = take(&packet, sizeof(*ip));

		return left < (long)sizeof(*ip) || (ip && bpf_ntohs(ip->total_length) > left);
	}
	if (ethertype == ETHERTYPE_IPV6) {
		struct ipv6 *ip = take(&packet, sizeof(*ip));

		return left < (long)sizeof(*ip) || (ip && (long)sizeof(*ip) + bpf_ntohs(ip->payload_length) > left);
	}
	return false;
}

/* Whether the mirrored frame gets an 802.1Q tag again. VLAN 0 is no VLAN. */
static __always_inline bool wants_tag(u32 tag)
{
	if (CONFIG_VLAN == VLAN_STRIP || !(tag & TAG_VLAN))
		return false;
	return CONFIG_VLAN == VLAN_RESTORE || tag & TAG_SAID;
}

/* Inserts the tag behind the two MAC addresses, which stand sizeof(struct vlan_tag) bytes further than they shall. */
static __always_inline void write_tag(struct xdp_md *ctx, u32 tag)
{
	u32 *word = (void *)(long)ctx->data;

	/* Only the verifier does not know that both addresses and room for the tag are there. */
	if ((void *)(word + 4) > (void *)(long)ctx->data_end)
		return;
	word[0] = word[1];
	word[1] = word[2];
	word[2] = word[3];
	word[3] = bpf_htonl(ETHERTYPE_8021Q << 16 | (tag & TAG_CONTROL));
}

/* Makes a packet that came without an Ethernet header a frame, which begins where the packet's data does. */
static __always_inline void write_ethernet(struct xdp_md *ctx, struct ethernet *ethernet)
{
	struct ethernet *made = (void *)(long)ctx->data;

	/* As in write_tag. */
	if ((void *)(made + 1) <= (void *)(long)ctx->data_end)
		*made = *ethernet;
}

#ifdef CONFIG_ISOLATE
/* Room for the mark before the frame; it lies in what was stripped and is not written yet. 0, or the kernel's error. */
static __always_inline int reserve_mark(struct xdp_md *ctx)
{
	return bpf_xdp_adjust_meta(ctx, -(int)sizeof(struct mark));
}

static __always_inline void release_mark(struct xdp_md *ctx)
{
	bpf_xdp_adjust_meta(ctx, sizeof(struct mark));
}

static __always_inline void write_mark(struct xdp_md *ctx)
{
	struct mark *mark = (void *)(long)ctx->data_meta;
	u32 *word = (void *)(long)ctx->data;

	/* Again for the verifier's sake only. */
	if ((void *)(mark + 1) > (void *)word)
		return;
	mark->magic = MARK;
	mark->type = (void *)(word + 4) > (void *)(long)ctx->data_end ? 0 : word[3];
}
#else
static __always_inline int reserve_mark(struct xdp_md *ctx)
{
	return 0;
}

static __always_inline void release_mark(struct xdp_md *ctx)
{
}

static __always_inline void write_mark(struct xdp_md *ctx)
{
}
#endif

/* Bytes of the whole frame. */
static __always_inline long frame_length(struct xdp_md *ctx)
{
#ifdef CONFIG_FRAGS
	return bpf_xdp_get_buff_len((void *)ctx);
#else
	return (void *)(long)ctx->data_end - (void *)(long)ctx->data;
#endif
}

/* Cuts bytes off the frame's end. 0, or not: they are still there. */
static __always_inline int cut(struct xdp_md *ctx, long bytes)
{
	if (!bytes)
		return 0;
	/* veth gives a frame in several pieces its old length again, with bytes of nobody's in its middle. */
	if (frame_length(ctx) > (void *)(long)ctx->data_end - (void *)(long)ctx->data)
		return -1;
	return bpf_xdp_adjust_tail(ctx, -bytes);
}

#ifdef CONFIG_LANES
/* What the packets of one conversation have in common, in both directions. */
struct flow {
	u64 source;
	u64 destination;
	u8 protocol;
	bool fragment;
};

/* Takes the IP headers. false: no IP, or not whole. */
static __always_inline bool take_flow(struct cursor *packet, int ethertype, struct flow *flow)
{
	if (ethertype == ETHERTYPE_IPV4) {
		struct ipv4 *ip = take(packet, sizeof(*ip));

		if (!ip)
			return false;
		flow->source = ip->source;
		flow->destination = ip->destination;
		flow->protocol = ip->protocol;
		flow->fragment = ip->fragment & bpf_htons(IPV4_MORE_FRAGMENTS | IPV4_FRAGMENT_OFFSET);
		packet->next = (void *)ip + (ip->version_ihl & 0xf) * 4;
		return true;
	}
	if (ethertype == ETHERTYPE_IPV6) {
		struct ipv6 *ip = take(packet, sizeof(*ip));
		struct ipv6_extension *fragment;

		if (!ip)
			return false;
		flow->source = (u64)(ip->source[0] ^ ip->source[2]) << 32 | (ip->source[1] ^ ip->source[3]);
		flow->destination = (u64)(ip->destination[0] ^ ip->destination[2]) << 32 |
				    (ip->destination[1] ^ ip->destination[3]);
		flow->protocol = ip->next_header;
		flow->fragment = flow->protocol == PROTOCOL_FRAGMENT;
		if (!flow->fragment)
			return true;
		fragment = take(packet, sizeof(*fragment));
		if (fragment)
			flow->protocol = fragment->next_header;
		return true;
	}
	return false;
}

/* Whether the packet is an ICMP error, which quotes the packet that it is about. The cursor stands on the quote then. */
static __always_inline bool take_icmp_error(struct cursor *packet, struct flow *flow)
{
	struct icmp *icmp;

	if (flow->fragment || (flow->protocol != PROTOCOL_ICMP && flow->protocol != PROTOCOL_ICMPV6))
		return false;
	icmp = take(packet, sizeof(*icmp));
	if (!icmp)
		return false;
	if (flow->protocol == PROTOCOL_ICMPV6)
		return icmp->type < ICMPV6_FIRST_INFORMATIONAL;
	return ICMP_IS_ERROR(icmp->type);
}

/*
 * The same for all packets of a pair of addresses (and ports) and a protocol, in both directions, with their fragments and
 * the ICMP errors about them; 0 for what is no IP. That the order of a conversation is kept depends on it.
 */
static __always_inline u32 flow_hash(struct cursor packet, int ethertype)
{
	struct flow flow, quoted;
	u64 low, high, hash;

	if (!take_flow(&packet, ethertype, &flow))
		return 0;
	if (take_icmp_error(&packet, &flow)) {
		if (!take_flow(&packet, ethertype, &quoted))
			return 0;
		flow = quoted;
	}
#ifdef CONFIG_SPREAD_PORTS
	if (!flow.fragment && (flow.protocol == PROTOCOL_TCP || flow.protocol == PROTOCOL_UDP)) {
		struct ports *ports = take(&packet, sizeof(*ports));

		if (ports) {
			flow.source ^= (u64)ports->source << 48;
			flow.destination ^= (u64)ports->destination << 48;
		}
	}
#endif
	low = flow.source < flow.destination ? flow.source : flow.destination;
	high = flow.source < flow.destination ? flow.destination : flow.source;
	/* Multiplications by 2^64 / golden ratio carry each bit upwards, the shift brings them down again in between. */
	hash = low * 0x9e3779b97f4a7c15ULL;
	hash = (hash ^ hash >> 32) + high + flow.protocol;
	return hash * 0x9e3779b97f4a7c15ULL >> 32;
}

/* Hands the frame to the CPU of its flow. Where that cannot be, it goes on here. */
static __always_inline int steer(u32 hash)
{
	u32 index = (u64)hash * CONFIG_LANES >> 32, *cpu = lanes.lookup(&index);
	u64 *frames = cpu ? steered.lookup(cpu) : NULL;
	int action;

	if (!frames)
		return XDP_PASS;
	action = cpus.redirect_map(*cpu, XDP_PASS);
	if (action == XDP_REDIRECT)
		++*frames;
	return action;
}
#else
static __always_inline u32 flow_hash(struct cursor packet, int ethertype)
{
	return 0;
}

static __always_inline int steer(u32 hash)
{
	return XDP_PASS;
}
#endif

/* Everything that is to be known of one packet when it is counted. */
struct outcome {
	enum verdict verdict;
	/* Of what is decapsulated only, but for the source, which foreign senders have as well: */
	struct wrapping outermost;
	u32 notes;		/* a bit for each enum note */
	u32 flow;		/* hash */
};

/* The part of a packet that is at hand while levels are peeled. */
struct level {
	struct cursor frame;	/* on what is left */
	struct cursor packet;	/* on what its Ethernet header carries */
	int ethertype;		/* of that */
	void *macs;		/* the nearest Ethernet header's addresses */
};

/* Steps from where a level of wrapping ends, `frame`, to what is in it: a frame, or a packet of this EtherType. */
static __always_inline void enter(struct level *level, u16 ethertype)
{
	level->packet = level->frame;
	level->ethertype = ethertype;
	if (!level->ethertype) {
		level->macs = level->frame.next;
		level->ethertype = take_ethernet(&level->packet);
	}
	settle(&level->packet);
}

/* Leaves exactly the mirrored frame, or the packet as it came. */
static __always_inline void decapsulate(struct xdp_md *ctx, long length, struct outcome *outcome)
{
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	struct level level = { .frame = { .next = data, .data = data, .data_end = data_end, .left = length } };
	struct ethernet ethernet = {};
	u32 tag, made;
	long strip, trim;
	bool tagged, cut_off;

	enter(&level, 0);
	level.frame = level.packet;
	outcome->verdict = take_wrapping(&level.frame, level.ethertype, &outcome->outermost, true);
	if (outcome->verdict != VERDICT_DECAPSULATED)
		return;

	tag = outcome->outermost.tag;
	made = outcome->outermost.ethertype;
	cut_off = outcome->outermost.cut;
	enter(&level, made);
	/* Whoever is mirrored can send it, too. It is another switch's, and peeled, only where that is configured. */
#pragma unroll
	for (int i = 1; i <= CONFIG_DEPTH; i++) {
		struct cursor next = level.packet;
		struct wrapping wrapping = {};

		if (take_wrapping(&next, level.ethertype, &wrapping, false) != VERDICT_DECAPSULATED)
			break;
		if (i == CONFIG_DEPTH || !is_source(&wrapping.source)) {
			outcome->notes |= 1 << NOTE_NESTED_REFUSED;
			break;
		}
		outcome->notes |= 1 << NOTE_NESTED;
		tag = wrapping.tag;
		made = wrapping.ethertype;
		cut_off = wrapping.cut;
		level.frame = next;
		enter(&level, made);
	}
	if (cut_off || is_inner_truncated(level.packet, level.ethertype))
		outcome->notes |= 1 << NOTE_INNER_TRUNCATED;
	outcome->flow = flow_hash(level.packet, level.ethertype);
	outcome->notes = forgotten(&level.frame, outcome->notes);

	tagged = wants_tag(tag);
	strip = level.frame.next - data;
	trim = length - strip - level.frame.left;
	if (made) {
		/* They are there, as in write_tag. */
		if (level.macs + sizeof(ethernet) > data_end)
			return;
		__builtin_memcpy(&ethernet, level.macs, 2 * sizeof(ethernet.source));
		ethernet.ethertype = bpf_htons(made);
		strip -= sizeof(ethernet);
	} else if (tagged) {
#ifdef CONFIG_FRAGS
		/* The addresses are moved; the first piece of memory may end among them. */
		if (level.macs + 2 * sizeof(ethernet.source) > data_end) {
			outcome->verdict = VERDICT_FAILED;
			return;
		}
#endif
		strip -= sizeof(struct vlan_tag);
	}

	/*
	 * Nothing is written before all have succeeded: the wrapping is still there to be uncovered again. A frame that
	 * cannot be marked stays wrapped, since the host would take a mirrored frame for one of its own.
	 */
	if (bpf_xdp_adjust_head(ctx, strip)) {
		outcome->verdict = VERDICT_FAILED;
		return;
	}
	if (reserve_mark(ctx)) {
		bpf_xdp_adjust_head(ctx, -strip);
		outcome->verdict = VERDICT_UNMARKED;
		return;
	}
	if (cut(ctx, trim)) {
		release_mark(ctx);
		bpf_xdp_adjust_head(ctx, -strip);
		outcome->verdict = VERDICT_FAILED;
		return;
	}
	if (made)
		write_ethernet(ctx, &ethernet);
	else if (tagged)
		write_tag(ctx, tag);
	write_mark(ctx);
}

static __always_inline void count(u32 index, u64 bytes)
{
	struct counter *counter = counters.lookup(&index);

	if (counter) {
		counter->packets++;
		counter->bytes += bytes;
	}
}

#if defined(CONFIG_SESSIONS) || defined(CONFIG_SENDERS)
/* Adds to what CPUs share. */
static __always_inline void add(struct sent *sent, struct sent *counted)
{
	lock_xadd(&sent->packets, counted->packets);
	lock_xadd(&sent->bytes, counted->bytes);
	sent->last_seen = counted->last_seen;
}
#endif

#ifdef CONFIG_SESSIONS
/* To `sessions`, which the CPUs share. */
static __always_inline void add_session(struct session_key *key, struct sent *counted)
{
	struct sent *session = sessions.lookup(key);

	if (!session) {
		/*
		 * Not to look a new session up keeps its LRU reference bit clear: sources seen only once are the first to
		 * be replaced. It fails where another CPU has put the session there first.
		 */
		if (!sessions.insert(key, counted))
			return;
		session = sessions.lookup(key);
		if (!session)
			return;
	}
	add(session, counted);
}

#if CONFIG_GRE
/* Counts by its number the frame of a session whose frames are numbered. */
static __always_inline void follow(struct session_key *key, u32 number)
{
	struct numbers first = { .highest = number, .start = number, .frames = 1, .leapt = -LEAP };
	struct numbers *numbers_ = numbers.lookup(key);
	s64 step;

	if (!numbers_) {
		/* As in add_session. */
		if (!numbers.insert(key, &first))
			return;
		numbers_ = numbers.lookup(key);
		if (!numbers_)
			return;
	}
	step = (s32)(number - (u32)numbers_->highest);
	if ((step > LEAP || step < -LEAP) && numbers_->frames - numbers_->leapt >= LEAP) {
		numbers_->missing = numbers_->highest - numbers_->start + 1 - numbers_->frames;
		numbers_->leapt = numbers_->frames;
	}
	if (step > MOST_MISSING || step < -LEAP) {
		/* Nobody knows what is missing since the leap before, if that is not settled. */
		numbers_->highest += step;
		numbers_->start = numbers_->highest - numbers_->frames - numbers_->missing;
		numbers_->leapt = numbers_->frames;
	} else if (step > 0) {
		numbers_->highest += step;
	} else if (step < 0) {
		lock_xadd(&numbers_->late, 1);
	}
	/* Else the frame came twice, or its sender gives all the same number. */
	lock_xadd(&numbers_->frames, 1);
}
#endif

static __always_inline bool is_same(struct session_key *one, struct session_key *other)
{
#ifdef CONFIG_MIXED
	if (one->source.words[0] != other->source.words[0] || one->source.words[1] != other->source.words[1] ||
	    one->source.words[2] != other->source.words[2] || one->source.words[3] != other->source.words[3] ||
	    one->encapsulation != other->encapsulation)
		return false;
	return one->session == other->session;
#else
	return one->source.words[0] == other->source.words[0] && one->session == other->session;
#endif
}

static __always_inline u32 fold(struct session_key *key)
{
#ifdef CONFIG_MIXED
	/* A golden ratio for each: words that differ in few bits must not cancel each other. */
	u32 address = key->source.words[3] ^ key->source.words[2] * 0x85ebca6b ^ key->source.words[1] * 0xc2b2ae35 ^
		      key->source.words[0] * 0x27d4eb2f;

	return address ^ key->session << 16 ^ key->session >> 16 ^ key->encapsulation << 8;
#else
	return key->source.words[0] ^ key->session << 16;
#endif
}

static __always_inline void count_session(struct wrapping *outermost, u64 bytes)
{
	struct session_key key = { .source = outermost->source, .session = outermost->session };
	struct sent counted = { .packets = 1, .bytes = bytes, .last_seen = bpf_jiffies64() };
	u32 hash, zero = 0;
	struct own_sessions *places = own_sessions.lookup(&zero);
	struct own_session *own;

	if (!places)
		return;
#ifdef CONFIG_MIXED
	key.encapsulation = outermost->encapsulation;
#endif
#if CONFIG_GRE
	if (outermost->numbered)
		follow(&key, outermost->number);
#endif
	hash = fold(&key) * 0x9e3779b1 /* 2^32 / golden ratio */;
	own = &places->at[(u64)hash * OWN_SESSIONS >> 32];
	if (is_same(&own->key, &key)) {
		own->counted.packets++;
		own->counted.bytes += bytes;
		own->counted.last_seen = counted.last_seen;
	} else if (own->counted.packets && counted.last_seen - own->counted.last_seen < OWN_JIFFIES) {
		add_session(&key, &counted);
	} else {
		if (own->counted.packets)
			add_session(&own->key, &own->counted);
		own->key = key;
		own->counted = counted;
	}
}
#endif

#ifdef CONFIG_SENDERS
static __always_inline void count_sender(struct address source, u64 bytes)
{
	struct sent counted = { .packets = 1, .bytes = bytes, .last_seen = bpf_jiffies64() };
	struct sent *sender = senders.lookup(&source);

	if (!sender) {
		/* As in add_session: who is seen only once is replaced first. */
		if (!senders.insert(&source, &counted))
			return;
		sender = senders.lookup(&source);
		if (!sender)
			return;
	}
	add(sender, &counted);
}
#endif

#ifdef CONFIG_FRAGS
/* Bytes. What headers need is always in a frame's first piece where that has so many. */
#define SHORT_PIECE 256

/* Whether the frame goes on in another piece of memory so early that headers may be there. */
static __always_inline bool is_scattered(struct xdp_md *ctx, long bytes)
{
	long first = (void *)(long)ctx->data_end - (void *)(long)ctx->data;

	return first < SHORT_PIECE && first < bytes;
}
#else
static __always_inline bool is_scattered(struct xdp_md *ctx, long bytes)
{
	return false;
}
#endif

#ifdef CONFIG_PULL
static int (*const pull_data)(struct xdp_md *ctx, u32 length) = (void *)CALL_PULL_DATA;

/* Moves what is left of the headers into the first piece. Where that cannot be, they stay where they are. */
static __always_inline void pull_headers(struct xdp_md *ctx, long bytes)
{
	if (is_scattered(ctx, bytes))
		pull_data(ctx, bytes < SHORT_PIECE ? bytes : SHORT_PIECE);
}
#else
static __always_inline void pull_headers(struct xdp_md *ctx, long bytes)
{
}
#endif

int xdp_erm(struct xdp_md *ctx)
{
	long bytes = frame_length(ctx);
	struct outcome outcome = {};
	int action = XDP_PASS;

	pull_headers(ctx, bytes);
	decapsulate(ctx, bytes, &outcome);
	/* What is not in the first piece can neither be read in place nor be cut off. */
	if (outcome.verdict == VERDICT_TRUNCATED && is_scattered(ctx, bytes))
		outcome.verdict = VERDICT_FAILED;
	if (outcome.verdict == VERDICT_DECAPSULATED) {
		if (outcome.notes & 1 << NOTE_NESTED)
			count(NOTE_NESTED, bytes);
		if (outcome.notes & 1 << NOTE_NESTED_REFUSED)
			count(NOTE_NESTED_REFUSED, bytes);
		if (outcome.notes & 1 << NOTE_INNER_TRUNCATED)
			count(NOTE_INNER_TRUNCATED, bytes);
#ifdef CONFIG_SESSIONS
		count_session(&outcome.outermost, bytes);
#endif
		action = steer(outcome.flow);
	}
#ifdef CONFIG_SENDERS
	else if (outcome.verdict == VERDICT_FOREIGN_SOURCE || outcome.verdict == VERDICT_FOREIGN_TARGET)
		count_sender(outcome.outermost.source, bytes);
#endif
	count(outcome.verdict, bytes);
	return action;
}
