# @TEST-DOC: A report that comes again is not logged again, however old it is, and one of another version not at all. A
# @TEST-DOC: publisher's numbers say nothing of another's. Reports of an older publisher, with fewer counters, and of a
# @TEST-DOC: newer one, with more, are logged.
#
# @TEST-EXEC: zeek $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut host interface decapsulated.packets other.packets inner_truncated.packets < xdp_erm.log > reports
# @TEST-EXEC: btest-diff reports
# @TEST-EXEC: zeek-cut note msg < notice.log > notices
# @TEST-EXEC: btest-diff notices
# @TEST-EXEC: zeek-cut level message < reporter.log > complaints
# @TEST-EXEC: btest-diff complaints

redef XDP_ERM::websocket_listen = F;
redef XDP_ERM::log_interval = 0sec;
redef XDP_ERM::truncated_share = 10.0;

const publisher = 4294967296;

function send(version: count, sequence: count, iface: string, verdicts: table[string] of count)
	{
	local counted: table[string] of XDP_ERM::Counter;
	for ( verdict, packets in verdicts )
		counted[verdict] = XDP_ERM::Counter($packets=packets, $bytes=packets);
	event XDP_ERM::report(XDP_ERM::Report($version=version, $sequence=sequence, $ts=current_time(), $host="sensor",
	    $interface=iface, $mode="native", $attached_at=current_time(), $ts_delta=10sec, $sessions=vector(),
	    $verdicts=counted, $notes=table(["inner_truncated"] = XDP_ERM::Counter($packets=4, $bytes=4)),
	    $others=table(["of_a_newer_publisher"] = 5)));
	}

event zeek_init()
	{
	send(2, 10, "eth0", table(["decapsulated"] = 1, ["other"] = 5));
	send(2, 10, "eth0", table(["decapsulated"] = 1, ["other"] = 5));
	send(2, 10, "eth1", table(["decapsulated"] = 2));
	send(2, 11, "eth0", table(["decapsulated"] = 3, ["of_a_newer_publisher"] = 1));
	send(2, 10, "eth0", table(["decapsulated"] = 1));
	send(3, 12, "eth0", table(["decapsulated"] = 4));
	send(2, 7 * publisher + 9, "eth2", table(["decapsulated"] = 5));
	send(2, 5 * publisher + 1, "eth2", table(["decapsulated"] = 6));
	send(2, 7 * publisher + 9, "eth2", table(["decapsulated"] = 5));
	send(2, 5 * publisher + 2, "eth2", table(["decapsulated"] = 7));
	send(2, 5 * publisher + 1, "eth2", table(["decapsulated"] = 6));
	event XDP_ERM::detached(2, 13, current_time(), "sensor", "eth0", T);
	event XDP_ERM::detached(2, 13, current_time(), "sensor", "eth0", T);
	event XDP_ERM::detached(3, 14, current_time(), "sensor", "eth1", T);
	}
