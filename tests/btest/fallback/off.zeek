# @TEST-DOC: One line switches the fallback off: then the ERM datagrams are what is seen.
#
# @TEST-REQUIRES: python3 -c 'import scapy.all'
#
# @TEST-EXEC: make-trace mirrored mirrored.pcap
# @TEST-EXEC: zeek -r mirrored.pcap $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut id.orig_h id.orig_p id.resp_h id.resp_p proto orig_pkts < conn.log | sort > flows
# @TEST-EXEC: btest-diff flows

redef XDP_ERM::fallback = F;
