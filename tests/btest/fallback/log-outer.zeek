# @TEST-DOC: The rows of the ERM datagrams themselves are there when they are wanted.
#
# @TEST-REQUIRES: python3 -c 'import scapy.all'
#
# @TEST-EXEC: make-trace mirrored mirrored.pcap
# @TEST-EXEC: zeek -r mirrored.pcap $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut id.orig_h id.orig_p id.resp_h id.resp_p service orig_pkts < conn.log | sort > flows
# @TEST-EXEC: btest-diff flows

redef XDP_ERM::log_outer = T;
