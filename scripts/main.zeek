##! Statistics of xdp-erm, which strips HP ERM from mirrored traffic in XDP before Zeek's packet source sees it.
##!
##! On each host ``xdp-erm publish`` sends one report per interface and interval. The manager, or a standalone Zeek,
##! writes it to ``xdp_erm.log`` and ``xdp_erm_sessions.log`` and acknowledges it; the publisher repeats what was not
##! acknowledged.

@load base/frameworks/cluster
@load base/frameworks/logging
@load base/frameworks/reporter

module XDP_ERM;

export {
	redef enum Log::ID += { LOG, SESSIONS_LOG };

	## Policy hook of ``xdp_erm.log``.
	global log_policy: Log::PolicyHook;

	## Policy hook of ``xdp_erm_sessions.log``.
	global log_policy_sessions: Log::PolicyHook;

	## The UDP ports that carry ERM, VXLAN, Geneve and TZSP from the switches: the same as configured for the XDP program,
	## none where it does not take them off.
	const ports: set[port] = { 7932/udp } &redef;
	const vxlan_ports: set[port] = {} &redef;
	const geneve_ports: set[port] = {} &redef;
	const tzsp_ports: set[port] = {} &redef;

	## Whether the XDP program takes off GRE or ERSPAN.
	const gre = F &redef;

	## The form of the events below. A report of another version is refused. Another counter is no other form.
	const protocol_version = 2;

	## Where publishers send reports to, and where they wait for the acknowledgement.
	const report_topic = "zeek.xdp_erm.report";
	const acknowledgement_topic = "zeek.xdp_erm.acknowledgement";

	## What one counter of the XDP program counted in an interval.
	type Counter: record {
		## Packets.
		packets: count &log;
		## Bytes of their frames as they arrived, wrapping included.
		bytes: count &log;
	};

	## How long the reports of an interface are added up for one row in ``xdp_erm.log``, and for one of each session in
	## ``xdp_erm_sessions.log``. 0: each report has rows of its own. A publisher's first report has them in any case.
	option log_interval = 5min;

	## What one mirror session sent in an interval.
	type Session: record {
		## ``erm``, ``erspan``, ``gre``, ``vxlan``, ``geneve`` or ``tzsp``.
		encapsulation: string;
		## The outer source address: the switch.
		source: addr;
		## What tells the sessions of a switch apart: the outer UDP source port (ERM, TZSP), ERSPAN's session id, the
		## key (GRE) or the VNI (VXLAN, GENEVE).
		id: count;
		## Packets and bytes, as in :zeek:see:`XDP_ERM::Counter`.
		packets: count;
		bytes: count;
		## When its latest packet came.
		last_seen: time;
		## Frames that are missing by their numbers; unset where the session has none.
		gaps: count &optional;
		## Frames that came behind one with a higher number, likewise.
		reordered: count &optional;
	};

	## One report of a publisher.
	type Report: record {
		## See :zeek:see:`XDP_ERM::protocol_version`.
		version: count;
		## Tells the reports for one interface apart. The upper 32 bits are the publisher's, another number each time that
		## it starts; the lower 32 bits grow from report to report.
		sequence: count;
		## The end of the interval.
		ts: time;
		## The host's name.
		host: string;
		## The interface's name.
		interface: string;
		## ``native`` or ``generic`` XDP.
		mode: string;
		## Since when the program is attached.
		attached_at: time;
		## The length of the interval: since the last report, or since the program was attached.
		ts_delta: interval;
		## By verdict, of which every packet has exactly one: those of :zeek:see:`XDP_ERM::Info`, and what a newer
		## publisher has besides.
		verdicts: table[string] of Counter;
		## Notes on packets whose verdict was ``decapsulated``, likewise.
		notes: table[string] of Counter;
		## What was counted elsewhere than in the program, likewise. What is not known is not there.
		others: table[string] of count;
		## The sessions that sent something in the interval.
		sessions: vector of Session;
		## Alternative names of the interface, by which Zeek may capture from it.
		other_names: vector of string &optional;
	};

	## A sender of ERM from or to addresses that are not on the allow lists.
	type Sender: record {
		## Its outer source address, which may be forged.
		source: addr;
		## Packets and bytes, as in :zeek:see:`XDP_ERM::Counter`.
		packets: count;
		bytes: count;
	};

	## The columns of ``xdp_erm.log``. Its interval is that of all reports which are added up in the row.
	type Info: record {
		## The end of the interval.
		ts: time &log;
		## The host's name.
		host: string &log;
		## The interface's name.
		interface: string &log;
		## ``native`` or ``generic`` XDP.
		mode: string &log;
		## The length of the interval.
		ts_delta: interval &log;
		## The wrapping was removed.
		decapsulated: Counter &log;
		## Not ERM: passed on untouched, as with all verdicts that follow.
		other: Counter &log;
		## The first fragment of an ERM datagram, which XDP cannot reassemble.
		fragment: Counter &log;
		## The bytes end before what the headers promise or ERM needs.
		truncated: Counter &log;
		## Header fields contradict each other.
		malformed: Counter &log;
		## IPv6 with an extension header before UDP or GRE, but an encapsulation limit, which is not looked into.
		extension: Counter &log;
		## The outer source is not on the allow list.
		foreign_source: Counter &log;
		## The outer destination is not on the allow list.
		foreign_target: Counter &log;
		## A kernel helper refused.
		failed: Counter &log;
		## The driver has no room for the mark that keeps the frame out of the host.
		unmarked: Counter &log;
		## Of the decapsulated: ERM within ERM, more than one level was removed.
		nested: Counter &log;
		## Of the decapsulated: the frame that is left is ERM itself, deeper than configured or not from an allowed source.
		nested_refused: Counter &log;
		## Of the decapsulated: the mirrored IP packet is longer than what came of it, the mirror session truncates.
		inner_truncated: Counter &log;
		## How many switch sessions sent something.
		sessions: count &log;
		## Decapsulated packets as a share (0 to 1) of all but ``other`` and ``extension``; unset if there
		## were none.
		decapsulated_share: double &log &optional;
		## Packets that the interface received and the host dropped, where known.
		host_drops: count &log &optional;
		## Decapsulated packets that the queues to other CPUs had no room for, where they are spread so (``cpumap``).
		queue_drops: count &log &optional;
		## Packets that the interface received, where known: as many as the program counted, if the driver runs it.
		received: count &log &optional;
		## Frames that the interface could not receive: too long, or damaged.
		receive_errors: count &log &optional;
		## Decapsulated packets that reached the host's own network stack, at least, where they are to be kept from it.
		leaked: count &log &optional;
		## Decapsulated packets that reached Zeek with the VLAN tag of their wrapping.
		outer_tagged: count &log &optional;
	};

	## The columns of ``xdp_erm_sessions.log``, likewise.
	type SessionInfo: record {
		## The end of the interval.
		ts: time &log;
		## The host's name.
		host: string &log;
		## The interface's name.
		interface: string &log;
		## ``erm``, ``erspan``, ``gre``, ``vxlan``, ``geneve`` or ``tzsp``.
		encapsulation: string &log;
		## The outer source address: the switch.
		source: addr &log;
		## What tells the sessions of a switch apart, as in :zeek:see:`XDP_ERM::Session`.
		id: count &log;
		## Packets of the session in the interval.
		packets: count &log;
		## Bytes of their frames as they arrived, wrapping included.
		bytes: count &log;
		## When its latest packet came.
		last_seen: time &log;
		## Frames that are missing by their numbers; unset where the session has none.
		gaps: count &log &optional;
		## Frames that came behind one with a higher number, likewise.
		reordered: count &log &optional;
	};

	## Raised for each row of ``xdp_erm.log``.
	global log_xdp_erm: event(rec: Info);

	## Raised for each row of ``xdp_erm_sessions.log``.
	global log_xdp_erm_sessions: event(rec: SessionInfo);

	## From a publisher: the counts of one interface in one interval.
	global report: event(r: Report);

	## From a publisher, right before a report: who sent most of the foreign packets in it. An event of its own, so that
	## packages and publishers of versions without it can still exchange reports. It is not acknowledged.
	##
	## version, sequence, host, interface: as in the report.
	##
	## senders: those with most packets first.
	##
	## others: how many more there were.
	global foreign_senders: event(version: count, sequence: count, host: string, interface: string,
	                              senders: vector of Sender, others: count);

	## From a publisher: a program that was attached is not there any more.
	##
	## version, sequence, ts, host, interface: as in :zeek:see:`XDP_ERM::Report`.
	##
	## present: whether the interface still exists.
	global detached: event(version: count, sequence: count, ts: time, host: string, interface: string, present: bool);

	## To the publisher of a host: this report or message is dealt with.
	global acknowledged: event(host: string, interface: string, sequence: count);

	## Each report, once, on the node that logs it.
	global reported: hook(r: Report);

	## Each loss of a program, once, on the node that logs.
	global program_detached: hook(ts: time, host: string, interface: string, present: bool);

	## A counter of a report by name; nothing counted, where the publisher does not know it.
	global counted: function(counters: table[string] of Counter, name: string): Counter;
}

