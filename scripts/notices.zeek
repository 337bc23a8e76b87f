##! Notices on the manager, or a standalone Zeek, when decapsulation or a switch's mirror session needs attention.

@load base/frameworks/notice
@load ./main

module XDP_ERM;

export {
	redef enum Notice::Type += {
		## What the XDP program takes off reaches Zeek with its wrapping on although it is attached to the interface.
		Undecapsulated,
		## An XDP program that was attached is not there any more.
		Program_Detached,
		## Packets come to an interface, and the XDP program attached to it sees none of them: the driver does not run it.
		Program_Not_Run,
		## No report came for an interface for :zeek:see:`XDP_ERM::publisher_silence`.
		Publisher_Silent,
		## A busy switch session sent nothing for :zeek:see:`XDP_ERM::session_silence`.
		Session_Silent,
		## More malformed or truncated ERM than :zeek:see:`XDP_ERM::malformed_rate`.
		Malformed_Traffic,
		## More ERM from or to addresses that are not allowed than :zeek:see:`XDP_ERM::foreign_rate`. Says who in ``sub``.
		Foreign_Traffic,
		## ERM within ERM, which a mirrored host can send as well as a switch: it was removed, or is left.
		Nested_Traffic,
		## Mirrored frames reach the host's own network stack although they are to be kept from it.
		Not_Isolated,
		## Mirrored frames reach Zeek with the VLAN tag that their wrapping had.
		Outer_Tagged,
		## A larger share of a session's frames is missing than :zeek:see:`XDP_ERM::loss_share`, by their numbers.
		Mirror_Loss,
		## A larger share of mirrored frames is cut than :zeek:see:`XDP_ERM::truncated_share`.
		Truncating_Session,
	};

	## How long the same notice is not repeated for the same host, interface and session. Each loss of a program is told,
	## and a silence that lasts longer than this.
	option suppression: interval = 1hr;

	## An XDP program that sees none of this many packets in each of two reports in a row is not run by the driver.
	option unseen_packets: count = 100;

	## How long a publisher may be silent. More than its ``--interval``, with room for a restart.
	const publisher_silence = 2min &redef;

	## A session is busy from this many packets in one report on.
	option busy_session_packets: count = 100;

	## How long a busy session may be silent; as long as the publisher's ``--interval``, where that is longer.
	const session_silence = 5min &redef;

	## Malformed and truncated packets per second that are too many.
	option malformed_rate: double = 1.0;

	## Packets per second from or to addresses that are not on the allow lists that are too many.
	option foreign_rate: double = 1.0;

	## The share (0 to 1) of decapsulated frames whose inner packet is cut that is too large.
	option truncated_share: double = 0.01;

	## The share (0 to 1) of a session's frames, missing ones included, that are missing that is too large.
	option loss_share: double = 0.001;
}

# The names by which interfaces are reported, by their alternative ones.
global reported_names: table[string, string] of string &write_expire=1day;

# A node saw, on the interface `iface` of `host`, what the XDP program takes off: a flow `id`, `seen` when its latest packet
# came. `session` is its number where it stands in the flow's ports, else 0.
global undecapsulated: event(seen: time, host: string, iface: string, encapsulation: string, session: count,
                             id: conn_id);

type Reporting: record {
	# Since when the program is attached.
	attached_at: time;
	# The number of the latest report.
	sequence: count;
};

# After how long it is looked again whether something that is told once can be told.
const look_again = 10sec &redef;

# Raises a notice of what is told once; while it is suppressed, later. Returns after how long; 0: it is raised.
function tell_once(notice: Notice::Info): interval
	{
	if ( Notice::is_being_suppressed(notice) )
		return look_again;

	NOTICE(notice);
	return 0sec;
	}

function publisher_silent(reporting: table[string, string] of Reporting, host: string, iface: string): interval
	{
	return tell_once(Notice::Info($note=Publisher_Silent,
	                              $msg=fmt("No xdp-erm report for %s on %s for %s: check there that \"xdp-erm publish\" " +
	                                       "runs (zeekctl cron restarts it) and what it says",
	                                       iface, host, publisher_silence),
	                              $identifier=cat_sep(" ", "", host, iface), $suppress_for=suppression));
	}

