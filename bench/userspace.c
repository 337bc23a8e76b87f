/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * userspace IFACE TAP: what one would write without XDP. Takes ERM off a packet ring and writes the mirrored frames to
 * a tap interface, where the members read. It does less than the XDP program: one level, no VLAN, no counters.
 *
 * Says "ready" when the tap is up; runs until it is killed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define BLOCK_SIZE (1 << 19)
#define BLOCKS 16
#define ERM_PORT 7932
#define WRAPPING 54	/* Ethernet 14, IPv4 20, UDP 8, ERM 12 */

static int open_tap(const char *name)
{
	struct ifreq request = { .ifr_flags = IFF_TAP | IFF_NO_PI };
	int tap = open("/dev/net/tun", O_RDWR), control = socket(AF_INET, SOCK_DGRAM, 0);

	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	if (tap < 0 || ioctl(tap, TUNSETIFF, &request))
		err(1, "tap %s", name);
	request.ifr_mtu = 3500;
	if (ioctl(control, SIOCSIFMTU, &request))
		err(1, "MTU of %s", name);
	request.ifr_flags = IFF_UP;
	if (ioctl(control, SIOCSIFFLAGS, &request))
		err(1, "%s up", name);
	close(control);
	return tap;
}

static int open_ring(const char *name, uint8_t **ring)
{
	int version = TPACKET_V3, packets = socket(AF_PACKET, SOCK_RAW, 0);
	struct tpacket_req3 request = {
		.tp_block_size = BLOCK_SIZE, .tp_block_nr = BLOCKS, .tp_frame_size = 2048,
		.tp_frame_nr = BLOCK_SIZE / 2048 * BLOCKS, .tp_retire_blk_tov = 10,
	};
	struct sockaddr_ll address = {
		.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL), .sll_ifindex = if_nametoindex(name),
	};

	if (packets < 0 || setsockopt(packets, SOL_PACKET, PACKET_VERSION, &version, sizeof(version)) ||
	    setsockopt(packets, SOL_PACKET, PACKET_RX_RING, &request, sizeof(request)))
		err(1, "packet ring");
	*ring = mmap(NULL, (size_t)BLOCK_SIZE * BLOCKS, PROT_READ | PROT_WRITE, MAP_SHARED, packets, 0);
	if (*ring == MAP_FAILED || bind(packets, (void *)&address, sizeof(address)))
		err(1, "%s", name);
	return packets;
}

static void forward(int tap, const uint8_t *frame, unsigned int length)
{
	if (length < WRAPPING + 14 || frame[12] != 8 || frame[13] || frame[14] != 0x45 || frame[23] != IPPROTO_UDP ||
	    (frame[36] << 8 | frame[37]) != ERM_PORT)
		return;
	if (write(tap, frame + WRAPPING, length - WRAPPING) < 0)
		err(1, "tap");
}

int main(int argc, char **argv)
{
	uint8_t *ring;
	int tap, packets;
	struct pollfd ready;

	if (argc != 3)
		errx(2, "usage: userspace IFACE TAP");
	tap = open_tap(argv[2]);
	packets = open_ring(argv[1], &ring);
	ready = (struct pollfd) { .fd = packets, .events = POLLIN };
	puts("ready");
	fflush(stdout);
	for (unsigned int i = 0;; i = (i + 1) % BLOCKS) {
		struct tpacket_block_desc *block = (void *)(ring + (size_t)i * BLOCK_SIZE);
		const uint8_t *next;

		while (!(__atomic_load_n(&block->hdr.bh1.block_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER))
			poll(&ready, 1, -1);
		next = (const uint8_t *)block + block->hdr.bh1.offset_to_first_pkt;
		for (unsigned int n = block->hdr.bh1.num_pkts; n; n--) {
			const struct tpacket3_hdr *header = (const void *)next;

			forward(tap, next + header->tp_mac, header->tp_snaplen);
			next += header->tp_next_offset;
		}
		__atomic_store_n(&block->hdr.bh1.block_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
	}
}
