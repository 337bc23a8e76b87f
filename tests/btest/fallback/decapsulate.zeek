# @TEST-DOC: The fallback analyses what is within ERM, behind an outer VLAN tag, in fragments and nested as well; conn.log has the inner flows only.
#
# @TEST-REQUIRES: /usr/bin/python3 -c 'import scapy.all'
#
# @TEST-EXEC: make-trace mirrored mirrored.pcap
# @TEST-EXEC: zeek -r mirrored.pcap $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut id.orig_h id.orig_p id.resp_h id.resp_p proto service conn_state orig_pkts resp_pkts < conn.log | sort > flows
# @TEST-EXEC: btest-diff flows
# @TEST-EXEC: zeek-cut id.orig_h id.orig_p id.resp_h id.resp_p tunnel_type action < tunnel.log > tunnels
# @TEST-EXEC: btest-diff tunnels
# @TEST-EXEC: /usr/bin/python3 parents.py > parents
# @TEST-EXEC: btest-diff parents
# @TEST-EXEC: zeek-cut name < weird.log > weirds
# @TEST-EXEC: btest-diff weirds
# @TEST-EXEC: test ! -e reporter.log

# @TEST-START-FILE parents.py
import subprocess

def cut(log, *columns):
    with open(log) as file:
        lines = subprocess.run(["zeek-cut", *columns], stdin=file, capture_output=True, text=True, check=True).stdout
    return [line.split("\t") for line in lines.splitlines()]

switches = {uid: f"{address} session {port}" for uid, address, port in cut("tunnel.log", "uid", "id.orig_h", "id.orig_p")}
for client, parents in sorted(cut("conn.log", "id.orig_h", "tunnel_parents")):
    print(client, "from", *sorted(switches[uid] for uid in parents.split(",")))
# @TEST-END-FILE
