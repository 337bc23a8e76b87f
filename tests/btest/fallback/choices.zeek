# @TEST-DOC: What each choice of a fallback logs of the same traffic, and what T and F, the choices of once, stand for.
#
# @TEST-REQUIRES: python3 -c 'import scapy.all'
#
# @TEST-EXEC: make-trace mirrored mirrored.pcap
# @TEST-EXEC: sh logged.sh tunnel "" $XDP_ERM
# @TEST-EXEC: sh logged.sh skip "" $XDP_ERM $XDP_ERM/skip.zeek
# @TEST-EXEC: sh logged.sh none 'redef XDP_ERM::fallback = XDP_ERM::NONE;' $XDP_ERM
# @TEST-EXEC: btest-diff tunnel
# @TEST-EXEC: btest-diff skip
# @TEST-EXEC: btest-diff none
# @TEST-EXEC: sh logged.sh T 'redef XDP_ERM::fallback = T;' $XDP_ERM && cmp T tunnel
# @TEST-EXEC: sh logged.sh F 'redef XDP_ERM::fallback = F;' $XDP_ERM && cmp F none
# @TEST-EXEC: sh logged.sh again 'redef XDP_ERM::fallback = XDP_ERM::TUNNEL;' $XDP_ERM $XDP_ERM/skip.zeek && cmp again tunnel
#
# SKIP without its setting: it is said, and nothing is lost.
# @TEST-EXEC: sh logged.sh unset 'redef XDP_ERM::fallback = XDP_ERM::SKIP;' $XDP_ERM && cmp unset tunnel
# @TEST-EXEC: grep -o "XDP_ERM: .*" unset.said > unset-says
# @TEST-EXEC: btest-diff unset-says
#
# @TEST-EXEC-FAIL: sh logged.sh wrong 'redef XDP_ERM::fallback = "skip";' $XDP_ERM
# @TEST-EXEC: grep -o "XDP_ERM::.*" wrong.said > wrong-says
# @TEST-EXEC: btest-diff wrong-says

# @TEST-START-FILE logged.sh
# logged.sh NAME CODE SCRIPT...: what is logged in a file NAME, what Zeek says in NAME.said
set -e
name=$1 code=$2
shift 2
rm -f *.log
zeek -r mirrored.pcap "$@" -e "$code" 2> $name.said
zeek-cut id.orig_h id.orig_p id.resp_h id.resp_p service orig_pkts < conn.log | sort > $name
[ ! -e tunnel.log ] || zeek-cut id.orig_h id.orig_p tunnel_type action < tunnel.log | sort >> $name
# @TEST-END-FILE