# The latest report of each interface and publisher: one that missed our acknowledgement sends it again. Entries go
# after a day, so that publishers and names which no longer report, or never were real, do not pile up.
global last_sequence: table[string, string, count] of count &write_expire=1day;

# The next rows of an interface.
type Rows: record {
	# The reports so far, as one. Its number is that of the first, its sessions are elsewhere.
	sum: Report;
	sessions: table[string, addr, count] of Session;
};

global pending: table[string, string] of Rows;

# Whether Zeek is ending, so that there will be no time to add anything to.
global ending = F;

event zeek_init() &priority=5
	{
	Log::create_stream(LOG, Log::Stream($columns=Info, $path="xdp_erm", $policy=log_policy, $ev=log_xdp_erm));
	Log::create_stream(SESSIONS_LOG, Log::Stream($columns=SessionInfo, $path="xdp_erm_sessions",
	                                             $policy=log_policy_sessions, $ev=log_xdp_erm_sessions));

	if ( ! Cluster::is_enabled() || Cluster::local_node_type() == Cluster::MANAGER )
		Cluster::subscribe(report_topic);
	}

function publisher_of(sequence: count): count
	{
	return sequence / 4294967296;
	}

# Whether a message is to be worked on: it is of our version and was not seen before. Acknowledges what it takes.
function accept(version: count, host: string, iface: string, sequence: count): bool
	{
	if ( version != protocol_version )
		{
		Reporter::warning(fmt("XDP_ERM: %s sends reports of version %d, this Zeek package knows version %d: " +
		                      "install the same xdp-erm on both", host, version, protocol_version));
		return F;
		}

	Cluster::publish(acknowledgement_topic, acknowledged, host, iface, sequence);

	local publisher = publisher_of(sequence);
	if ( [host, iface, publisher] in last_sequence && sequence <= last_sequence[host, iface, publisher] )
		return F;

	last_sequence[host, iface, publisher] = sequence;
	return T;
	}

