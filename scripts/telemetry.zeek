##! The counters of xdp_erm.log as metrics, on the manager or a standalone Zeek.
##!
##! They add up the reports, so they keep growing when a program is attached anew and starts to count from zero.

@load base/frameworks/telemetry
@load ./main

module XDP_ERM;

global packets_family = Telemetry::register_counter_family(Telemetry::MetricOpts(
    $prefix="zeek",
    $name="xdp-erm-packets",
    $unit="",
    $label_names=vector("host", "interface", "verdict"),
    $help_text="Packets that the XDP program saw, by verdict",
));

global bytes_family = Telemetry::register_counter_family(Telemetry::MetricOpts(
    $prefix="zeek",
    $name="xdp-erm-bytes",
    $unit="",
    $label_names=vector("host", "interface", "verdict"),
    $help_text="Bytes of the packets that the XDP program saw, by verdict",
));

global notes_family = Telemetry::register_counter_family(Telemetry::MetricOpts(
    $prefix="zeek",
    $name="xdp-erm-noted-packets",
    $unit="",
    $label_names=vector("host", "interface", "note"),
    $help_text="Decapsulated packets of which there is something to note, by what it is",
));

global host_drops_family = Telemetry::register_counter_family(Telemetry::MetricOpts(
    $prefix="zeek",
    $name="xdp-erm-host-drops",
    $unit="",
    $label_names=vector("host", "interface"),
    $help_text="Packets that the interface received and the host dropped",
));

global receive_errors_family = Telemetry::register_counter_family(Telemetry::MetricOpts(
    $prefix="zeek",
    $name="xdp-erm-receive-errors",
    $unit="",
    $label_names=vector("host", "interface"),
    $help_text="Frames that the interface could not receive: too long, or damaged",
));

global queue_drops_family = Telemetry::register_counter_family(Telemetry::MetricOpts(
    $prefix="zeek",
    $name="xdp-erm-queue-drops",
    $unit="",
    $label_names=vector("host", "interface"),
    $help_text="Decapsulated packets that the queues to other CPUs had no room for",
));

global sessions_family = Telemetry::register_gauge_family(Telemetry::MetricOpts(
    $prefix="zeek",
    $name="xdp-erm-sessions",
    $unit="",
    $label_names=vector("host", "interface"),
    $help_text="Switch sessions that sent something in the latest interval",
));

global gaps_family = Telemetry::register_counter_family(Telemetry::MetricOpts(
    $prefix="zeek",
    $name="xdp-erm-gaps",
    $unit="",
    $label_names=vector("host", "interface"),
    $help_text="Frames that are missing by their numbers, of sessions that number them",
));

global reordered_family = Telemetry::register_counter_family(Telemetry::MetricOpts(
    $prefix="zeek",
    $name="xdp-erm-reordered",
    $unit="",
    $label_names=vector("host", "interface"),
    $help_text="Frames that came behind one with a higher number",
));

hook reported(r: Report)
	{
	for ( verdict, counter in r$verdicts )
		{
		Telemetry::counter_family_inc(packets_family, vector(r$host, r$interface, verdict), counter$packets);
		Telemetry::counter_family_inc(bytes_family, vector(r$host, r$interface, verdict), counter$bytes);
		}

	for ( note, noted in r$notes )
		Telemetry::counter_family_inc(notes_family, vector(r$host, r$interface, note), noted$packets);

	if ( "host_drops" in r$others )
		Telemetry::counter_family_inc(host_drops_family, vector(r$host, r$interface), r$others["host_drops"]);

	if ( "receive_errors" in r$others )
		Telemetry::counter_family_inc(receive_errors_family, vector(r$host, r$interface),
		                              r$others["receive_errors"]);

	if ( "queue_drops" in r$others )
		Telemetry::counter_family_inc(queue_drops_family, vector(r$host, r$interface), r$others["queue_drops"]);

	for ( _, s in r$sessions )
		{
		if ( s?$gaps )
			Telemetry::counter_family_inc(gaps_family, vector(r$host, r$interface), s$gaps);
		if ( s?$reordered )
			Telemetry::counter_family_inc(reordered_family, vector(r$host, r$interface), s$reordered);
		}

	Telemetry::gauge_family_set(sessions_family, vector(r$host, r$interface), |r$sessions|);
	}

hook program_detached(ts: time, host: string, interface: string, present: bool)
	{
	Telemetry::gauge_family_set(sessions_family, vector(host, interface), 0);
	}
