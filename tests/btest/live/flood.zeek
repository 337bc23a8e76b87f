# @TEST-DOC: Who floods the sensor from made-up sources floods neither the manager nor notice.log.
#
# @TEST-REQUIRES: test $(id -u) -eq 0
# @TEST-REQUIRES: python3 -c 'import scapy.all'
# @TEST-REQUIRES: zeek -N Zeek::AF_Packet
#
# @TEST-EXEC: timeout 120 unshare --net --pid --fork --kill-child --mount-proc sh ./sensor.sh %INPUT
# @TEST-EXEC: zeek-cut note < notice.log | sort | uniq -c > notices
# @TEST-EXEC: btest-diff notices

redef exit_only_after_terminate = T;
redef XDP_ERM::websocket_listen = F;

event finish()
	{
	terminate();
	}

event zeek_init()
	{
	event XDP_ERM::report(XDP_ERM::Report($version=XDP_ERM::protocol_version, $sequence=1, $ts=current_time(),
	    $host=gethostname(), $interface="erm0", $mode="native", $attached_at=current_time() - 1min, $ts_delta=10sec,
	    $sessions=vector(), $verdicts=table(), $notes=table(), $others=table(), $other_names=vector()));
	system("touch ready");
	}

global flows = 0;

event new_connection(c: connection)
	{
	if ( ++flows == 1000 )
		schedule 1sec { finish() };
	}

# @TEST-START-FILE sensor.sh
# In namespaces of its own, which go with this shell.
set -e
ip link set lo up
ip link add erm0 type veth peer name erm1
sysctl -qw net.ipv6.conf.erm0.disable_ipv6=1 net.ipv6.conf.erm1.disable_ipv6=1
ip link set erm0 up
ip link set erm1 up
zeek -C -i af_packet::erm0 $XDP_ERM "$1" &
zeek=$!
while [ ! -e ready ]; do sleep 0.2; done
sleep 2
python3 send.py
wait $zeek
# @TEST-END-FILE

# @TEST-START-FILE send.py
from scapy.all import IP, UDP, Ether, Raw, sendp

sendp([Ether(dst="02:00:00:00:00:02") / IP(src=f"203.0.{number // 250}.{1 + number % 250}", dst="192.0.2.1")
       / UDP(sport=5000, dport=7932) / Raw(bytes(60)) for number in range(1000)], iface="erm1", verbose=False)
# @TEST-END-FILE
