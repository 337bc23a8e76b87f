# @TEST-DOC: Where another script registers an analyzer for ERM's port, or for what the fallback makes of it, conn.log still
# @TEST-DOC: has what is within or what is around it, whichever is loaded first, and what can be seen of it is said.
#
# @TEST-REQUIRES: python3 -c 'import scapy.all'
#
# @TEST-EXEC: make-trace mirrored mirrored.pcap
# @TEST-EXEC: python3 rivals.py > rows
# @TEST-EXEC: btest-diff rows

# @TEST-START-FILE rivals.py
import os
import re
import subprocess
from pathlib import Path

SKIP = """
redef PacketAnalyzer::SKIP::skip_bytes = {bytes};
redef PacketAnalyzer::SKIP::default_analyzer = PacketAnalyzer::ANALYZER_ETHERNET;
"""
FOR_PORT = "PacketAnalyzer::register_for_ports(PacketAnalyzer::ANALYZER_UDP, PacketAnalyzer::ANALYZER_SKIP, set(7932/udp));"
UNTOLD = "PacketAnalyzer::register_packet_analyzer(PacketAnalyzer::ANALYZER_UDP, 7932, PacketAnalyzer::ANALYZER_SKIP);"
FOR_TYPE = "PacketAnalyzer::register_packet_analyzer(PacketAnalyzer::ANALYZER_GENEVE, 0, PacketAnalyzer::ANALYZER_ETHERNET);"

RIVALS = {
    "12 bytes": SKIP.format(bytes=12) + "event zeek_init() { %s }" % FOR_PORT,
    "8 bytes": SKIP.format(bytes=8) + "event zeek_init() { %s }" % FOR_PORT,
    "12 bytes, later": SKIP.format(bytes=12) + "event zeek_init() &priority=-100 { %s }" % FOR_PORT,
    "8 bytes, later": SKIP.format(bytes=8) + "event zeek_init() &priority=-100 { %s }" % FOR_PORT,
    "8 bytes, later, untold": SKIP.format(bytes=8) + "event zeek_init() &priority=-100 { %s }" % UNTOLD,
    "the payload type": "event zeek_init() { %s }" % FOR_TYPE,
    "the payload type, later": "event zeek_init() &priority=-100 { %s }" % FOR_TYPE,
}
CHOICES = {"TUNNEL": [], "SKIP": ["$XDP_ERM/skip.zeek"], "NONE": ["-e", "redef XDP_ERM::fallback = XDP_ERM::NONE;"]}


BASE = ["-b", "base/protocols/conn", "base/frameworks/reporter"]


def logged(scripts):
    for log in Path().glob("*.log"):
        log.unlink()
    said = subprocess.run(["zeek", "-r", "mirrored.pcap", *BASE, *scripts], stderr=subprocess.PIPE, text=True,
                          check=True).stderr
    ports = subprocess.check_output("zeek-cut id.resp_p id.orig_p < conn.log", shell=True, text=True).splitlines()
    outer = sum("7932" in line.split("\t") for line in ports)
    says = [re.sub("^warning in .*: XDP_ERM: ", "", line) for line in said.splitlines()]
    # Other Zeeks have no need to say it.
    return f"{len(ports) - outer} within, {outer} around", [line for line in says if "past their end" not in line]


for name, script in RIVALS.items():
    Path("rival.zeek").write_text(script)
    for choice, options in CHOICES.items():
        ours = [word.replace("$XDP_ERM", os.environ["XDP_ERM"]) for word in ["$XDP_ERM", *options]]
        before, after = logged(["./rival.zeek", *ours]), logged([*ours, "./rival.zeek"])
        print(f"{name}; {choice}: {before[0]}", *before[1], sep="\n    ")
        if after != before:
            print(f"    loaded after ours: {after[0]}", *after[1], sep="\n    ")
# @TEST-END-FILE
