# @TEST-DOC: The notice of foreign traffic names who sent most of it, if that came for the same report.
#
# @TEST-EXEC: zeek $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut note msg sub < notice.log > notices
# @TEST-EXEC: btest-diff notices

redef XDP_ERM::websocket_listen = F;

function report(iface: string, sequence: count)
	{
	event XDP_ERM::report(XDP_ERM::Report($version=XDP_ERM::protocol_version, $sequence=sequence,
	    $ts=current_time(), $host="sensor",
	    $interface=iface, $mode="native", $attached_at=current_time(), $ts_delta=10sec, $sessions=vector(),
	    $verdicts=table(["foreign_source"] = XDP_ERM::Counter($packets=50, $bytes=5000)), $notes=table(),
	    $others=table()));
	}

function senders(iface: string, version: count, sequence: count, number: count, others: count)
	{
	local named: vector of XDP_ERM::Sender;
	while ( |named| < number )
		named += XDP_ERM::Sender($source=counts_to_addr(vector(3405803776 + |named|)), $packets=100 - |named|, $bytes=1);
	event XDP_ERM::foreign_senders(version, sequence, "sensor", iface, named, others);
	}

event zeek_init()
	{
	senders("two", 2, 10, 2, 0);
	report("two", 10);
	senders("more", 2, 10, 2, 1016);
	report("more", 10);
	senders("too many", 2, 10, 1000, 0);
	report("too many", 10);
	report("an older publisher", 10);
	senders("another version", 3, 10, 2, 0);
	report("another version", 10);
	senders("another report", 2, 9, 2, 0);
	report("another report", 10);
	# Nobody is named for a report that is none.
	report("repeated", 10);
	senders("repeated", 2, 10, 2, 0);
	report("repeated", 10);
	}
