# @TEST-DOC: The reports of log_interval are one row, summed exactly, with one of each session; the first has rows at once.
# @TEST-DOC: 0 gives each report its rows. Nothing is lost when Zeek ends.
#
# @TEST-EXEC: zeek $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut ts host interface mode ts_delta decapsulated.packets decapsulated.bytes nested_refused.packets sessions decapsulated_share host_drops queue_drops < xdp_erm.log | sort -n > reports
# @TEST-EXEC: btest-diff reports
# @TEST-EXEC: zeek-cut ts host interface encapsulation source id packets bytes last_seen gaps reordered < xdp_erm_sessions.log | sort > sessions
# @TEST-EXEC: btest-diff sessions

redef exit_only_after_terminate = T;
redef XDP_ERM::websocket_listen = F;
redef XDP_ERM::log_interval = 2sec;

global number = 0;

# One whose packets, of which a quarter more is truncated, tell which reports are in a row.
function report(iface: string, packets: count, sources: vector of addr, drops: bool &default=F)
	{
	++number;
	local sessions: vector of XDP_ERM::Session;
	for ( _, source in sources )
		{
		local session = XDP_ERM::Session($source=source, $encapsulation="erspan", $id=5, $packets=packets,
		                                 $bytes=10 * packets, $last_seen=double_to_time(number + 0.0));
		if ( source == 192.0.2.2 )
			{
			session$gaps = 2;
			session$reordered = number;
			}
		sessions += session;
		}

	local m = XDP_ERM::Report($version=XDP_ERM::protocol_version, $sequence=number, $ts=double_to_time(number + 0.0),
	                          $host="sensor", $interface=iface, $mode="native", $attached_at=double_to_time(0.0),
	                          $ts_delta=10sec, $sessions=sessions, $others=table(),
	                          $verdicts=table(["decapsulated"] = XDP_ERM::Counter($packets=packets, $bytes=10 * packets),
	                                          ["truncated"] = XDP_ERM::Counter($packets=packets / 4, $bytes=packets)),
	                          $notes=table(["nested_refused"] = XDP_ERM::Counter($packets=1, $bytes=1)));
	if ( drops )
		m$others = table(["host_drops"] = 3, ["queue_drops"] = number);
	event XDP_ERM::report(m);
	}

event each()
	{
	Option::set("XDP_ERM::log_interval", 0sec);
	report("eth0", 256, vector(192.0.2.1));
	report("eth0", 512, vector());
	}

event last()
	{
	Option::set("XDP_ERM::log_interval", 1hr);
	report("eth0", 1024, vector(192.0.2.1));
	report("eth0", 2048, vector(192.0.2.3));
	report("eth1", 4096, vector());
	terminate();
	}

event zeek_init()
	{
	report("eth0", 4, vector(192.0.2.1));
	report("eth0", 8, vector(192.0.2.1, 192.0.2.2));
	report("eth0", 16, vector(192.0.2.2), T);
	report("eth1", 32, vector());
	report("eth0", 64, vector(192.0.2.2), T);
	report("eth1", 128, vector());
	schedule 3sec { each() };
	schedule 4sec { last() };
	}

# Too late for any row but its own.
event zeek_done() &priority=-10
	{
	report("eth0", 8192, vector(192.0.2.1));
	}
