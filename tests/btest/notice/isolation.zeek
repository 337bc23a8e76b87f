# @TEST-DOC: Frames that reached the host, and those with the tag of their wrapping, are noticed.
#
# @TEST-EXEC: zeek $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut note msg < notice.log > notices
# @TEST-EXEC: zeek-cut interface leaked outer_tagged < xdp_erm.log >> notices
# @TEST-EXEC: btest-diff notices

redef XDP_ERM::websocket_listen = F;

function report(iface: string, others: table[string] of count)
	{
	event XDP_ERM::report(XDP_ERM::Report($version=XDP_ERM::protocol_version, $sequence=1, $ts=current_time(),
	    $host="sensor", $interface=iface, $mode="native", $attached_at=current_time(), $ts_delta=10sec,
	    $sessions=vector(), $verdicts=table(), $notes=table(), $others=others));
	}

event zeek_init()
	{
	report("all is well", table(["leaked"] = 0, ["outer_tagged"] = 0));
	report("leaks", table(["leaked"] = 7, ["outer_tagged"] = 0));
	report("tags", table(["leaked"] = 0, ["outer_tagged"] = 9));
	report("is not isolated", table());
	}
