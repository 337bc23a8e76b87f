/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * members IFACE COUNT WORK: fanout members that count, opened as Zeek's af_packet plugin opens them (TPACKET_V3 ring,
 * promiscuous, FANOUT_HASH), each with a thread that spends WORK nanoseconds on a packet, as a worker would.
 *
 * Says "ready", then answers each line on stdin with one: nanoseconds of CLOCK_MONOTONIC and, for each member since it
 * was opened, packets taken in, those of them that were still ERM, and packets the kernel dropped as the ring was full.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>

#define FANOUT_ID 23
#define BLOCK_SIZE (1 << 19)
#define BLOCKS 16		/* 8 MiB: some 14,000 frames of 512 bytes, little beside what a measurement sends */
#define BLOCK_TIMEOUT 10	/* ms, as the plugin's default */
#define ERM_PORT 7932

struct member {
	int socket;
	uint8_t *ring;
	unsigned long long packets, wrapped, dropped;
	pthread_t thread;
};

static long work;

static unsigned long long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ULL + time.tv_nsec;
}

static int is_erm(const uint8_t *frame, unsigned int length)
{
	/* The generator's wrapping has no VLAN tag and no IP options. */
	return length >= 38 && frame[12] == 8 && frame[13] == 0 && frame[23] == IPPROTO_UDP &&
	       (frame[36] << 8 | frame[37]) == ERM_PORT;
}

static void take(struct member *member, const struct tpacket_block_desc *block)
{
	const uint8_t *next = (const uint8_t *)block + block->hdr.bh1.offset_to_first_pkt;

	for (unsigned int i = 0; i < block->hdr.bh1.num_pkts; i++) {
		const struct tpacket3_hdr *header = (const void *)next;

		__atomic_fetch_add(&member->wrapped, is_erm(next + header->tp_mac, header->tp_snaplen), __ATOMIC_RELAXED);
		__atomic_fetch_add(&member->packets, 1, __ATOMIC_RELAXED);
		if (work)
			for (unsigned long long end = now() + work; now() < end;)
				;
		next += header->tp_next_offset;
	}
}

static void *run(void *argument)
{
	struct member *member = argument;
	struct pollfd ready = { .fd = member->socket, .events = POLLIN };

	for (unsigned int i = 0;; i = (i + 1) % BLOCKS) {
		struct tpacket_block_desc *block = (void *)(member->ring + (size_t)i * BLOCK_SIZE);

		while (!(__atomic_load_n(&block->hdr.bh1.block_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER))
			poll(&ready, 1, -1);
		take(member, block);
		__atomic_store_n(&block->hdr.bh1.block_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
	}
	return NULL;
}

static void set(int socket, int option, const void *value, socklen_t size)
{
	if (setsockopt(socket, SOL_PACKET, option, value, size))
		err(1, "packet socket option %d", option);
}

static void open_member(struct member *member, int interface)
{
	int version = TPACKET_V3, fanout = FANOUT_ID | PACKET_FANOUT_HASH << 16;
	struct tpacket_req3 request = {
		.tp_block_size = BLOCK_SIZE, .tp_block_nr = BLOCKS, .tp_frame_size = 2048,
		.tp_frame_nr = BLOCK_SIZE / 2048 * BLOCKS, .tp_retire_blk_tov = BLOCK_TIMEOUT,
	};
	struct sockaddr_ll address = {
		.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL), .sll_ifindex = interface,
	};
	struct packet_mreq promiscuous = { .mr_ifindex = interface, .mr_type = PACKET_MR_PROMISC };

	member->socket = socket(AF_PACKET, SOCK_RAW, 0);
	if (member->socket < 0)
		err(1, "packet socket");
	set(member->socket, PACKET_VERSION, &version, sizeof(version));
	set(member->socket, PACKET_RX_RING, &request, sizeof(request));
	member->ring = mmap(NULL, (size_t)BLOCK_SIZE * BLOCKS, PROT_READ | PROT_WRITE, MAP_SHARED, member->socket, 0);
	if (member->ring == MAP_FAILED)
		err(1, "ring");
	if (bind(member->socket, (void *)&address, sizeof(address)))
		err(1, "bind");
	set(member->socket, PACKET_ADD_MEMBERSHIP, &promiscuous, sizeof(promiscuous));
	set(member->socket, PACKET_FANOUT, &fanout, sizeof(fanout));
}

int main(int argc, char **argv)
{
	int count = argc == 4 ? atoi(argv[2]) : 0, interface = argc == 4 ? if_nametoindex(argv[1]) : 0;
	struct member *members = calloc(count, sizeof(*members));
	char line[16];

	if (count < 1 || !interface || !members)
		errx(2, "usage: members IFACE COUNT WORK");
	work = atol(argv[3]);
	for (int i = 0; i < count; i++)
		open_member(&members[i], interface);
	for (int i = 0; i < count; i++)
		if (pthread_create(&members[i].thread, NULL, run, &members[i]))
			errx(1, "no thread");
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		printf("%llu", now());
		for (int i = 0; i < count; i++) {
			struct tpacket_stats_v3 statistics;
			socklen_t size = sizeof(statistics);

			/* The kernel counts anew after each reading. */
			if (getsockopt(members[i].socket, SOL_PACKET, PACKET_STATISTICS, &statistics, &size))
				err(1, "statistics");
			members[i].dropped += statistics.tp_drops;
			printf(" %llu %llu %llu", __atomic_load_n(&members[i].packets, __ATOMIC_RELAXED),
			       __atomic_load_n(&members[i].wrapped, __ATOMIC_RELAXED), members[i].dropped);
		}
		puts("");
		fflush(stdout);
	}
	return 0;
}
