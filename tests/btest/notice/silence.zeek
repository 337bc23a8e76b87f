# @TEST-DOC: A busy session that stops, and then the publisher, are noticed; a session that never was busy is not. Two whose
# @TEST-DOC: addresses and numbers read alike in a row are two.
#
# @TEST-EXEC: zeek $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut note msg src < notice.log | sort -r > notices
# @TEST-EXEC: btest-diff notices

redef exit_only_after_terminate = T;
redef table_expire_interval = 100msec;
redef XDP_ERM::websocket_listen = F;
redef XDP_ERM::session_silence = 1sec;
redef XDP_ERM::publisher_silence = 2sec;

global number = 0;

function session(source: addr, packets: count, id: count &default=5): XDP_ERM::Session
	{
	return XDP_ERM::Session($encapsulation="erm", $source=source, $id=id, $packets=packets, $bytes=packets,
	                        $last_seen=current_time());
	}

event reading()
	{
	++number;
	local sessions: vector of XDP_ERM::Session;
	if ( number == 1 )
		{
		sessions += session(198.51.100.1, 100);
		sessions += session(198.51.100.2, 99);
		sessions += session(198.51.100.1, 100, 11);
		sessions += session(198.51.100.11, 100, 1);
		}
	hook XDP_ERM::reported(XDP_ERM::Report($version=XDP_ERM::protocol_version, $sequence=number,
	    $ts=current_time(), $host="sensor",
	    $interface="eth7", $mode="native", $attached_at=double_to_time(0.0), $ts_delta=10sec, $sessions=sessions,
	    $verdicts=table(), $notes=table(), $others=table()));

	if ( number < 10 )
		schedule 250msec { reading() };
	}

event finish()
	{
	terminate();
	}

event zeek_init()
	{
	event reading();
	schedule 7sec { finish() };
	}
