# @TEST-DOC: Datagrams of every length, from none on: what is too short is reported, has a row of its own,
# @TEST-DOC: and none is read past its end.
#
# @TEST-REQUIRES: python3 -c 'import scapy.all'
#
# @TEST-EXEC: make-trace lengths lengths.pcap
# @TEST-EXEC: zeek -r lengths.pcap $XDP_ERM %INPUT
# @TEST-EXEC: zeek-cut name source < weird.log | sort | uniq -c > weirds
# @TEST-EXEC: btest-diff weirds
# @TEST-EXEC: zeek-cut failure_reason id.orig_p < analyzer.log > failures
# @TEST-EXEC: btest-diff failures
# @TEST-EXEC: zeek-cut id.orig_h id.resp_h id.resp_p service orig_pkts < conn.log | sort | uniq -c > flows
# @TEST-EXEC: btest-diff flows

redef Weird::sampling_threshold = 100000;
redef Weird::sampling_global_list = {};
