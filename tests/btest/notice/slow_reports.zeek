# @TEST-DOC: A busy session is not silent where it is in each report, however seldom these come.
#
# @TEST-EXEC: zeek $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut note msg < notice.log > notices
# @TEST-EXEC: btest-diff notices

redef exit_only_after_terminate = T;
redef table_expire_interval = 100msec;
redef XDP_ERM::websocket_listen = F;
redef XDP_ERM::session_silence = 1sec;
redef XDP_ERM::busy_session_packets = 1;
# Said at the end, so that there is something to compare.
redef XDP_ERM::foreign_rate = 0.0;

global number = 0;

event reading()
	{
	++number;
	hook XDP_ERM::reported(XDP_ERM::Report($version=XDP_ERM::protocol_version, $sequence=number, $ts=current_time(),
	    $host="sensor", $interface="eth7", $mode="native", $attached_at=double_to_time(0.0), $ts_delta=10sec,
	    $sessions=vector(XDP_ERM::Session($encapsulation="erm", $source=198.51.100.1, $id=5, $packets=1, $bytes=1,
	                                      $last_seen=current_time())),
	    $verdicts=table(["foreign_source"] = XDP_ERM::Counter($packets=number / 3, $bytes=0)), $notes=table(),
	    $others=table()));

	if ( number < 3 )
		schedule 3sec { reading() };
	else
		terminate();
	}

event zeek_init()
	{
	event reading();
	}
