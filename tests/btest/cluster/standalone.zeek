# @TEST-DOC: A standalone Zeek takes reports over its own WebSocket server: logs, notices, metrics.
#
# @TEST-REQUIRES: python3 -c 'import websockets'
# @TEST-PORT: WEBSOCKET_PORT
#
# @TEST-EXEC: btest-bg-run zeek "zeek $XDP_ERM $SCRIPTS/node.zeek %INPUT > out"
# @TEST-EXEC: timeout 60 publish-reports --websocket 127.0.0.1:${WEBSOCKET_PORT%/tcp}
# @TEST-EXEC: btest-bg-wait 60
# @TEST-EXEC: xdp-erm-columns < zeek/xdp_erm.log > reports
# @TEST-EXEC: btest-diff reports
# @TEST-EXEC: zeek-cut host interface encapsulation source id packets bytes last_seen gaps reordered < zeek/xdp_erm_sessions.log | sort > sessions
# @TEST-EXEC: btest-diff sessions
# @TEST-EXEC: zeek-cut note msg sub src suppress_for < zeek/notice.log > notices
# @TEST-EXEC: btest-diff notices
# @TEST-EXEC: btest-diff zeek/out

# The readings are of one interval each, however long it took.
redef XDP_ERM::malformed_rate = 0.0;
redef XDP_ERM::foreign_rate = 0.0;

event zeek_done()
	{
	local metrics: vector of string;
	for ( _, m in Telemetry::collect_metrics("zeek", "xdp_erm*") )
		if ( m$value != 0.0 || m$opts$metric_type == Telemetry::GAUGE )
			metrics += fmt("%s %s %s", m$opts$name, m$label_values, m$value);
	sort(metrics, strcmp);
	for ( _, line in metrics )
		print line;
	}