# Interfaces that report.
global reporting: table[string, string] of Reporting &write_expire=publisher_silence &expire_func=publisher_silent;

# ERM's sessions go by their number alone, as there was nothing else at first.
function session_name(encapsulation: string, id: count): string
	{
	return encapsulation == "erm" ? cat(id) : fmt("%s %d", encapsulation, id);
	}

function session_silent(busy: table[string, string, string, addr, count] of count, host: string, iface: string,
                        encapsulation: string, source: addr, id: count): interval
	{
	# Without reports nothing is known of the session.
	if ( [host, iface] !in reporting )
		return 0sec;

	if ( reporting[host, iface]$sequence == busy[host, iface, encapsulation, source, id] )
		return look_again;

	return tell_once(Notice::Info($note=Session_Silent, $src=source,
	                              $msg=fmt("Switch %s sent nothing in mirror session %s to %s on %s for %s: check on the " +
	                                       "switch that the session is not suspended, and that %s still answers its ARP " +
	                                       "requests",
	                                       source, session_name(encapsulation, id), iface, host, session_silence, host),
	                              $identifier=cat_sep(" ", "", host, iface, encapsulation, source, id),
	                              $suppress_for=suppression));
	}

# Busy sessions, and the number of the latest report that has them.
global busy: table[string, string, string, addr, count] of count &write_expire=session_silence &expire_func=session_silent;

# As many senders as publishers name.
const most_senders = 8;

type Foremost: record {
	sequence: count;
	senders: string;
};

# Who sent most of the foreign packets in the report that comes next.
global foremost: table[string, string] of Foremost &create_expire=1min;

event foreign_senders(version: count, sequence: count, host: string, interface: string, senders: vector of Sender,
                      others: count)
	{
	if ( version != protocol_version )
		return;

	local said: vector of string;
	for ( i, sender in senders )
		if ( i < most_senders )
			said += fmt("%d from %s", sender$packets, sender$source);
	local more = others > 0 ? fmt("; more senders: %d", others) : "";
	foremost[host, interface] = Foremost($sequence=sequence,
	                                     $senders=fmt("packets: %s%s", join_string_vec(said, ", "), more));
	}

# Who sent most of the foreign packets in a report, if that is known. The next report has others.
function take_foremost(r: Report): string
	{
	if ( [r$host, r$interface] !in foremost )
		return "";

	local said = foremost[r$host, r$interface];
	delete foremost[r$host, r$interface];
	return said$sequence == r$sequence ? said$senders : "";
	}

function rate(packets: count, r: Report): double
	{
	return packets / interval_to_double(r$ts_delta);
	}

# How many reports in a row an interface had that received packets of which its program saw none. In one alone they may
# have come between the looks at the interface's counter and at the program's.
global unseen: table[string, string] of count &default=0 &write_expire=1day;

function check_whether_it_runs(r: Report)
	{
	local seen = 0;
	for ( _, counter in r$verdicts )
		seen += counter$packets;

	if ( "received" !in r$others || r$others["received"] < unseen_packets || seen > 0 )
		{
		delete unseen[r$host, r$interface];
		return;
		}

	if ( ++unseen[r$host, r$interface] >= 2 )
		NOTICE(Notice::Info($note=Program_Not_Run,
		                    $msg=fmt("The XDP program on %s of %s has seen none of the last %d packets: the driver does " +
		                             "not run it; \"xdp-erm doctor %s\" says there what to do",
		                             r$interface, r$host, r$others["received"], r$interface),
		                    $identifier=cat_sep(" ", "", r$host, r$interface), $suppress_for=suppression));
	}

