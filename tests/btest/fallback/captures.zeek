# @TEST-DOC: Real VXLAN, Geneve and ERSPAN are analysed as without the package.
#
# @TEST-REQUIRES: test -e $CAPTURES/geneve.pcap
#
# @TEST-EXEC: as-without-package $CAPTURES/geneve.pcap $CAPTURES/vxlan.pcap $CAPTURES/erspanII.pcap
