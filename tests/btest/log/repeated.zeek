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

const publisher = 4294967296;

function send(version: count, sequence: count, iface: string, counted: vector of count)
	{
	local counters: vector of XDP_ERM::Counter;
	for ( _, packets in counted )
		counters += XDP_ERM::Counter($packets=packets, $bytes=packets);
	event XDP_ERM::report(XDP_ERM::ReportMessage($version=version, $sequence=sequence, $ts=current_time(),
	    $host="sensor", $interface=iface, $mode="native", $attached_at=current_time(), $ts_delta=10sec,
	    $sessions=vector(), $counters=counters));
	}

event zeek_init()
	{
	send(1, 10, "eth0", vector(1, 5));
	send(1, 10, "eth0", vector(1, 5));
	send(1, 10, "eth1", vector(2));
	send(1, 11, "eth0", vector(3, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 5, 6));
	send(1, 10, "eth0", vector(1));
	send(2, 12, "eth0", vector(4));
	send(1, 7 * publisher + 9, "eth2", vector(5));
	send(1, 5 * publisher + 1, "eth2", vector(6));
	send(1, 7 * publisher + 9, "eth2", vector(5));
	send(1, 5 * publisher + 2, "eth2", vector(7));
	send(1, 5 * publisher + 1, "eth2", vector(6));
	event XDP_ERM::detached(1, 13, current_time(), "sensor", "eth0", T);
	event XDP_ERM::detached(1, 13, current_time(), "sensor", "eth0", T);
	event XDP_ERM::detached(2, 14, current_time(), "sensor", "eth1", T);
	}
