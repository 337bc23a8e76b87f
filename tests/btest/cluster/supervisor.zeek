# @TEST-DOC: Zeek's supervisor leaves the WebSocket port to the nodes that it starts.
#
# @TEST-PORT: WEBSOCKET_PORT
#
# @TEST-EXEC: timeout 60 zeek -j $XDP_ERM %INPUT > said 2>&1
# @TEST-EXEC: test -e opened
# @TEST-EXEC-FAIL: grep XDP_ERM said

redef exit_only_after_terminate = T;
redef XDP_ERM::websocket_port = to_port(getenv("WEBSOCKET_PORT"));

event wait()
	{
	if ( file_size("opened") >= 0.0 )
		terminate();
	else
		schedule 1sec { wait() };
	}

event zeek_init()
	{
	if ( ! Supervisor::is_supervisor() )
		{
		system("while ! ss -Htln | grep -q :${WEBSOCKET_PORT%/tcp}; do sleep 0.2; done; touch opened");
		return;
		}

	Supervisor::create([$name="alone"]);
	schedule 1sec { wait() };
	}
