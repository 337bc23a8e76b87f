# @TEST-DOC: SKIP says once, at start, that it does not check lengths, where that is so: before Zeek 9.0.
#
# @TEST-REQUIRES: python3 -c 'import scapy.all'
#
# @TEST-EXEC: make-trace mirrored mirrored.pcap
# @TEST-EXEC: zeek -r mirrored.pcap $XDP_ERM $XDP_ERM/skip.zeek 2> said
# @TEST-EXEC: zeek -e 'print Version::at_least("9.0.0") ? 0 : 1;' > expected
# @TEST-EXEC: grep -c "past their end" said > found || true
# @TEST-EXEC: cmp found expected
# @TEST-EXEC: test $(grep -c . said) = $(cat expected)
