# @TEST-DOC: In a cluster with a logger node the logger has the rows, and the manager has none, also those that the manager
# @TEST-DOC: writes when it stops.
#
# @TEST-REQUIRES: python3 -c 'import websockets'
# @TEST-PORT: MANAGER_PORT
# @TEST-PORT: WORKER1_PORT
# @TEST-PORT: WORKER2_PORT
# @TEST-PORT: LOGGER_PORT
# @TEST-PORT: WEBSOCKET_PORT
#
# @TEST-EXEC: cp $SCRIPTS/cluster-layout.zeek .
# @TEST-EXEC: btest-bg-run logger "CLUSTER_NODE=logger zeek $XDP_ERM $SCRIPTS/node.zeek $SCRIPTS/broker.zeek %INPUT"
# @TEST-EXEC: btest-bg-run manager "CLUSTER_NODE=manager zeek $XDP_ERM $SCRIPTS/node.zeek $SCRIPTS/broker.zeek %INPUT"
# @TEST-EXEC: btest-bg-run worker-1 "CLUSTER_NODE=worker-1 zeek $XDP_ERM $SCRIPTS/node.zeek $SCRIPTS/broker.zeek %INPUT"
# @TEST-EXEC: btest-bg-run worker-2 "CLUSTER_NODE=worker-2 zeek $XDP_ERM $SCRIPTS/node.zeek $SCRIPTS/broker.zeek %INPUT"
# @TEST-EXEC: timeout 60 publish-reports --websocket 127.0.0.1:${WEBSOCKET_PORT%/tcp}
# @TEST-EXEC: btest-bg-wait 60
# @TEST-EXEC: xdp-erm-columns < logger/xdp_erm.log > reports
# @TEST-EXEC: btest-diff reports
# @TEST-EXEC: test ! -e manager/xdp_erm.log
# @TEST-EXEC: zeek-cut source packets < logger/xdp_erm_sessions.log | sort > sessions
# @TEST-EXEC: btest-diff sessions

redef XDP_ERM::log_interval = 1hr;
