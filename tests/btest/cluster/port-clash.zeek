# @TEST-DOC: A node that finds the WebSocket port taken says so and goes on.
#
# @TEST-PORT: WEBSOCKET_PORT
#
# @TEST-EXEC: python3 taken.py zeek $XDP_ERM $SCRIPTS/node.zeek %INPUT > out
# @TEST-EXEC: btest-diff out
# @TEST-EXEC: zeek-cut level message < reporter.log | sed "s/:[0-9][0-9]*/:PORT/g" > complaints
# @TEST-EXEC: btest-diff complaints

event zeek_init() &priority=-100
	{
	print "still here";
	schedule 1sec { finish() };
	}

# @TEST-START-FILE taken.py
import os
import socket
import subprocess
import sys

with socket.create_server(("127.0.0.1", int(os.environ["WEBSOCKET_PORT"].split("/")[0]))):
    sys.exit(subprocess.run(sys.argv[1:], timeout=60).returncode)
# @TEST-END-FILE
