# @TEST-DOC: The real command's counts are logged; ERM on a port that XDP was not told of is noticed and analysed. All by an
# alternative name of the interface.
#
# @TEST-REQUIRES: test $(id -u) -eq 0
# @TEST-REQUIRES: python3 -c 'import bcc, scapy.all, websockets'
# @TEST-REQUIRES: zeek -N Zeek::AF_Packet
#
# @TEST-EXEC: make-trace mirrored mirrored.pcap
# @TEST-EXEC: timeout 120 unshare --net --pid --fork --kill-child --mount-proc sh ./sensor.sh %INPUT
# @TEST-EXEC: zeek-cut note msg < notice.log | sed "s/ of $(hostname):/ of HOST:/" > notices
# @TEST-EXEC: btest-diff notices
# @TEST-EXEC: zeek-cut id.orig_h id.resp_h id.resp_p orig_pkts < conn.log | sort > flows
# @TEST-EXEC: btest-diff flows
# @TEST-EXEC: zeek-cut interface mode decapsulated.packets fragment.packets < xdp_erm.log | sort -u > reports
# @TEST-EXEC: zeek-cut other.packets < xdp_erm.log | awk '{ sum += $1 } END { print sum, "packets were not ERM" }' >> reports
# @TEST-EXEC: btest-diff reports

redef exit_only_after_terminate = T;
redef XDP_ERM::log_interval = 0sec;

global seen = 0;

event XDP_ERM::log_xdp_erm(rec: XDP_ERM::Info)
	{
	# All packets of the trace: the inner flows are to end first.
	seen += rec$other$packets;
	if ( seen >= 14 )
		terminate();
	}

# @TEST-START-FILE sensor.sh
# In namespaces of its own, which go with this shell.
set -e
ip link set lo up
ip link add erm0 type veth peer name erm1
sysctl -qw net.ipv6.conf.erm0.disable_ipv6=1 net.ipv6.conf.erm1.disable_ipv6=1
ip link set erm0 up mtu 1600
ip link set erm1 up mtu 1600
xdp_erm="python3 -m xdp_erm_py"
ip link property add dev erm0 altname mirror0
$xdp_erm attach mirror0 --port 9999
zeek -C -i af_packet::mirror0 $XDP_ERM "$1" &
zeek=$!
$xdp_erm publish --interval 1 --pid-file ./pid &
publisher=$!
# The notice leaves out flows that are about as old as the program.
sleep 7
python3 -c 'from scapy.all import rdpcap, sendp; sendp(rdpcap("mirrored.pcap"), iface="erm1", verbose=False)'
wait $zeek
kill $publisher
wait $publisher
# @TEST-END-FILE
