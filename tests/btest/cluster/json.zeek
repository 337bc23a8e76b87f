# @TEST-DOC: With JSON logs the columns have the same names.
#
# @TEST-REQUIRES: python3 -c 'import websockets'
# @TEST-PORT: WEBSOCKET_PORT
#
# @TEST-EXEC: btest-bg-run zeek "zeek $XDP_ERM $SCRIPTS/node.zeek LogAscii::use_json=T"
# @TEST-EXEC: timeout 60 publish-reports --websocket 127.0.0.1:${WEBSOCKET_PORT%/tcp}
# @TEST-EXEC: btest-bg-wait 60
# @TEST-EXEC: python3 keys.py zeek/xdp_erm.log zeek/xdp_erm_sessions.log > keys
# @TEST-EXEC: btest-diff keys

# @TEST-START-FILE keys.py
import json
import sys

for name in sys.argv[1:]:
    rows = [json.loads(line) for line in open(name)]
    print(name, len(rows), "rows:", *max(rows, key=len))
# @TEST-END-FILE
