# @TEST-DOC: A mirror session that lasts, as they do, is noticed although it began before XDP was attached and before the first
# @TEST-DOC: report; one that XDP has taken off since then is not.
#
# @TEST-REQUIRES: test $(id -u) -eq 0
# @TEST-REQUIRES: python3 -c 'import scapy.all'
# @TEST-REQUIRES: zeek -N Zeek::AF_Packet
#
# @TEST-EXEC: timeout 120 unshare --net --pid --fork --kill-child --mount-proc sh ./sensor.sh %INPUT
# @TEST-EXEC: zeek-cut note msg < notice.log | sed "s/ of $(hostname):/ of HOST:/" > notices
# @TEST-EXEC: btest-diff notices

redef exit_only_after_terminate = T;
redef table_expire_interval = 100msec;
redef XDP_ERM::websocket_listen = F;

module XDP_ERM;

redef tell_again = 1sec;

module GLOBAL;

event report(attached_at: time)
	{
	event XDP_ERM::report(XDP_ERM::Report($version=XDP_ERM::protocol_version, $sequence=1, $ts=current_time(),
	    $host=gethostname(), $interface="erm0", $mode="native", $attached_at=attached_at, $ts_delta=10sec,
	    $sessions=vector(), $verdicts=table(), $notes=table(), $others=table(), $other_names=vector()));
	}

event finish()
	{
	terminate();
	}

event zeek_init()
	{
	system("touch ready");
	}

global flows = 0;

event new_connection(c: connection)
	{
	if ( ++flows > 1 )
		return;

	schedule 2sec { report(current_time()) };
	schedule 14sec { finish() };
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
python3 send.py &
wait $zeek
# @TEST-END-FILE

# @TEST-START-FILE send.py
import time

from scapy.all import IP, UDP, Ether, Raw, sendp

for number in range(200):
    for session in (5000, 6000) if number < 20 else (5000,):
        sendp(Ether() / IP(src="198.51.100.1", dst="192.0.2.1") / UDP(sport=session, dport=7932) / Raw(bytes(60)),
              iface="erm1", verbose=False)
    time.sleep(0.1)
# @TEST-END-FILE
