##! What Zeek does with ERM that reaches it with its wrapping on: XDP is not attached, the outer packet came in fragments,
##! or there are more levels than XDP removes. ``redef XDP_ERM::fallback`` chooses one of three:
##!
##! ``TUNNEL``: analyses what is within. Inner flows name the switch's session in conn.log's ``tunnel_parents``, whose uid
##! stands in ``tunnel.log``; the ERM datagrams themselves have no row in conn.log. ``Tunnel::max_depth`` limits the
##! levels. After a datagram of less than 8 bytes, which is reported in analyzer.log, Zeek analyses nothing more of that
##! session until the session pauses for ``udp_inactivity_timeout``.
##!
##! ``SKIP``: skips the 12 bytes of the ERM header with Zeek's SKIP analyzer, whose only setting is one for all of Zeek:
##! ``@load packages/xdp-erm/skip`` chooses it and makes that setting. Nothing says which inner flow came within what, so
##! the ERM datagrams have rows of their own. What comes in fragments is lost, and before Zeek 9.0 a datagram of less
##! than 12 bytes is read past its end.
##!
##! ``NONE``: leaves it as it is.
##!
##! Inner flows have no VLAN: it is only in the ERM header, which is not read here.

@load base/frameworks/analyzer
@load base/frameworks/reporter
@load base/frameworks/tunnels
@load base/misc/version
@load base/packet-protocols
@load base/protocols/conn
@load ./main

module XDP_ERM;

export {
	## Analyse it as tunnels are.
	const TUNNEL = "TUNNEL";
	## Skip the ERM header, as if it were not there.
	const SKIP = "SKIP";
	## Leave it as it is.
	const NONE = "NONE";

	## Which of them is done. ``T`` is :zeek:see:`XDP_ERM::TUNNEL`, ``F`` is :zeek:see:`XDP_ERM::NONE`, as before there
	## was a choice.
	const fallback: any = TUNNEL &redef;

	## Whether conn.log gets rows for the ERM datagrams themselves where it has rows for what is within them. Only rows
	## of one-way UDP flows to one of :zeek:see:`XDP_ERM::ports` are left out: nobody answers a switch's mirror.
	option log_outer = F;

	## What the fallback ``TUNNEL`` is called in tunnel.log.
	redef enum Tunnel::Type += { ERM };
}

# Bytes of an ERM header.
const header_length = 12;

# What zeek_init has set up.
global in_use = NONE;

redef record Conn::Info += {
	# Whether it is of ERM datagrams in which flows were found that have rows of their own.
	erm_analysed: bool &default=F;
};

function chosen(): string
	{
	local choice = fallback is bool ? ( ( fallback as bool ) ? TUNNEL : NONE ) : cat(fallback);
	if ( choice !in set(TUNNEL, SKIP, NONE) )
		Reporter::fatal(fmt("XDP_ERM::fallback is %s: it must be XDP_ERM::TUNNEL, XDP_ERM::SKIP or XDP_ERM::NONE", choice));

	return choice;
	}

# Whether the SKIP analyzer is set to what ERM needs. Says what is wrong, or what it lacks.
function skip_fits(): bool
	{
	if ( PacketAnalyzer::SKIP::skip_bytes != header_length ||
	     PacketAnalyzer::SKIP::default_analyzer != PacketAnalyzer::ANALYZER_ETHERNET )
		{
		Reporter::warning(fmt("XDP_ERM: TUNNEL is in use instead of SKIP, because Zeek's SKIP analyzer, which has one " +
		                      "setting for everything, skips %d bytes before %s, and ERM needs %d before %s: %s",
		                      PacketAnalyzer::SKIP::skip_bytes, PacketAnalyzer::SKIP::default_analyzer,
		                      header_length, PacketAnalyzer::ANALYZER_ETHERNET,
		                      PacketAnalyzer::SKIP::skip_bytes == 0 ?
		                      "add \"@load packages/xdp-erm/skip\" to local.zeek" : "another script has set it"));
		return F;
		}

	if ( ! Version::at_least("9.0.0") )
		Reporter::warning("XDP_ERM: before Zeek 9.0 the SKIP analyzer reads ERM datagrams of less than 12 bytes past " +
		                  "their end: prefer XDP_ERM::TUNNEL, or Zeek 9.0");

	return T;
	}

