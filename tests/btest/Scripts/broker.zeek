# Broker as the cluster's backend, which it was by default before 8.1.
@ifdef ( Cluster::CLUSTER_BACKEND_NONE )
@load frameworks/cluster/backend/broker
@endif
