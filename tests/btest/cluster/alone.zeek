# @TEST-DOC: A standalone Zeek logs reports whatever cluster backend it has, or none, which is its default from 8.1 on: the
# @TEST-DOC: package gives it one, unless another is loaded before or after it.
#
# @TEST-REQUIRES: python3 -c 'import websockets'
# @TEST-REQUIRES: zeek -e 'exit(Version::at_least("8.1.0") ? 0 : 1)'
# @TEST-PORT: WEBSOCKET_PORT
# @TEST-PORT: ZEEK_WEBSOCKET_LISTEN_PORT
#
# @TEST-EXEC: sh logged.sh nothing $XDP_ERM
# @TEST-EXEC: sh logged.sh server-before frameworks/cluster/websocket/server $XDP_ERM
# @TEST-EXEC: sh logged.sh server-after $XDP_ERM frameworks/cluster/websocket/server
# @TEST-EXEC: sh logged.sh broker-before frameworks/cluster/backend/broker $XDP_ERM
# @TEST-EXEC: sh logged.sh broker-after $XDP_ERM frameworks/cluster/backend/broker
# @TEST-EXEC-FAIL: grep -h XDP_ERM */said

# @TEST-START-FILE logged.sh
set -e
mkdir $1
cd $1
shift
zeek "$@" $SCRIPTS/node.zeek > said 2>&1 &
timeout 60 publish-reports --websocket 127.0.0.1:${WEBSOCKET_PORT%/tcp}
wait $!
test $(zeek-cut host < xdp_erm.log | wc -l) = 3
# @TEST-END-FILE
