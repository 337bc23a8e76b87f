##! Opens the WebSocket server that the host's publisher connects to, on one node of each host: a standalone Zeek, or
##! the host's first worker.

@load ./main

module XDP_ERM;

export {
	## Whether to open it. Switch it off where publishers use another server or Broker's Python bindings.
	const websocket_listen = T &redef;

	## Its port, on the loopback address only: whoever can connect may publish any event.
	const websocket_port = 27758/tcp &redef;
}

# The server needs a cluster backend to hand events to, which a standalone Zeek lacks from version 8.1 on. Broker's is what
# it had before: alone it opens no port. One that is chosen, before or after this, stays.
@ifdef ( Cluster::CLUSTER_BACKEND_NONE )
@if ( ! Cluster::is_enabled() && Cluster::backend == Cluster::CLUSTER_BACKEND_NONE )
redef Cluster::backend = Cluster::CLUSTER_BACKEND_BROKER;
@endif
@endif

# A cluster's hosts are told apart by their address, their workers by name: the least name listens.
function serves_this_host(): bool
	{
	# What a supervisor starts is a node, not the supervisor.
	if ( ! Cluster::is_enabled() )
		return ! Supervisor::is_supervisor();

	if ( Cluster::local_node_type() != Cluster::WORKER )
		return F;

	local own_address = Cluster::nodes[Cluster::node]$ip;
	for ( name, node in Cluster::nodes )
		if ( node$node_type == Cluster::WORKER && node$ip == own_address && name < Cluster::node )
			return F;

	return T;
	}

event listen()
	{
	if ( ! Cluster::listen_websocket([$listen_addr=127.0.0.1, $listen_port=websocket_port]) )
		Reporter::warning(fmt("XDP_ERM: xdp_erm.log lacks this host, because 127.0.0.1:%d is taken: free the port, " +
		                      "or redef XDP_ERM::websocket_port and start \"xdp-erm publish\" with the same --websocket",
		                      port_to_count(websocket_port)));
	}

event zeek_init()
	{
	# Reading a trace is no reason to take the port away from a sensor on the same host.
	if ( ! websocket_listen || reading_traces() || getenv("ZEEKCTL_CHECK_CONFIG") != "" || ! serves_this_host() )
		return;

	# Not now: a port that is taken is an error, and an error before zeek_init is over ends Zeek.
	schedule 0sec { listen() };
	}
