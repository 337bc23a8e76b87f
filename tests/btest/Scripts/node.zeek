# A node that ends when the publisher's last message is there. The manager tells the others: not all backends let them
# know that it has gone.
redef exit_only_after_terminate = T;
redef Log::default_rotation_interval = 0sec;
redef XDP_ERM::log_interval = 0sec;
redef XDP_ERM::websocket_port = to_port(getenv("WEBSOCKET_PORT"));

const finish_topic = "xdp_erm_test.finish";

global finish: event();

event end()
	{
	terminate();
	}

# The logger ends last, as with zeekctl: the others have something to log when they end.
event finish()
	{
	schedule Cluster::local_node_type() == Cluster::LOGGER ? 4sec : 0sec { end() };
	}

event finish_everywhere()
	{
	Cluster::publish(finish_topic, finish);
	schedule 1sec { finish() };
	}

event zeek_init()
	{
	Cluster::subscribe(finish_topic);
	}

hook XDP_ERM::program_detached(ts: time, host: string, interface: string, present: bool)
	{
	# The publisher waits for our acknowledgement, the logger for our log.
	schedule 2sec { finish_everywhere() };
	}
