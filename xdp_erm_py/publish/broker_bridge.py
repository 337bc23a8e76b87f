"""Between pipes and Broker: publishes each message that comes in on a line, writes each event that comes back.

    python3 -m xdp_erm_py.publish.broker_bridge ADDRESS PORT

Both sides speak the messages of events.py. The first line out, an empty object, says that the peering stands. It ends
with its standard input, or when it is killed; what fails is the last line on standard error.
"""

from __future__ import annotations

import ipaddress
import json
import os
import select
import sys
from datetime import datetime, timedelta, timezone
from typing import Any

import broker
import broker.zeek

from . import events

_RETRY_SECONDS = 1.0
_READ_BYTES = 1 << 16


def to_broker(value: dict[str, Any]) -> Any:
    """A value of events.py in the types of the bindings."""
    data_type, data = value["@data-type"], value["data"]
    if data_type == "vector":
        return [to_broker(element) for element in data]
    if data_type == "table":
        return {to_broker(entry["key"]): to_broker(entry["value"]) for entry in data}
    if data_type == "port":
        number, _, protocol = data.partition("/")
        return broker.Port(int(number), getattr(broker.Port, protocol.upper()))
    convert = {
        "address": ipaddress.ip_address, "boolean": bool, "count": broker.Count, "none": lambda _: None, "string": str,
        "timespan": lambda text: timedelta(milliseconds=int(text[:-len("ms")])),
        "timestamp": lambda text: datetime.fromisoformat(text).replace(tzinfo=timezone.utc),
    }
    return convert[data_type](data)


def from_broker(value: Any) -> dict[str, Any]:
    """An argument of an acknowledgement: a string or a count."""
    return events.string(value) if isinstance(value, str) else events.count(int(value.value))


def main() -> None:
    address, port = sys.argv[1], int(sys.argv[2])
    endpoint = broker.Endpoint()
    subscriber = endpoint.make_subscriber(broker.Topic(events.ACKNOWLEDGEMENT_TOPIC))
    if not endpoint.peer(address, port, _RETRY_SECONDS):
        sys.exit(f"no peering with {address}:{port}")
    print("{}", flush=True)
    # One thread: a blocking call into the bindings keeps Python's lock, and no other would run.
    stdin, rest = sys.stdin.fileno(), b""
    while True:
        readable, _, _ = select.select([stdin, subscriber.fd()], [], [])
        if stdin in readable:
            read = os.read(stdin, _READ_BYTES)
            if not read:
                os._exit(0)  # the bindings' own way out can hang
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                message = json.loads(line)
                name, arguments = message["data"][2]["data"]
                endpoint.publish(message["topic"],
                                 broker.zeek.Event(name["data"], *[to_broker(value) for value in arguments["data"]]))
        for topic, data in subscriber.poll():
            event = broker.zeek.Event(data)
            print(events.encode(topic, event.name(), *[from_broker(value) for value in event.args()]), flush=True)


if __name__ == "__main__":
    main()
