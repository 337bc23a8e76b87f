"""The events that publisher and Zeek exchange, in the JSON form of Broker's data model.

scripts/main.zeek declares them. A message is what Zeek's WebSocket API takes and gives: an object with a topic and a
vector [1, 1, [event name, [arguments]]], every value with its type. A record is a vector of its fields in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any

VERSION = 2

REPORT_TOPIC = "zeek.xdp_erm.report"
ACKNOWLEDGEMENT_TOPIC = "zeek.xdp_erm.acknowledgement"

REPORT = "XDP_ERM::report"
FOREIGN_SENDERS = "XDP_ERM::foreign_senders"
DETACHED = "XDP_ERM::detached"
ACKNOWLEDGED = "XDP_ERM::acknowledged"

Value = dict[str, Any]


def _typed(data_type: str, data: Any) -> Value:
    return {"@data-type": data_type, "data": data}


def boolean(value: bool) -> Value:
    return _typed("boolean", value)


def count(value: int) -> Value:
    return _typed("count", value)


def string(value: str) -> Value:
    return _typed("string", value)


def address(value: str) -> Value:
    return _typed("address", value)


def udp_port(value: int) -> Value:
    return _typed("port", f"{value}/udp")


def timestamp(seconds: float) -> Value:
    """`seconds` since 1970, UTC; Broker takes milliseconds and no time zone."""
    return _typed("timestamp", datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3])


def timespan(seconds: float) -> Value:
    """An interval, to the millisecond."""
    return _typed("timespan", f"{round(seconds * 1000)}ms")


def vector(values: Iterable[Value]) -> Value:
    return _typed("vector", list(values))


def table(values: dict[str, Value]) -> Value:
    """By strings."""
    return _typed("table", [{"key": string(key), "value": value} for key, value in values.items()])


NONE: Value = {"@data-type": "none", "data": {}}


def encode(topic: str, name: str, *arguments: Value) -> str:
    """The message that publishes event `name` under `topic`."""
    event = vector([string(name), vector(arguments)])
    return json.dumps({"type": "data-message", "topic": topic, **vector([count(1), count(1), event])})


def decode(text: str) -> tuple[str, list[Any]] | None:
    """Name and bare arguments of the event in a message; None where it holds none. ValueError: not a message."""
    message = _parse(text)
    try:
        if message["type"] != "data-message":
            return None
        name, arguments = message["data"][2]["data"][:2]
        return name["data"], [argument["data"] for argument in arguments["data"]]
    except (TypeError, LookupError) as error:
        raise ValueError(f"not a message of Zeek's WebSocket API: {text[:80]}") from error


def refusal(text: str) -> str | None:
    """What Zeek complains about in an error message; None for any other message. ValueError: not a message."""
    message = _parse(text)
    if not isinstance(message, dict) or message.get("type") != "error":
        return None
    return f"{message.get('code')}: {message.get('context')}"[:200]


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"nested too deeply: {text[:80]}") from None
