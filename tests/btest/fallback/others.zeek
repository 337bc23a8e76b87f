# @TEST-DOC: What is not ERM is analysed as without the package: VXLAN, Geneve, and what a site's own scripts make of SKIP,
# @TEST-DOC: loaded before or after the package, with each fallback.
#
# @TEST-REQUIRES: python3 -c 'import scapy.all'
#
# @TEST-EXEC: make-trace others others.pcap
# @TEST-EXEC: as-without-package others.pcap > queries
# @TEST-EXEC: btest-diff queries
