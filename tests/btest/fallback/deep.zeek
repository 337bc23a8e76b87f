# @TEST-DOC: Of as many levels of ERM as a datagram can hold Zeek takes as many as tunnels may be deep.
#
# @TEST-REQUIRES: python3 -c 'import scapy.all'
#
# @TEST-EXEC: make-trace deep deep.pcap
# @TEST-EXEC: zeek -r deep.pcap $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut name < weird.log > weirds
# @TEST-EXEC: btest-diff weirds
