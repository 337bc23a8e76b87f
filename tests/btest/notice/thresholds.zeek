# @TEST-DOC: Each notice about what is counted comes above its threshold, not at it, and not again while it is suppressed.
#
# @TEST-EXEC: zeek $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut note msg < notice.log > notices
# @TEST-EXEC: btest-diff notices

redef XDP_ERM::websocket_listen = F;

global number = 0;

function counters(packets: table[string] of count): table[string] of XDP_ERM::Counter
	{
	local result: table[string] of XDP_ERM::Counter;
	for ( name, number_of_them in packets )
		result[name] = XDP_ERM::Counter($packets=number_of_them, $bytes=0);
	return result;
	}

# What was counted in 10 seconds, by the counters' names.
function report(iface: string, verdicts: table[string] of count, notes: table[string] of count)
	{
	++number;
	event XDP_ERM::report(XDP_ERM::Report($version=XDP_ERM::protocol_version, $sequence=number, $ts=current_time(),
	    $host="sensor", $interface=iface, $mode="native", $attached_at=current_time(), $ts_delta=10sec,
	    $sessions=vector(), $verdicts=counters(verdicts), $notes=counters(notes), $others=table()));
	}

# With so many packets and frames missing.
function session(id: count, packets: count, gaps: count): XDP_ERM::Session
	{
	return XDP_ERM::Session($encapsulation="erspan", $source=198.51.100.1, $id=id, $packets=packets, $bytes=packets,
	                        $last_seen=current_time(), $gaps=gaps, $reordered=0);
	}

event zeek_init()
	{
	report("at all", table(["decapsulated"] = 1000, ["malformed"] = 4, ["truncated"] = 6, ["foreign_source"] = 7,
	                       ["foreign_target"] = 3), table(["inner_truncated"] = 10));
	report("malformed", table(["malformed"] = 4, ["truncated"] = 7), table());
	report("foreign", table(["foreign_source"] = 7, ["foreign_target"] = 4), table());
	report("cut", table(["decapsulated"] = 1000), table(["inner_truncated"] = 11));
	report("cut", table(["decapsulated"] = 1000), table(["inner_truncated"] = 1000));
	report("nested", table(["decapsulated"] = 1000), table(["nested"] = 1));
	report("refused", table(["decapsulated"] = 1000), table(["nested_refused"] = 1));
	report("nothing", table(), table());
	hook XDP_ERM::reported(XDP_ERM::Report($version=XDP_ERM::protocol_version, $sequence=100, $ts=current_time(),
	    $host="sensor", $interface="lossy", $mode="native", $attached_at=current_time(), $ts_delta=10sec,
	    $sessions=vector(session(1, 999, 1), session(2, 997, 3), session(2, 997, 3)),
	    $verdicts=table(), $notes=table(), $others=table()));
	}
