# Manager and two workers on this host; a logger if LOGGER_PORT is set. Ports come from @TEST-PORT.
redef Cluster::manager_is_logger = getenv("LOGGER_PORT") == "";

redef Cluster::nodes = {
	["manager"] = [$node_type=Cluster::MANAGER, $ip=127.0.0.1, $p=to_port(getenv("MANAGER_PORT"))],
	["worker-1"] = [$node_type=Cluster::WORKER, $ip=127.0.0.1, $p=to_port(getenv("WORKER1_PORT")), $manager="manager"],
	["worker-2"] = [$node_type=Cluster::WORKER, $ip=127.0.0.1, $p=to_port(getenv("WORKER2_PORT")), $manager="manager"],
};

@if ( getenv("LOGGER_PORT") != "" )
redef Cluster::nodes += {
	["logger"] = [$node_type=Cluster::LOGGER, $ip=127.0.0.1, $p=to_port(getenv("LOGGER_PORT")), $manager="manager"],
};
@endif
