# @TEST-DOC: What is not ERM is analysed as without the package: VXLAN, Geneve, and what a site's own scripts make of SKIP,
# @TEST-DOC: loaded before or after the package, with each fallback.
#
# @TEST-REQUIRES: python3 -c 'import scapy.all'
#
# @TEST-EXEC: make-trace others others.pcap
# @TEST-EXEC: python3 others.py others.pcap

# @TEST-START-FILE others.py
import os
import subprocess
import sys
from pathlib import Path

PORT = "PacketAnalyzer::register_for_ports(PacketAnalyzer::ANALYZER_UDP, PacketAnalyzer::ANALYZER_SKIP, set(%d/udp));"
PORTS = """
redef PacketAnalyzer::VXLAN::vxlan_ports += { 8472/udp };
redef PacketAnalyzer::Geneve::geneve_ports += { 6082/udp };
"""
SITES = {
    "nothing of its own": "",
    "more ports": PORTS,
    "ports registered": """event zeek_init() {
        PacketAnalyzer::register_for_ports(PacketAnalyzer::ANALYZER_UDP, PacketAnalyzer::ANALYZER_VXLAN, set(8472/udp));
        PacketAnalyzer::register_for_ports(PacketAnalyzer::ANALYZER_UDP, PacketAnalyzer::ANALYZER_GENEVE, set(6082/udp)); }""",
    "8 bytes before Ethernet": """
redef PacketAnalyzer::SKIP::skip_bytes = 8;
redef PacketAnalyzer::SKIP::default_analyzer = PacketAnalyzer::ANALYZER_ETHERNET;
event zeek_init() { %s }""" % PORT % 9000,
    # As in Zeek's own example: what SKIP does by default is not said.
    "4 bytes before IP": "redef PacketAnalyzer::SKIP::skip_bytes = 4; event zeek_init() { %s }" % PORT % 9001,
}
CHOICES = {"TUNNEL": "", "SKIP": "redef XDP_ERM::fallback = XDP_ERM::SKIP;", "NONE": "redef XDP_ERM::fallback = XDP_ERM::NONE;"}


BASE = ["base/protocols/conn", "base/protocols/dns", "base/frameworks/tunnels"]


def analysed(*scripts):
    """What is logged but for times and uids, and what was said."""
    for log in Path().glob("*.log"):
        log.unlink()
    said = subprocess.run(["zeek", "-C", "-b", "-r", sys.argv[1], *BASE, *scripts], stderr=subprocess.PIPE, text=True, check=True).stderr
    rows = []
    for log in sorted(Path().glob("*.log")):
        if log.name not in ("reporter.log", "packet_filter.log", "loaded_scripts.log", "telemetry.log"):
            columns = [line for line in log.read_text().splitlines() if line.startswith("#fields")][0].split("\t")[1:]
            kept = [c for c in columns if c not in ("ts", "uid", "tunnel_parents", "duration", "fuid", "rtt")]
            with log.open() as file:
                rows += [log.name + " " + row for row in subprocess.run(
                    ["zeek-cut", *kept], stdin=file, capture_output=True, text=True, check=True).stdout.splitlines()]
    return sorted(rows), said


package = os.environ["XDP_ERM"]
found = set()
for name, script in SITES.items():
    Path("site.zeek").write_text(script)
    alone, nothing = analysed("./site.zeek")
    assert nothing == "", nothing
    found |= {row for row in alone if "10.7.0." in row}
    for choice, code in CHOICES.items():
        options = ["-e", code] if code else []
        for order in (["./site.zeek", package], [package, "./site.zeek"]):
            rows, said = analysed(*order, *options)
            assert rows == alone, (name, choice, order, sorted(set(rows) ^ set(alone)))
            assert not [line for line in said.splitlines() if "XDP_ERM" not in line], said
            assert choice == "SKIP" or said == "", said
# The comparison means something: each query was found by one of them.
if sys.argv[1] == "others.pcap":
    assert all(any(f"10.7.0.{number}" in row for row in found) for number in range(1, 8)), found
# @TEST-END-FILE
