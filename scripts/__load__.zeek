@load ./main
@load ./websocket
@load ./notices
@load ./telemetry
@load ./fallback
