/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * Strips HP ERM (Ethernet, IPv4, UDP, 12-byte header) from a mirrored frame, so that the kernel sees the frame as it
 * was on the mirrored port. Every packet gets one verdict, is counted at one exit and is passed on, or handed to
 * another CPU that passes it on: this program never drops.
 *
 * xdp_erm_py/program/compiler.py compiles it with what is configured:
 *	CONFIG_IS_ERM_PORT(port)	whether a UDP destination port (host byte order) carries ERM
 *	CONFIG_DEPTH		levels that are peeled, 1 to MAX_DEPTH
 *	CONFIG_VLAN		one of VLAN_RESTORE, VLAN_TAGGED, VLAN_STRIP
 *	CONFIG_IS_SOURCE(address)	whether a sender (network byte order) may send; undefined where CONFIG_SOURCES is
 *				defined
 *	CONFIG_SOURCES		entries in the allow list of senders, where it is too long to be compared one by one
 *	CONFIG_IS_TARGET(address), CONFIG_TARGETS	the same of the addresses that it may be sent to
 *	CONFIG_SENDERS		defined where there is an allow list: there can be foreign senders
 *	CONFIG_SESSIONS		defined where sessions are counted
 *	CONFIG_ISOLATE		defined where decapsulated frames are marked, for bpf/isolate.c to keep them out of the host
 *	CONFIG_LANES		CPUs that decapsulated frames are spread over; undefined where they stay on the one they
 *				came to
 *	CONFIG_CPUS		CPUs that the machine can have, where CONFIG_LANES is defined
 *	CONFIG_SPREAD_PORTS	defined where ports count in that
 *	CONFIG_FRAGS		defined where a frame may be longer than the memory in one piece that it begins in
 */
#define BPF_LICENSE Dual BSD/GPL

