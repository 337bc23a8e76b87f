/* Preloaded, this gives each packet of a capture file memory of its own, of exactly its length, so that valgrind sees a
 * read past its end. libpcap itself reads all packets into one buffer of at least 2 KB. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>

struct pcap_pkthdr {
	struct timeval time;
	uint32_t captured_len;
	uint32_t len;
};

int pcap_next_ex(void *capture, struct pcap_pkthdr **header, const unsigned char **data)
{
	static int (*next)(void *, struct pcap_pkthdr **, const unsigned char **);
	static unsigned char *packet;
	int result;

	if (!next)
		next = dlsym(RTLD_NEXT, "pcap_next_ex");
	free(packet);
	packet = NULL;
	result = next(capture, header, data);
	if (result == 1) {
		packet = malloc((*header)->captured_len);
		if (!packet)
			abort();
		memcpy(packet, *data, (*header)->captured_len);
		*data = packet;
	}
	return result;
}
