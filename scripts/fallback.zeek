##! Analyses ERM that reaches Zeek with its wrapping on: XDP is not attached, the outer packet came in fragments, or
##! there are more levels than XDP removes. To switch it off: ``redef XDP_ERM::fallback = F;``.
##!
##! Inner flows name the switch's session in conn.log's ``tunnel_parents``, whose uid stands in ``tunnel.log``. They
##! have no VLAN: it is only in the ERM header, which is skipped here. ``Tunnel::max_depth`` limits the levels.
##!
##! After a datagram of less than 8 bytes, which is reported in analyzer.log, Zeek analyses nothing more of that session
##! until the session pauses for ``udp_inactivity_timeout``.
##!
##! The analyzer meant for such headers, SKIP, is not enough: before Zeek 9.0 it reads a datagram of less than 12 bytes
##! past its end, and in any version it loses what comes in fragments.

@load base/frameworks/tunnels
@load base/protocols/conn
@load ./main

module XDP_ERM;

export {
	## Whether to analyse what is within ERM datagrams.
	const fallback = T &redef;

	## Whether conn.log gets rows for the ERM datagrams themselves when the fallback analyses what is within. Only rows
	## of one-way UDP flows to one of :zeek:see:`XDP_ERM::ports` are left out: nobody answers a switch's mirror.
	option log_outer = F;

	## What the fallback is called in tunnel.log.
	redef enum Tunnel::Type += { ERM };
}

event zeek_init()
	{
	if ( ! fallback )
		return;

	# Whatever the number of the switch's session is, which is the source port, the switch is the originator.
	for ( p in ports )
		add likely_server_ports[p];

	# The first eight bytes of the ERM header read as a Geneve header without options, of payload type 0, which Geneve
	# does not use. The Geneve analyzer checks that they are there and makes what follows a packet of its own, as
	# reassembled fragments need it. The PBB analyzer skips the other four bytes, if an Ethernet header comes after them.
	PacketAnalyzer::register_for_ports(PacketAnalyzer::ANALYZER_UDP, PacketAnalyzer::ANALYZER_GENEVE, ports);
	PacketAnalyzer::register_packet_analyzer(PacketAnalyzer::ANALYZER_GENEVE, 0, PacketAnalyzer::ANALYZER_PBB);
	}

hook Conn::log_policy(rec: Conn::Info, id: Log::ID, filter: Log::Filter)
	{
	if ( ! fallback || rec$proto != udp || rec$id$resp_p !in ports )
		return;

	if ( ! log_outer && ( ! rec?$resp_pkts || rec$resp_pkts == 0 ) )
		break;

	if ( rec?$service )
		rec$service = sub(rec$service, /geneve/, "erm");
	}

hook Tunnel::log_policy(rec: Tunnel::Info, id: Log::ID, filter: Log::Filter)
	{
	if ( fallback && rec$tunnel_type == Tunnel::GENEVE && rec$id$resp_p in ports )
		rec$tunnel_type = ERM;
	}
