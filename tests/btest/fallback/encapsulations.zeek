# @TEST-DOC: What is configured for XDP and Zeek has an analyzer for is analysed on the ports configured, with each fallback
# @TEST-DOC: but NONE, and nothing else.
#
# @TEST-REQUIRES: python3 -c 'import scapy.all'
#
# @TEST-EXEC: make-trace others others.pcap
# @TEST-EXEC: sh queries.sh $XDP_ERM %INPUT > tunnel
# @TEST-EXEC: sh queries.sh $XDP_ERM $XDP_ERM/skip.zeek %INPUT > skip
# @TEST-EXEC: sh queries.sh $XDP_ERM %INPUT -e 'redef XDP_ERM::fallback = XDP_ERM::NONE;' > none
# @TEST-EXEC: sh queries.sh $XDP_ERM > unconfigured
# @TEST-EXEC: cmp tunnel skip && cmp none unconfigured
# @TEST-EXEC: btest-diff tunnel
# @TEST-EXEC: btest-diff none

redef XDP_ERM::vxlan_ports = { 8472/udp };
redef XDP_ERM::geneve_ports = { 6082/udp };

# @TEST-START-FILE queries.sh
# Which hosts' queries were found, and within what.
rm -f *.log
zeek -C -b -r others.pcap base/protocols/conn base/protocols/dns base/frameworks/tunnels "$@" 2> said
zeek-cut id.orig_h < dns.log | sort
zeek-cut id.resp_p tunnel_type action < tunnel.log | grep DISCOVER | sort
# @TEST-END-FILE
