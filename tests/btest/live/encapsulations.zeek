# @TEST-DOC: What XDP was told to take off and reaches Zeek wrapped is noticed, once for each encapsulation and sender, or each
# @TEST-DOC: session where that is the source port, and on no other port.
#
# @TEST-REQUIRES: test $(id -u) -eq 0
# @TEST-REQUIRES: python3 -c 'import scapy.all'
# @TEST-REQUIRES: zeek -N Zeek::AF_Packet
#
# @TEST-EXEC: make-trace wrapped wrapped.pcap
# @TEST-EXEC: timeout 120 unshare --net --pid --fork --kill-child --mount-proc sh ./sensor.sh %INPUT
# @TEST-EXEC: zeek-cut note msg < notice.log | sed "s/ of $(hostname):/ of HOST:/" | sort > notices
# @TEST-EXEC: btest-diff notices

redef exit_only_after_terminate = T;
redef XDP_ERM::websocket_listen = F;
redef XDP_ERM::vxlan_ports = { 4789/udp };
redef XDP_ERM::geneve_ports = { 6081/udp };
redef XDP_ERM::tzsp_ports = { 37008/udp };
redef XDP_ERM::gre = T;

global queries = 0;

event zeek_init()
	{
	event XDP_ERM::report(XDP_ERM::Report($version=XDP_ERM::protocol_version, $sequence=1, $ts=current_time(),
	    $host=gethostname(), $interface="erm0", $mode="native", $attached_at=current_time() - 1min, $ts_delta=10sec,
	    $sessions=vector(), $verdicts=table(), $notes=table(), $others=table(), $other_names=vector()));
	system("touch ready");
	}

event finish()
	{
	terminate();
	}

event new_connection(c: connection)
	{
	if ( ++queries == 1 )
		schedule 3sec { finish() };
	}

# @TEST-START-FILE sensor.sh
# In namespaces of its own, which go with this shell.
set -e
ip link set lo up
ip link add erm0 type veth peer name erm1
sysctl -qw net.ipv6.conf.erm0.disable_ipv6=1 net.ipv6.conf.erm1.disable_ipv6=1
ip link set erm0 up mtu 1600
ip link set erm1 up mtu 1600
zeek -C -i af_packet::erm0 $XDP_ERM "$1" &
zeek=$!
while [ ! -e ready ]; do sleep 0.2; done
sleep 2
python3 -c 'from scapy.all import rdpcap, sendp; sendp(rdpcap("wrapped.pcap"), iface="erm1", verbose=False)'
wait $zeek
# @TEST-END-FILE
