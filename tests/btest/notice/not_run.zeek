# @TEST-DOC: A program that sees nothing of what its interface receives is told of, once that is no coincidence.
#
# @TEST-EXEC: zeek $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut note msg < notice.log > notices
# @TEST-EXEC: btest-diff notices
# @TEST-EXEC: zeek-cut interface received receive_errors < xdp_erm.log > reports
# @TEST-EXEC: btest-diff reports

redef XDP_ERM::websocket_listen = F;
redef XDP_ERM::log_interval = 0sec;

function report(iface: string, sequence: count, received: count, seen: count)
	{
	event XDP_ERM::report(XDP_ERM::Report($version=XDP_ERM::protocol_version, $sequence=sequence,
	    $ts=current_time(), $host="sensor",
	    $interface=iface, $mode="native", $attached_at=current_time(), $ts_delta=10sec, $sessions=vector(),
	    $verdicts=table(["decapsulated"] = XDP_ERM::Counter($packets=0, $bytes=0),
	                    ["other"] = XDP_ERM::Counter($packets=seen, $bytes=seen)), $notes=table(),
	    $others=table(["received"] = received, ["receive_errors"] = sequence)));
	}

event zeek_init()
	{
	local sequence = 0;
	for ( _, pair in vector(vector(100, 0), vector(250, 0)) )
		report("is not run", ++sequence, pair[0], pair[1]);
	for ( _, pair in vector(vector(100, 0), vector(0, 100), vector(100, 0)) )
		report("runs, in bursts", ++sequence, pair[0], pair[1]);
	for ( _, pair in vector(vector(99, 0), vector(99, 0)) )
		report("has hardly anything to do", ++sequence, pair[0], pair[1]);
	for ( _, pair in vector(vector(9000, 1), vector(9000, 1)) )
		report("misses some", ++sequence, pair[0], pair[1]);
	}
