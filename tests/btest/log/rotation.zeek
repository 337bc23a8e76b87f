# @TEST-DOC: Rotating the log loses nothing of rows that are not written yet.
#
# @TEST-EXEC: zeek $XDP_ERM %INPUT
# @TEST-EXEC: test $(ls xdp_erm*.log | grep -vc sessions) -ge 3
# @TEST-EXEC: for log in $(ls xdp_erm*.log | grep -v sessions); do zeek-cut decapsulated.packets < $log; done | awk '{ sum += $1 } END { print sum, NR < 60 }' > sum
# @TEST-EXEC: echo "5050 1" | cmp - sum

redef exit_only_after_terminate = T;
redef Log::default_rotation_interval = 1sec;
redef XDP_ERM::websocket_listen = F;
redef XDP_ERM::log_interval = 300msec;

global number = 0;

event reading()
	{
	++number;
	event XDP_ERM::report(XDP_ERM::Report($version=XDP_ERM::protocol_version, $sequence=number, $ts=current_time(),
	    $host="sensor", $interface="eth0", $mode="native", $attached_at=current_time(), $ts_delta=10sec,
	    $sessions=vector(), $notes=table(), $others=table(),
	    $verdicts=table(["decapsulated"] = XDP_ERM::Counter($packets=number, $bytes=number))));

	if ( number < 100 )
		schedule 40msec { reading() };
	else
		terminate();
	}

event zeek_init()
	{
	event reading();
	}