function counted(counters: table[string] of Counter, name: string): Counter
	{
	return name in counters ? counters[name] : Counter($packets=0, $bytes=0);
	}

function write(rows: Rows)
	{
	local r = rows$sum;
	local info = Info($ts=r$ts, $host=r$host, $interface=r$interface, $mode=r$mode, $ts_delta=r$ts_delta,
	                  $decapsulated=counted(r$verdicts, "decapsulated"), $other=counted(r$verdicts, "other"),
	                  $fragment=counted(r$verdicts, "fragment"), $truncated=counted(r$verdicts, "truncated"),
	                  $malformed=counted(r$verdicts, "malformed"), $extension=counted(r$verdicts, "extension"),
	                  $foreign_source=counted(r$verdicts, "foreign_source"),
	                  $foreign_target=counted(r$verdicts, "foreign_target"), $failed=counted(r$verdicts, "failed"),
	                  $unmarked=counted(r$verdicts, "unmarked"), $nested=counted(r$notes, "nested"),
	                  $nested_refused=counted(r$notes, "nested_refused"),
	                  $inner_truncated=counted(r$notes, "inner_truncated"),
	                  $sessions=|rows$sessions|);

	local erm = 0;
	for ( verdict, counter in r$verdicts )
		if ( verdict != "other" && verdict != "extension" )
			erm += counter$packets;
	if ( erm > 0 )
		info$decapsulated_share = 1.0 * info$decapsulated$packets / erm;

	if ( "host_drops" in r$others )
		info$host_drops = r$others["host_drops"];
	if ( "queue_drops" in r$others )
		info$queue_drops = r$others["queue_drops"];
	if ( "received" in r$others )
		info$received = r$others["received"];
	if ( "receive_errors" in r$others )
		info$receive_errors = r$others["receive_errors"];
	if ( "leaked" in r$others )
		info$leaked = r$others["leaked"];
	if ( "outer_tagged" in r$others )
		info$outer_tagged = r$others["outer_tagged"];

	Log::write(LOG, info);

	for ( [encapsulation, source, id], session in rows$sessions )
		{
		local row = SessionInfo($ts=r$ts, $host=r$host, $interface=r$interface, $encapsulation=encapsulation,
		                        $source=source, $id=id, $packets=session$packets, $bytes=session$bytes,
		                        $last_seen=session$last_seen);
		if ( session?$gaps )
			row$gaps = session$gaps;
		if ( session?$reordered )
			row$reordered = session$reordered;
		Log::write(SESSIONS_LOG, row);
		}
	}