#include <linux/types.h>
#include "shared.h"
#include "mark.h"
#include "packet.h"

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
/* A mirror session of a switch: between one pair of addresses the source port is what tells sessions apart. */
struct session_key {
	__be32 source;
	__be16 source_port;
	u16 zero;
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
#endif

/* Key of the allow lists: an IPv4 prefix. */
struct prefix {
	u32 length;		/* bits */
	__be32 address;
};

#ifdef CONFIG_SOURCES
BPF_LPM_TRIE(sources, struct prefix, u8, CONFIG_SOURCES);

static __always_inline bool is_source(__be32 address)
{
	struct prefix host = { .length = 32, .address = address };

	return sources.lookup(&host);
}
#else
static __always_inline bool is_source(__be32 address)
{
	return CONFIG_IS_SOURCE(address);
}
#endif

#ifdef CONFIG_TARGETS
BPF_LPM_TRIE(targets, struct prefix, u8, CONFIG_TARGETS);

static __always_inline bool is_target(__be32 address)
{
	struct prefix host = { .length = 32, .address = address };

	return targets.lookup(&host);
}
#else
static __always_inline bool is_target(__be32 address)
{
	return CONFIG_IS_TARGET(address);
}
#endif

#ifdef CONFIG_SENDERS
/* Foreign senders, whose source or whose target is not on the list, by source address. LRU as `sessions`. */
BPF_TABLE("lru_hash", __be32, struct sent, senders, MAX_SENDERS);
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

/*
 * A place in the packet. `left` is what is left of the content: once a datagram's length is known, padding behind it is
 * never taken for content. It is below 0 where headers reach into that padding. `data_end` is where the memory ends, as
 * the verifier wants to be asked.
 */
struct cursor {
	void *next;
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

/* One level of ERM: where it came from, and the mirrored frame's VLAN as the header has it (host byte order). */
struct wrapping {
	__be32 source;
	__be16 source_port;
	u32 tag;
};

/*
 * Takes the rest of one level of wrapping, behind an Ethernet header with this EtherType. VERDICT_DECAPSULATED: the
 * cursor stands on the mirrored frame. The allow lists are asked of the outermost level only; whoever takes a level
 * within asks for its source. Its target is another sensor's, of which nothing is configured here.
 */
static __always_inline enum verdict take_wrapping(struct cursor *cursor, int ethertype, struct wrapping *wrapping,
						  bool outermost)
{
	long header_length, total_length, udp_length;	/* signed: they are compared with what is left */
	struct cursor payload = *cursor;
	struct ipv4 *ip;
	struct udp *udp;
	struct erm *erm;
	u16 fragment;

	if (ethertype < 0)
		return VERDICT_TRUNCATED;
	if (ethertype != ETHERTYPE_IPV4)
		return VERDICT_OTHER;

	ip = take(&payload, sizeof(*ip));
	if (!ip)
		return VERDICT_TRUNCATED;
	header_length = (ip->version_ihl & 0xf) * 4;
	if (ip->version_ihl >> 4 != 4 || header_length < (long)sizeof(*ip))
		return VERDICT_MALFORMED;
	if (ip->protocol != PROTOCOL_UDP)
		return VERDICT_OTHER;
	/* Only a datagram's first fragment says which port it is for. Of the others nobody knows whose they are. */
	fragment = bpf_ntohs(ip->fragment);
	if (fragment & IPV4_FRAGMENT_OFFSET)
		return VERDICT_OTHER;

	payload.next = (void *)ip + header_length;
	udp = take(&payload, sizeof(*udp));
	if (!udp)
		return VERDICT_TRUNCATED;
	if (!CONFIG_IS_ERM_PORT(bpf_ntohs(udp->destination)))
		return VERDICT_OTHER;

	wrapping->source = ip->source;
	if (outermost && !is_source(ip->source))
		return VERDICT_FOREIGN_SOURCE;
	if (outermost && !is_target(ip->destination))
		return VERDICT_FOREIGN_TARGET;
	if (fragment & IPV4_MORE_FRAGMENTS)
		return VERDICT_FRAGMENT;

	total_length = bpf_ntohs(ip->total_length);
	udp_length = bpf_ntohs(udp->length);
	if (udp_length < (long)sizeof(*udp) || header_length + udp_length > total_length)
		return VERDICT_MALFORMED;
	if (total_length > cursor->left || udp_length < (long)(sizeof(*udp) + sizeof(*erm) + sizeof(struct ethernet)))
		return VERDICT_TRUNCATED;
	erm = take(&payload, sizeof(*erm));
	if (!erm)
		return VERDICT_TRUNCATED;

	wrapping->source_port = udp->source;
	wrapping->tag = bpf_ntohl(erm->tag);
	/* The datagram ends where UDP says. What follows is padding or a trailer, and no part of the mirrored frame. */
	cursor->next = payload.next;
	cursor->left = udp_length - sizeof(*udp) - sizeof(*erm);
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
	if (CONFIG_VLAN == VLAN_STRIP || !ERM_TAG_VLAN(tag))
		return false;
	return CONFIG_VLAN == VLAN_RESTORE || ERM_TAG_IS_TAGGED(tag);
}

/*
 * The 802.1Q tag control information, host byte order. ERM carries the switch's queue (traffic class), in which the
 * default class, PCP 0, ranks above the two background classes 1 and 2.
 */
static __always_inline u16 tag_control(u32 tag)
{
	u32 queue = ERM_TAG_PRIORITY(tag);
	u32 pcp = queue == 0 ? 1 : queue == 1 ? 2 : queue == 2 ? 0 : queue;

	return pcp << 13 | ERM_TAG_CFI(tag) << 12 | ERM_TAG_VLAN(tag);
}

/* Inserts the tag behind the two MAC addresses, which stand sizeof(struct vlan_tag) bytes further than they shall. */
static __always_inline void write_tag(struct xdp_md *ctx, u32 tag)
{
	u32 *word = (void *)(long)ctx->data;

	/* Only the verifier does not know that a whole Ethernet header and room for the tag are there. */
	if ((void *)(word + 4) > (void *)(long)ctx->data_end)
		return;
	word[0] = word[1];
	word[1] = word[2];
	word[2] = word[3];
	word[3] = bpf_htonl(ETHERTYPE_8021Q << 16 | tag_control(tag));
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
		struct ipv6_fragment *fragment;

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

/* Leaves exactly the mirrored frame, or the packet as it came. */
static __always_inline void decapsulate(struct xdp_md *ctx, long length, struct outcome *outcome)
{
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	/* `frame` stands on a frame, `packet` on what its Ethernet header carries. */
	struct cursor frame, packet = { .next = data, .data_end = data_end, .left = length };
	int ethertype = take_ethernet(&packet);
	struct wrapping innermost;
	long strip, trim;
	bool tagged;

	frame = packet;
	outcome->verdict = take_wrapping(&frame, ethertype, &outcome->outermost, true);
	if (outcome->verdict != VERDICT_DECAPSULATED)
		return;

	innermost = outcome->outermost;
	packet = frame;
	ethertype = take_ethernet(&packet);
	/* Whoever is mirrored can send ERM, too. It is another switch's, and peeled, only where that is configured. */
#pragma unroll
	for (int level = 1; level <= CONFIG_DEPTH; level++) {
		struct cursor next = packet;
		struct wrapping wrapping;

		if (take_wrapping(&next, ethertype, &wrapping, false) != VERDICT_DECAPSULATED)
			break;
		if (level == CONFIG_DEPTH || !is_source(wrapping.source)) {
			outcome->notes |= 1 << NOTE_NESTED_REFUSED;
			break;
		}
		outcome->notes |= 1 << NOTE_NESTED;
		innermost = wrapping;
		packet = frame = next;
		ethertype = take_ethernet(&packet);
	}
	if (is_inner_truncated(packet, ethertype))
		outcome->notes |= 1 << NOTE_INNER_TRUNCATED;
	outcome->flow = flow_hash(packet, ethertype);

	tagged = wants_tag(innermost.tag);
	strip = frame.next - data - (tagged ? sizeof(struct vlan_tag) : 0);
	trim = length - (frame.next - data) - frame.left;

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
	if (tagged)
		write_tag(ctx, innermost.tag);
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

static __always_inline void count_session(struct wrapping *outermost, u64 bytes)
{
	struct session_key key = { .source = outermost->source, .source_port = outermost->source_port };
	struct sent counted = { .packets = 1, .bytes = bytes, .last_seen = bpf_jiffies64() };
	u32 hash = (key.source ^ (u32)key.source_port << 16) * 0x9e3779b1 /* 2^32 / golden ratio */, zero = 0;
	struct own_sessions *places = own_sessions.lookup(&zero);
	struct own_session *own;

	if (!places)
		return;
	own = &places->at[(u64)hash * OWN_SESSIONS >> 32];
	if (own->key.source == key.source && own->key.source_port == key.source_port) {
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
static __always_inline void count_sender(__be32 source, u64 bytes)
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

int xdp_erm(struct xdp_md *ctx)
{
	long bytes = frame_length(ctx);
	struct outcome outcome = {};
	int action = XDP_PASS;

	decapsulate(ctx, bytes, &outcome);
	/* What is not in the first piece cannot be cut off: no helper reaches there. */
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
