# @TEST-DOC: What is told once is told again when it happens again while the notice is suppressed: a loss of the program at
# @TEST-DOC: once, that a session or a publisher is silent as soon as it is not suppressed any more.
#
# @TEST-EXEC: zeek $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut note < notice.log | sort > notices
# @TEST-EXEC: btest-diff notices

redef exit_only_after_terminate = T;
redef table_expire_interval = 100msec;
redef XDP_ERM::websocket_listen = F;
redef XDP_ERM::session_silence = 500msec;
redef XDP_ERM::publisher_silence = 4sec;
redef XDP_ERM::suppression = 8sec;

module XDP_ERM;

redef look_again = 500msec;

module GLOBAL;

global number = 0;

event lost()
	{
	event XDP_ERM::detached(XDP_ERM::protocol_version, ++number, current_time(), "sensor", "eth0", T);
	}

event reading(iface: string, busy: bool, more: count)
	{
	local sessions: vector of XDP_ERM::Session;
	if ( busy )
		sessions += XDP_ERM::Session($encapsulation="erm", $source=198.51.100.1, $id=5, $packets=100, $bytes=100,
		                             $last_seen=current_time());
	hook XDP_ERM::reported(XDP_ERM::Report($version=XDP_ERM::protocol_version, $sequence=++number, $ts=current_time(),
	    $host="sensor", $interface=iface, $mode="native", $attached_at=double_to_time(0.0), $ts_delta=10sec,
	    $sessions=sessions, $verdicts=table(), $notes=table(), $others=table()));

	if ( more > 0 )
		schedule 250msec { reading(iface, F, more - 1) };
	}

event finish()
	{
	terminate();
	}

event zeek_init()
	{
	event lost();
	schedule 1sec { lost() };

	event reading("eth1", T, 8);
	schedule 2sec { reading("eth1", T, 40) };

	event reading("eth2", F, 0);
	schedule 5sec { reading("eth2", F, 0) };

	schedule 15sec { finish() };
	}
