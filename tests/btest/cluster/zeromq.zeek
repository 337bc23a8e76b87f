# @TEST-DOC: On ZeroMQ each report, sent to the first worker's WebSocket server, is in one row of the logger's, also what the
# @TEST-DOC: manager writes when it stops.
#
# @TEST-REQUIRES: python3 -c 'import websockets'
# @TEST-PORT: MANAGER_PORT
# @TEST-PORT: WORKER1_PORT
# @TEST-PORT: WORKER2_PORT
# @TEST-PORT: LOGGER_PORT
# @TEST-PORT: XPUB_PORT
# @TEST-PORT: XSUB_PORT
# @TEST-PORT: WEBSOCKET_PORT
#
# @TEST-EXEC: cp $SCRIPTS/cluster-layout.zeek .
# @TEST-EXEC: btest-bg-run logger "CLUSTER_NODE=logger zeek $XDP_ERM $SCRIPTS/node.zeek %INPUT"
# @TEST-EXEC: btest-bg-run manager "CLUSTER_NODE=manager zeek $XDP_ERM $SCRIPTS/node.zeek %INPUT"
# @TEST-EXEC: btest-bg-run worker-1 "CLUSTER_NODE=worker-1 zeek $XDP_ERM $SCRIPTS/node.zeek %INPUT"
# @TEST-EXEC: btest-bg-run worker-2 "CLUSTER_NODE=worker-2 zeek $XDP_ERM $SCRIPTS/node.zeek %INPUT"
# @TEST-EXEC: timeout 60 publish-reports --websocket 127.0.0.1:${WEBSOCKET_PORT%/tcp}
# @TEST-EXEC: btest-bg-wait 60
# @TEST-EXEC: xdp-erm-columns < logger/xdp_erm.log > reports
# @TEST-EXEC: btest-diff reports
# @TEST-EXEC: zeek-cut note sub < logger/notice.log | grep Foreign > foreign
# @TEST-EXEC: btest-diff foreign
# @TEST-EXEC: test ! -e manager/xdp_erm.log
# @TEST-EXEC-FAIL: grep -h XDP_ERM */reporter.log */.stderr

@load frameworks/cluster/backend/zeromq
@load frameworks/cluster/backend/zeromq/connect

function on_loopback(variable: string): string
	{
	return fmt("tcp://127.0.0.1:%d", port_to_count(to_port(getenv(variable))));
	}

redef Cluster::Backend::ZeroMQ::listen_xpub_endpoint = on_loopback("XPUB_PORT");
redef Cluster::Backend::ZeroMQ::listen_xsub_endpoint = on_loopback("XSUB_PORT");
redef Cluster::Backend::ZeroMQ::connect_xpub_endpoint = on_loopback("XSUB_PORT");
redef Cluster::Backend::ZeroMQ::connect_xsub_endpoint = on_loopback("XPUB_PORT");
redef XDP_ERM::foreign_rate = 0.0;
redef XDP_ERM::log_interval = 1hr;
