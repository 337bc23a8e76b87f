# @TEST-DOC: In a datagram of less than 12 bytes SKIP sees what an earlier packet left there, the fallback does not.
#
# @TEST-REQUIRES: python3 -c 'import scapy.all'
# @TEST-REQUIRES: zeek -e 'exit(Version::at_least("9.0.0") ? 1 : 0)'
#
# @TEST-EXEC: make-trace stale stale.pcap
# @TEST-EXEC: zeek -r stale.pcap %INPUT ./skip.zeek > skip
# @TEST-EXEC: zeek -r stale.pcap %INPUT $XDP_ERM > fallback
# @TEST-EXEC: btest-diff skip
# @TEST-EXEC: btest-diff fallback

event arp_request(mac_src: string, mac_dst: string, SPA: addr, SHA: string, TPA: addr, THA: string)
	{
	print "ARP request from the grave", SPA, TPA;
	}

event zeek_done()
	{
	print "done";
	}

# @TEST-START-FILE skip.zeek
redef PacketAnalyzer::SKIP::skip_bytes = 12;
redef PacketAnalyzer::SKIP::default_analyzer = PacketAnalyzer::ANALYZER_ETHERNET;

event zeek_init()
	{
	PacketAnalyzer::register_for_ports(PacketAnalyzer::ANALYZER_UDP, PacketAnalyzer::ANALYZER_SKIP, set(7932/udp));
	}
# @TEST-END-FILE
