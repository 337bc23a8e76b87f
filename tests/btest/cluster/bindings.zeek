# @TEST-DOC: Broker's Python bindings bring each report to the manager once, without a WebSocket server.
#
# @TEST-REQUIRES: python3 -c 'import websockets'
# @TEST-REQUIRES: test -d $(zeek-config --python_dir)/broker
# @TEST-PORT: MANAGER_PORT
# @TEST-PORT: WORKER1_PORT
# @TEST-PORT: WORKER2_PORT
# @TEST-PORT: WEBSOCKET_PORT
#
# @TEST-EXEC: cp $SCRIPTS/cluster-layout.zeek .
# @TEST-EXEC: btest-bg-run manager "CLUSTER_NODE=manager zeek $XDP_ERM $SCRIPTS/node.zeek $SCRIPTS/broker.zeek %INPUT"
# @TEST-EXEC: btest-bg-run worker-1 "CLUSTER_NODE=worker-1 zeek $XDP_ERM $SCRIPTS/node.zeek $SCRIPTS/broker.zeek %INPUT"
# @TEST-EXEC: btest-bg-run worker-2 "CLUSTER_NODE=worker-2 zeek $XDP_ERM $SCRIPTS/node.zeek $SCRIPTS/broker.zeek %INPUT"
# @TEST-EXEC: timeout 60 publish-reports --transport broker --peer 127.0.0.1:${MANAGER_PORT%/tcp}
# @TEST-EXEC: btest-bg-wait 60
# @TEST-EXEC: xdp-erm-columns < manager/xdp_erm.log > reports
# @TEST-EXEC: btest-diff reports
# @TEST-EXEC: zeek-cut note sub < manager/notice.log | grep Foreign > foreign
# @TEST-EXEC: btest-diff foreign

redef XDP_ERM::websocket_listen = F;
redef XDP_ERM::foreign_rate = 0.0;
