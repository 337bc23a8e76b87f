# @TEST-DOC: A mirror session of whose frames more than the allowed share is missing is noticed, and one that has no numbers
# @TEST-DOC: is not.
#
# @TEST-EXEC: zeek $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut note msg src < notice.log > notices
# @TEST-EXEC: btest-diff notices

redef XDP_ERM::websocket_listen = F;

function session(source: addr, gaps: count): XDP_ERM::Session
	{
	return XDP_ERM::Session($source=source, $encapsulation="erspan", $id=7, $packets=1000 - gaps, $bytes=1,
	                        $last_seen=current_time(), $gaps=gaps, $reordered=0);
	}

event zeek_init()
	{
	local unnumbered = XDP_ERM::Session($source=192.0.2.4, $encapsulation="erm", $id=5, $packets=1000, $bytes=1,
	                                    $last_seen=current_time());
	event XDP_ERM::report(XDP_ERM::Report($version=XDP_ERM::protocol_version, $sequence=1, $ts=current_time(),
	    $host="sensor", $interface="eth7", $mode="native", $attached_at=current_time(), $ts_delta=10sec,
	    $sessions=vector(session(192.0.2.1, 0), session(192.0.2.2, 1), session(192.0.2.3, 2), unnumbered),
	    $verdicts=table(), $notes=table(), $others=table(), $other_names=vector()));
	}