# Says which packet analyzers other scripts register for our ports: a port has only one.
function name_rivals(ours: PacketAnalyzer::Tag)
	{
	for ( other, registered in Analyzer::all_registered_ports() )
		if ( Analyzer::kind(other) == "packet" && Analyzer::name(other) != Analyzer::name(ours) )
			for ( p in registered & ports )
				Reporter::warning(fmt("XDP_ERM: another script registers packet analyzer %s for %s, where " +
				                      "XDP_ERM::fallback, %s, is in use instead: take that out, or redef " +
				                      "XDP_ERM::fallback = XDP_ERM::NONE", Analyzer::name(other), p, in_use));
	}

# After others' scripts, so that XDP_ERM::fallback counts whichever is loaded first.
event zeek_init() &priority=-10
	{
	in_use = chosen();
	if ( in_use == SKIP && ! skip_fits() )
		in_use = TUNNEL;
	if ( in_use == NONE )
		return;

	# Zeek's own analyzers, on the ports that XDP was told of. It has none for TZSP, and needs no port for GRE and ERSPAN.
	PacketAnalyzer::register_for_ports(PacketAnalyzer::ANALYZER_UDP, PacketAnalyzer::ANALYZER_VXLAN, vxlan_ports);
	PacketAnalyzer::register_for_ports(PacketAnalyzer::ANALYZER_UDP, PacketAnalyzer::ANALYZER_GENEVE, geneve_ports);

	# Whatever the source port is, which ERM's session has for a number, the switch is the originator.
	for ( p in ports | vxlan_ports | geneve_ports )
		add likely_server_ports[p];

	local analyzer = in_use == SKIP ? PacketAnalyzer::ANALYZER_SKIP : PacketAnalyzer::ANALYZER_GENEVE;
	name_rivals(analyzer);
	PacketAnalyzer::register_for_ports(PacketAnalyzer::ANALYZER_UDP, analyzer, ports);

	# The first eight bytes of the ERM header read as a Geneve header without options, of payload type 0, which Geneve
	# does not use. The Geneve analyzer checks that they are there and makes what follows a packet of its own, as
	# reassembled fragments need it. The PBB analyzer skips the other four bytes, if an Ethernet header comes after them.
	if ( in_use == TUNNEL )
		PacketAnalyzer::register_packet_analyzer(PacketAnalyzer::ANALYZER_GENEVE, 0, PacketAnalyzer::ANALYZER_PBB);
	}

# Before the row is written and the tunnel is closed. Where nothing was found within, another script's analyzer has the
# port or the payload type after all, or there was nothing to find: the row stays.
event connection_state_remove(c: connection) &priority=1
	{
	if ( c$id$resp_p in ports && c$id in Tunnel::active )
		c$conn$erm_analysed = T;
	}

hook Conn::log_policy(rec: Conn::Info, id: Log::ID, filter: Log::Filter)
	{
	if ( in_use != TUNNEL || rec$proto != udp || rec$id$resp_p !in ports )
		return;

	if ( rec$erm_analysed && ! log_outer && ( ! rec?$resp_pkts || rec$resp_pkts == 0 ) )
		break;

	if ( rec?$service )
		rec$service = sub(rec$service, /geneve/, "erm");
	}

hook Tunnel::log_policy(rec: Tunnel::Info, id: Log::ID, filter: Log::Filter)
	{
	if ( in_use == TUNNEL && rec$tunnel_type == Tunnel::GENEVE && rec$id$resp_p in ports )
		rec$tunnel_type = ERM;
	}
