##! Chooses the fallback SKIP, see :doc:`fallback`. Not loaded with the package: ``@load packages/xdp-erm/skip``.
##!
##! Zeek's SKIP analyzer reads its setting before anything runs, so a redef of :zeek:see:`XDP_ERM::fallback` cannot make it.

@load base/packet-protocols
@load ./fallback

module XDP_ERM;

redef fallback = SKIP;

# It is one for all of Zeek: another script's stays as it is, and the fallback says so.
@if ( PacketAnalyzer::SKIP::skip_bytes == 0 )
redef PacketAnalyzer::SKIP::skip_bytes = header_length;
redef PacketAnalyzer::SKIP::default_analyzer = PacketAnalyzer::ANALYZER_ETHERNET;
@endif
