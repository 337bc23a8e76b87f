# @TEST-DOC: On Broker each report, sent to the first worker's WebSocket server, is one row of the manager's.
#
# @TEST-REQUIRES: python3 -c 'import websockets'
# @TEST-PORT: MANAGER_PORT
# @TEST-PORT: WORKER1_PORT
# @TEST-PORT: WORKER2_PORT
# @TEST-PORT: WEBSOCKET_PORT
#
# @TEST-EXEC: cp $SCRIPTS/cluster-layout.zeek .
# @TEST-EXEC: btest-bg-run manager "CLUSTER_NODE=manager zeek $XDP_ERM $SCRIPTS/node.zeek $SCRIPTS/broker.zeek %INPUT"
# @TEST-EXEC: btest-bg-run worker-1 "CLUSTER_NODE=worker-1 zeek $XDP_ERM $SCRIPTS/node.zeek $SCRIPTS/broker.zeek %INPUT"
# @TEST-EXEC: btest-bg-run worker-2 "CLUSTER_NODE=worker-2 zeek $XDP_ERM $SCRIPTS/node.zeek $SCRIPTS/broker.zeek %INPUT"
# @TEST-EXEC: timeout 60 publish-reports --websocket 127.0.0.1:${WEBSOCKET_PORT%/tcp}
# @TEST-EXEC: btest-bg-wait 60
# @TEST-EXEC: xdp-erm-columns < manager/xdp_erm.log > reports
# @TEST-EXEC: btest-diff reports
# @TEST-EXEC: zeek-cut note sub < manager/notice.log | grep Foreign > foreign
# @TEST-EXEC: btest-diff foreign
# @TEST-EXEC: test ! -e worker-1/xdp_erm.log && test ! -e worker-2/xdp_erm.log
# @TEST-EXEC-FAIL: grep -h XDP_ERM */reporter.log */.stderr

redef XDP_ERM::foreign_rate = 0.0;
