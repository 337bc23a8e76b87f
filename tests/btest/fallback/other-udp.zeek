# @TEST-DOC: A flow to ERM's port that is answered is not ERM and stays in conn.log.
#
# @TEST-REQUIRES: python3 -c 'import scapy.all'
#
# @TEST-EXEC: make-trace other_udp other_udp.pcap
# @TEST-EXEC: zeek -r other_udp.pcap $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut id.orig_h id.orig_p id.resp_h id.resp_p proto orig_pkts resp_pkts < conn.log > flows
# @TEST-EXEC: btest-diff flows