hook reported(r: Report)
	{
	reporting[r$host, r$interface] = Reporting($attached_at=r$attached_at, $sequence=r$sequence);
	if ( r?$other_names )
		for ( _, name in r$other_names )
			reported_names[r$host, name] = r$interface;

	check_whether_it_runs(r);
	local senders = take_foremost(r);

	for ( _, s in r$sessions )
		{
		if ( s$packets >= busy_session_packets ||
		     [r$host, r$interface, s$encapsulation, s$source, s$id] in busy )
			busy[r$host, r$interface, s$encapsulation, s$source, s$id] = r$sequence;

		if ( s?$gaps && s$gaps > loss_share * ( s$packets + s$gaps ) )
			NOTICE(Notice::Info($note=Mirror_Loss, $src=s$source,
			                    $msg=fmt("%d of %d frames of switch %s, session %s, are missing before %s of %s: see " +
			                             "where on the way they are dropped (a full link, the mirror's rate on the switch)",
			                             s$gaps, s$packets + s$gaps, s$source, session_name(s$encapsulation, s$id),
			                             r$interface, r$host),
			                    $identifier=cat_sep(" ", "", r$host, r$interface, s$encapsulation, s$source, s$id),
			                    $suppress_for=suppression));
		}

	if ( r$ts_delta <= 0sec )
		return;

	local malformed = rate(counted(r$verdicts, "malformed")$packets + counted(r$verdicts, "truncated")$packets, r);
	if ( malformed > malformed_rate )
		NOTICE(Notice::Info($note=Malformed_Traffic,
		                    $msg=fmt("%.1f malformed or truncated packets a second on %s of %s: check the MTU along the " +
		                             "path (ERM: 1554 or more) and who sends them",
		                             malformed, r$interface, r$host),
		                    $identifier=cat_sep(" ", "", r$host, r$interface), $suppress_for=suppression));

	local foreign = rate(counted(r$verdicts, "foreign_source")$packets +
	                     counted(r$verdicts, "foreign_target")$packets, r);
	if ( foreign > foreign_rate )
		{
		local notice = Notice::Info($note=Foreign_Traffic,
		                            $msg=fmt("%.1f mirror packets a second on %s of %s come from or go to addresses that " +
		                                     "are not configured: add the switch to sources, or find out who sends them",
		                                     foreign, r$interface, r$host),
		                            $identifier=cat_sep(" ", "", r$host, r$interface), $suppress_for=suppression);
		if ( senders != "" )
			notice$sub = senders;
		NOTICE(notice);
		}

	local nested = counted(r$notes, "nested")$packets;
	local refused = counted(r$notes, "nested_refused")$packets;
	if ( nested + refused > 0 )
		NOTICE(Notice::Info($note=Nested_Traffic,
		                    $msg=fmt("Mirrored frames on %s of %s are wrapped themselves (%d unwrapped, %d left wrapped): if a " +
		                             "switch of yours sends them, add it to sources and set depth; else find the host " +
		                             "in tunnel.log that hides its traffic so",
		                             r$interface, r$host, nested, refused),
		                    $identifier=cat_sep(" ", "", r$host, r$interface), $suppress_for=suppression));

	if ( "leaked" in r$others && r$others["leaked"] > 0 )
		NOTICE(Notice::Info($note=Not_Isolated,
		                    $msg=fmt("At least %d mirrored frames on %s have reached the network stack of %s itself, which " +
		                             "may answer them: \"xdp-erm doctor %s\" says there why",
		                             r$others["leaked"], r$interface, r$host, r$interface),
		                    $identifier=cat_sep(" ", "", r$host, r$interface), $suppress_for=suppression));

	if ( "outer_tagged" in r$others && r$others["outer_tagged"] > 0 )
		NOTICE(Notice::Info($note=Outer_Tagged,
		                    $msg=fmt("%d mirrored frames on %s of %s have the VLAN tag of their wrapping, which came beside " +
		                             "the frame: of a bridge or bond, attach to the part that they come in on; of a " +
		                             "veth, turn off txvlan of its other end",
		                             r$others["outer_tagged"], r$interface, r$host),
		                    $identifier=cat_sep(" ", "", r$host, r$interface), $suppress_for=suppression));

	local cut = counted(r$notes, "inner_truncated")$packets;
	local decapsulated = counted(r$verdicts, "decapsulated")$packets;
	if ( cut > truncated_share * decapsulated )
		NOTICE(Notice::Info($note=Truncating_Session,
		                    $msg=fmt("%d of %d mirrored frames on %s of %s are cut: raise the MTU along the path " +
		                             "(ERM: 1554 or more) and take \"truncation\" off the mirror session",
		                             cut, decapsulated, r$interface, r$host),
		                    $identifier=cat_sep(" ", "", r$host, r$interface), $suppress_for=suppression));
	}

