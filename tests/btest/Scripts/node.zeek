# A node that ends when the publisher's last message is there, or with its manager.
redef exit_only_after_terminate = T;
redef Log::default_rotation_interval = 0sec;
redef XDP_ERM::websocket_port = to_port(getenv("WEBSOCKET_PORT"));

event finish()
	{
	terminate();
	}

hook XDP_ERM::program_detached(ts: time, host: string, interface: string, present: bool)
	{
	# The publisher waits for our acknowledgement, the logger for our log.
	schedule 2sec { finish() };
	}

event Cluster::node_down(name: string, id: string)
	{
	if ( name == "manager" )
		schedule 1sec { finish() };
	}
