# @TEST-DOC: A report that comes again is not logged again, and one of another version not at all. A clock that was set
# @TEST-DOC: back by hours makes none of them old.
#
# @TEST-EXEC: zeek $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut host interface decapsulated.packets < xdp_erm.log > reports
# @TEST-EXEC: btest-diff reports
# @TEST-EXEC: zeek-cut note msg < notice.log > notices
# @TEST-EXEC: btest-diff notices
# @TEST-EXEC: zeek-cut level message < reporter.log > complaints
# @TEST-EXEC: btest-diff complaints

redef XDP_ERM::websocket_listen = F;

const nothing = XDP_ERM::Counter($packets=0, $bytes=0);

function send(version: count, sequence: count, iface: string, packets: count)
	{
	event XDP_ERM::report(XDP_ERM::Report($version=version, $sequence=sequence, $ts=current_time(), $host="sensor",
	    $interface=iface, $mode="native", $attached_at=current_time(), $ts_delta=10sec, $sessions=vector(),
	    $counters=XDP_ERM::Counters($decapsulated=XDP_ERM::Counter($packets=packets, $bytes=packets),
	    $not_erm=nothing, $fragment=nothing, $truncated=nothing, $malformed=nothing, $foreign_source=nothing,
	    $foreign_target=nothing, $failed=nothing, $nested=nothing, $inner_truncated=nothing)));
	}

event zeek_init()
	{
	send(1, 10, "eth0", 1);
	send(1, 10, "eth0", 1);
	send(1, 10, "eth1", 2);
	send(1, 11, "eth0", 3);
	send(1, 10, "eth0", 1);
	send(2, 12, "eth0", 4);
	send(1, 7200010, "eth2", 5);
	send(1, 7200009, "eth2", 5);
	send(1, 10, "eth2", 6);
	event XDP_ERM::detached(1, 13, current_time(), "sensor", "eth0", T);
	event XDP_ERM::detached(1, 13, current_time(), "sensor", "eth0", T);
	event XDP_ERM::detached(2, 14, current_time(), "sensor", "eth1", T);
	}
