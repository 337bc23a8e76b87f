/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * What the XDP program and Python both need to know, written once: xdp_erm_py/shared.py reads this file.
 * Plain lines only: "#define NAME NUMBER" and one enumerator per line.
 */
#ifndef XDP_ERM_SHARED_H
#define XDP_ERM_SHARED_H

/* In which the mirrored frame can come; a header for each is in bpf/encapsulations/. */
enum encapsulation {
	ENCAPSULATION_ERM,	/* HP ERM */
	ENCAPSULATION_ERSPAN,	/* ERSPAN I, II and III */
	ENCAPSULATION_GRE,	/* an Ethernet frame, or IP, within GRE */
	ENCAPSULATION_VXLAN,	/* VXLAN */
	ENCAPSULATION_GENEVE,	/* GENEVE */
	ENCAPSULATION_TZSP,	/* TZSP */
	ENCAPSULATION_COUNT
};

/* UDP destination ports, where nothing else is configured. */
#define ERM_DEFAULT_PORT 7932
#define VXLAN_DEFAULT_PORT 4789
#define GENEVE_DEFAULT_PORT 6081
#define TZSP_DEFAULT_PORT 37008

/* Fields of a TZSP header that are read at most; MikroTik sends one, which ends them. */
#define MAX_TZSP_FIELDS 4

/* Levels of wrapping that can be peeled. */
#define MAX_DEPTH 3

/*
 * Switch sessions that are remembered: each CPU's own, which keep their places while the last packet is less than so many
 * jiffies old (a jiffy is 1 to 10 ms), and those that found no place there, for all CPUs together.
 */
#define OWN_SESSIONS 256
#define OWN_JIFFIES 10000
#define MAX_SESSIONS 1024

/*
 * A number further than LEAP from the one before is a leap. Ahead, by MOST_MISSING at most (a second at 10 Gbit/s), it is
 * loss, which is settled LEAP frames later. Any other says that the sender numbers anew, or that several number one
 * session, each for itself, as line cards of a switch do: then no leap that is not settled is loss.
 */
#define LEAP 4096
#define MOST_MISSING 1048576

/* Addresses that are remembered of those that sent what the allow lists keep out. */
#define MAX_SENDERS 1024

/* What becomes of the mirrored frame's 802.1Q tag, which survives only in the ERM header. */
#define VLAN_RESTORE 0
#define VLAN_TAGGED 1
#define VLAN_STRIP 2

/* "ERM1": the XDP metadata of a decapsulated frame, by which bpf/isolate.c knows it. */
#define MARK 1163021617

/* Stands for the kernel's function bpf_xdp_pull_data until the program is loaded: no helper has this number. */
#define CALL_PULL_DATA 1886727276

/*
 * Each packet gets exactly one verdict. Only `decapsulated` changes the packet; with every other one it goes on
 * exactly as it came.
 */
enum verdict {
	VERDICT_DECAPSULATED,	/* the wrapping is gone, the mirrored frame is left */
	VERDICT_OTHER,	/* ARP, IPv6, TCP, UDP to another port or to none, as later fragments are: not ours */
	VERDICT_FRAGMENT,	/* the first fragment of a mirror's packet: XDP cannot reassemble */
	VERDICT_TRUNCATED,	/* the bytes end before what the headers promise or need */
	VERDICT_MALFORMED,	/* header fields that contradict each other */
	VERDICT_EXTENSION,	/* IPv6 with an extension header before UDP or GRE, but an encapsulation limit: not looked into */
	VERDICT_FOREIGN_SOURCE,	/* mirrored by a source that is not on the allow list */
	VERDICT_FOREIGN_TARGET,	/* mirrored to a target that is not on the allow list */
	VERDICT_FAILED,		/* a kernel helper refused */
	VERDICT_UNMARKED,	/* the driver has no room for the mark that keeps the frame out of the host */
	VERDICT_COUNT
};

/* Counted beside the verdict `decapsulated`, never instead of it; their numbers go on after the verdicts'. */
enum note {
	NOTE_NESTED = VERDICT_COUNT,	/* more than one level of wrapping was peeled */
	NOTE_NESTED_REFUSED,		/* the frame that is left is wrapped itself: too deep, or not from an allowed source */
	NOTE_INNER_TRUNCATED,		/* the mirrored IP packet says it is longer than the bytes that came */
	COUNTER_COUNT
};

#endif
