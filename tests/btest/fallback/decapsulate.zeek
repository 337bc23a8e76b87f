# @TEST-DOC: What is within ERM is analysed, also behind an outer tag, in fragments and nested.
#
# @TEST-REQUIRES: python3 -c 'import scapy.all'
#
# @TEST-EXEC: make-trace mirrored mirrored.pcap
# @TEST-EXEC: zeek -r mirrored.pcap $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut id.orig_h id.orig_p id.resp_h id.resp_p service conn_state orig_pkts resp_pkts < conn.log | sort > flows
# @TEST-EXEC: btest-diff flows
# @TEST-EXEC: zeek-cut id.orig_h id.orig_p id.resp_h id.resp_p tunnel_type action < tunnel.log | sort > tunnels
# @TEST-EXEC: btest-diff tunnels
# @TEST-EXEC: python3 parents.py > parents
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

tunnels = cut("tunnel.log", "uid", "id.orig_h", "id.orig_p")
switches = {uid: f"{address} session {port}" for uid, address, port in tunnels}
for client, parents in sorted(cut("conn.log", "id.orig_h", "tunnel_parents")):
    print(client, "from", *sorted(switches[uid] for uid in parents.split(",")))
# @TEST-END-FILE
