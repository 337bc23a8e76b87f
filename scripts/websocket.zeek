##! Opens the WebSocket server that the host's publisher connects to, on one node of each host: a standalone Zeek, or
##! the host's first worker.

@load base/misc/version
@load ./main

module XDP_ERM;

export {
	## Whether to open it. Switch it off where publishers use another server or Broker's Python bindings.
	const websocket_listen = T &redef;

	## Its port, on the loopback address only: whoever can connect may publish any event.
	const websocket_port = 27758/tcp &redef;
}

# A cluster's hosts are told apart by their address, their workers by name: the least name listens.
function serves_this_host(): bool
	{
	if ( ! Cluster::is_enabled() )
		return T;

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

@if ( Version::at_least("8.1.0") )
	if ( Cluster::backend == Cluster::CLUSTER_BACKEND_NONE )
		{
		Reporter::warning("XDP_ERM: xdp_erm.log stays empty, because this Zeek has no cluster backend: add \"@load " +
		                  "frameworks/cluster/websocket/server\" to local.zeek and start \"xdp-erm publish\" with " +
		                  "--websocket and that server's address");
		return;
		}
@endif

	# Not now: a port that is taken is an error, and an error before zeek_init is over ends Zeek.
	schedule 0sec { listen() };
	}