hook program_detached(ts: time, host: string, interface: string, present: bool)
	{
	delete reporting[host, interface];

	local what = present ? fmt("run \"xdp-erm attach %s\" there", interface) : "the interface itself is gone";
	# Each loss is told at once, and only once: none is suppressed.
	NOTICE(Notice::Info($note=Program_Detached,
	                    $msg=fmt("The XDP program is no longer attached to %s of %s: %s", interface, host, what),
	                    $identifier=cat_sep(" ", "", host, interface), $suppress_for=0sec));
	}

event undecapsulated(seen: time, host: string, iface: string, encapsulation: string, session: count, id: conn_id)
	{
	if ( [host, iface] in reported_names )
		iface = reported_names[host, iface];

	# What came when the program was new may have come before it.
	if ( [host, iface] !in reporting || seen < reporting[host, iface]$attached_at + 5sec )
		return;

	NOTICE(Notice::Info($note=Undecapsulated, $id=id,
	                    $msg=fmt("%s of switch %s%s reaches Zeek undecapsulated although XDP is attached to %s of %s: see " +
	                             "which counters \"xdp-erm stats %s\" shows growing there (fragments, foreign addresses, " +
	                             "another port, more levels)",
	                             encapsulation, id$orig_h, session > 0 ? fmt(", session %d,", session) : "",
	                             iface, host, iface),
	                    $identifier=cat_sep(" ", "", host, iface, encapsulation, id$orig_h, session),
	                    $suppress_for=suppression));
	}

# After how long a flow that goes on is told again.
const tell_again = 1min &redef;

# So many are told at a time: a flood of made-up sources is not to become one of notices.
const most_undecapsulated = 100;

function send_undecapsulated(seen: time, encapsulation: string, session: count, id: conn_id)
	{
	# "af_packet::eth0" and "eth0" are the same interface.
	local iface = sub(packet_source()$path, /^.*::/, "");
	if ( Cluster::is_enabled() )
		Cluster::publish(Cluster::manager_topic, undecapsulated, seen, gethostname(), iface, encapsulation, session, id);
	else
		event undecapsulated(seen, gethostname(), iface, encapsulation, session, id);
	}

# A mirror session is one flow, which may begin before the program is attached or reports are there, and never end.
function still_undecapsulated(known: table[string, addr, count] of conn_id, encapsulation: string, source: addr,
                              session: count): interval
	{
	local id = known[encapsulation, source, session];
	if ( ! connection_exists(id) )
		return 0sec;

	local c = lookup_connection(id);
	send_undecapsulated(c$start_time + c$duration, encapsulation, session, id);
	return tell_again;
	}

# What is known to come undecapsulated, by a flow of it, so that not every flow is told.
global known_undecapsulated: table[string, addr, count] of conn_id &create_expire=tell_again
	&expire_func=still_undecapsulated;

function tell_undecapsulated(c: connection, encapsulation: string, session: count, id: conn_id)
	{
	if ( [encapsulation, id$orig_h, session] in known_undecapsulated || |known_undecapsulated| >= most_undecapsulated )
		return;

	known_undecapsulated[encapsulation, id$orig_h, session] = id;
	send_undecapsulated(c$start_time, encapsulation, session, id);
	}

event new_connection(c: connection)
	{
	if ( ! reading_live_traffic() )
		return;

	local id = c$id;
	if ( id$resp_p in ports )
		tell_undecapsulated(c, "ERM", port_to_count(id$orig_p), id);
	else if ( id$resp_p in tzsp_ports )
		tell_undecapsulated(c, "TZSP", port_to_count(id$orig_p), id);
	else if ( id$resp_p in vxlan_ports )
		tell_undecapsulated(c, "VXLAN", 0, id);
	else if ( id$resp_p in geneve_ports )
		tell_undecapsulated(c, "Geneve", 0, id);

	# GRE has no flow of its own, only flows within it.
	if ( gre && c?$tunnel && |c$tunnel| > 0 && c$tunnel[0]$tunnel_type == Tunnel::GRE )
		tell_undecapsulated(c, "GRE or ERSPAN", 0, c$tunnel[0]$cid);
	}