function add_counters(sums: table[string] of Counter, counters: table[string] of Counter)
	{
	for ( name, counter in counters )
		{
		local sum = counted(sums, name);
		sums[name] = Counter($packets=sum$packets + counter$packets, $bytes=sum$bytes + counter$bytes);
		}
	}

function add_report(sum: Report, r: Report)
	{
	sum$ts = r$ts;
	sum$ts_delta += r$ts_delta;
	sum$mode = r$mode;
	add_counters(sum$verdicts, r$verdicts);
	add_counters(sum$notes, r$notes);
	for ( name, number in r$others )
		sum$others[name] = number + ( name in sum$others ? sum$others[name] : 0 );
	}

function add_sessions(sums: table[string, addr, count] of Session, sessions: vector of Session)
	{
	for ( _, session in sessions )
		{
		if ( [session$encapsulation, session$source, session$id] !in sums )
			{
			sums[session$encapsulation, session$source, session$id] = copy(session);
			next;
			}

		local sum = sums[session$encapsulation, session$source, session$id];
		sum$packets += session$packets;
		sum$bytes += session$bytes;
		sum$last_seen = session$last_seen;
		if ( session?$gaps )
			sum$gaps = session$gaps + ( sum?$gaps ? sum$gaps : 0 );
		if ( session?$reordered )
			sum$reordered = session$reordered + ( sum?$reordered ? sum$reordered : 0 );
		}
	}

# `sequence`: that of the rows for which this was scheduled. They may have been written since.
event rows_due(host: string, iface: string, sequence: count)
	{
	if ( [host, iface] !in pending || pending[host, iface]$sum$sequence != sequence )
		return;

	write(pending[host, iface]);
	delete pending[host, iface];
	}

event report(r: Report)
	{
	local first = [r$host, r$interface, publisher_of(r$sequence)] !in last_sequence;
	if ( ! accept(r$version, r$host, r$interface, r$sequence) )
		return;

	if ( [r$host, r$interface] in pending )
		add_report(pending[r$host, r$interface]$sum, r);
	else
		pending[r$host, r$interface] = Rows($sum=copy(r), $sessions=table());

	local rows = pending[r$host, r$interface];
	add_sessions(rows$sessions, r$sessions);

	if ( first || ending || log_interval == 0sec )
		{
		write(rows);
		delete pending[r$host, r$interface];
		}
	else if ( rows$sum$sequence == r$sequence )
		schedule log_interval { rows_due(r$host, r$interface, r$sequence) };

	hook reported(r);
	}

event detached(version: count, sequence: count, ts: time, host: string, interface: string, present: bool)
	{
	if ( accept(version, host, interface, sequence) )
		hook program_detached(ts, host, interface, present);
	}

event zeek_done()
	{
	ending = T;
	for ( [host, iface], rows in pending )
		write(rows);
	pending = table();
	}
