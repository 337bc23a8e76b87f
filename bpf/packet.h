/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The headers the XDP program reads, as they are on the wire (big endian).
 * Written here rather than taken from the kernel's headers, so that attaching needs no header package.
 */
#ifndef XDP_ERM_PACKET_H
#define XDP_ERM_PACKET_H

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd
#define ETHERTYPE_8021Q 0x8100
#define ETHERTYPE_8021AD 0x88a8
#define ETHERTYPE_BRIDGING 0x6558	/* an Ethernet frame within GRE or GENEVE */
#define ETHERTYPE_ERSPAN 0x88be
#define ETHERTYPE_ERSPAN_III 0x22eb
#define PROTOCOL_HOP_BY_HOP 0
#define PROTOCOL_ICMP 1
#define PROTOCOL_TCP 6
#define PROTOCOL_UDP 17
#define PROTOCOL_ROUTING 43
#define PROTOCOL_FRAGMENT 44
#define PROTOCOL_GRE 47
#define PROTOCOL_AUTHENTICATION 51
#define PROTOCOL_ICMPV6 58
#define PROTOCOL_DESTINATION 60

#define MAX_VLAN_TAGS 2

struct ethernet {
	u8 destination[6];
	u8 source[6];
	__be16 ethertype;
};

struct vlan_tag {
	__be16 tci;
	__be16 ethertype;
};

struct ipv4 {
	u8 version_ihl;
	u8 tos;
	__be16 total_length;
	__be16 id;
	__be16 fragment;
	u8 ttl;
	u8 protocol;
	__be16 checksum;
	__be32 source;
	__be32 destination;
};

#define IPV4_MORE_FRAGMENTS 0x2000
#define IPV4_FRAGMENT_OFFSET 0x1fff

struct ipv6 {
	__be32 version_class_flow;
	__be16 payload_length;
	u8 next_header;
	u8 hop_limit;
	__be32 source[4];
	__be32 destination[4];
};

/* As all of them begin but ESP, which hides what comes next. */
struct ipv6_extension {
	u8 next_header;
	u8 length;		/* of destination options: what follows, in 8 bytes */
	u8 unused[6];
};

struct icmp {
	u8 type;
	u8 unused[7];
};

/* Destination unreachable, source quench, redirect, time exceeded, parameter problem. */
#define ICMP_IS_ERROR(type) ((type) >= 3 && (type) <= 12 && (1 << (type) & 0x1838))
#define ICMPV6_FIRST_INFORMATIONAL 128

/* TCP and UDP begin with them. */
struct ports {
	__be16 source;
	__be16 destination;
};

struct udp {
	__be16 source;
	__be16 destination;
	__be16 length;
	__be16 checksum;
};

/* RFC 2784 and 2890. Behind it 4 bytes each for checksum, key and sequence number, where the flags say so. */
struct gre {
	__be16 flags;
	__be16 type;
};

#define GRE_CHECKSUM 0x8000
#define GRE_ROUTING 0x4000
#define GRE_KEY 0x2000
#define GRE_SEQUENCE 0x1000
#define GRE_VERSION 0x0007

#endif
