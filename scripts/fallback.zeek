##! Analyses ERM that reaches Zeek with its wrapping on: XDP is not attached, the outer packet was fragmented, or there
##! are more levels than XDP removes. To switch it off: ``redef XDP_ERM::fallback = F;``.
##!
##! The VLAN of the mirrored frame stands only in the ERM header, which this skips: inner flows have no VLAN here.

@load base/frameworks/packet-filter
@load base/protocols/conn
@load ./main

module XDP_ERM;

export {
	## Whether to analyse what is within ERM datagrams.
	const fallback = T &redef;

	## Whether conn.log gets rows for the ERM datagrams themselves when the fallback analyses what is within. Only rows
	## of one-way UDP flows to one of :zeek:see:`XDP_ERM::ports` are left out: nobody answers a switch's mirror.
	option log_outer = F;
}

@if ( Version::at_least("9.0.0") )

redef PacketAnalyzer::SKIP::skip_bytes = 12;
redef PacketAnalyzer::SKIP::default_analyzer = PacketAnalyzer::ANALYZER_ETHERNET;
const erm_analyzer = PacketAnalyzer::ANALYZER_SKIP;

@else

# Before 9.0 the SKIP analyzer does not check that there are as many bytes as it skips: a datagram of less than 12 would
# be read past its end. These three analyzers each skip four bytes and do check, and the last one goes on with an Ethernet
# frame. The first two look for a protocol number where ERM has zeros.
const erm_analyzer = PacketAnalyzer::ANALYZER_PPPSERIAL;

event zeek_init()
	{
	if ( ! fallback )
		return;

	PacketAnalyzer::register_packet_analyzer(PacketAnalyzer::ANALYZER_PPPSERIAL, 0, PacketAnalyzer::ANALYZER_NULL);
	PacketAnalyzer::register_packet_analyzer(PacketAnalyzer::ANALYZER_NULL, 0, PacketAnalyzer::ANALYZER_PBB);
	}

@endif

event zeek_init()
	{
	if ( fallback )
		PacketAnalyzer::register_for_ports(PacketAnalyzer::ANALYZER_UDP, erm_analyzer, ports);
	}

hook Conn::log_policy(rec: Conn::Info, id: Log::ID, filter: Log::Filter)
	{
	if ( fallback && ! log_outer && rec$id$resp_p in ports && ( ! rec?$resp_pkts || rec$resp_pkts == 0 ) )
		break;
	}
