"""Makes what the documentation has from the code: tables in its pages, and the man page. `make docs` runs it.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from bench import plot
from bench.table import Row, number
from xdp_erm_py import __version__, cli, config, settings
from xdp_erm_py.program.counters import COUNTERS

DIRECTORY = Path(__file__).parent
MAN_PAGE = "xdp-erm.8"


def counters() -> str:
    rows = ["| counter | |", "|---|---|"]
    rows += [f"| `{each.name}` | {each.meaning} |" for each in COUNTERS]
    return "\n".join(rows) + "\n"


def cures() -> str:
    rows = ["| `xdp-erm stats` shows many | what is so, and what to do |", "|---|---|"]
    rows += [f"| `{each.name}` | {each.cure} |" for each in COUNTERS if each.cure]
    return "\n".join(rows) + "\n"


def zeekctl() -> str:
    rows = ["| option `xdp_erm.` | value | |", "|---|---|---|"]
    for name, each in settings.SETTINGS.items():
        if each.zeekctl:
            value = f"`{each.metavar}`" if each.metavar else int(not settings.DEFAULTS[name])
            rows.append(f"| `{name}` | {value} | {each.help} |")
    return "\n".join(rows) + "\n"


def figures() -> str:
    """What was measured and is not drawn."""
    rows = map(Row.of, json.loads((DIRECTORY / "bench.json").read_text())["rows"])
    lines = ["| | median | smallest to largest | |", "|---|---|---|---|"]
    group = ""
    for row in rows:
        if plot.is_drawn(row):
            continue
        if row.group != group:
            group = row.group
            lines.append(f"| **{group}** | | | |")
        spread = f"{number(min(row.values))} to {number(max(row.values))}" if len(row.values) > 1 else ""
        lines.append(f"| {row.name} | {number(row.median)} {row.unit} | {spread} | {row.note} |" if row.values
                     else f"| {row.name} | | | {row.note} |")
    return "\n".join(lines) + "\n"


TABLES = {"figures": figures, "settings": settings.reference, "zeekctl": zeekctl, "counters": counters, "cures": cures}
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """A page with its tables as they are to be."""
    return _TABLE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[4]}", page)


def man_page() -> str:
    overall = cli.make_parser([])
    commands = _subparsers(overall)
    lines = [
        f'.TH XDP\\-ERM 8 "" "xdp\\-erm {__version__}" "System Administration"',
        ".SH NAME", f"xdp\\-erm \\- {_roff(_lower(overall.description or '')).rstrip('.')}",
        ".SH SYNOPSIS", ".B xdp\\-erm", ".I COMMAND", "[options]",
        ".SH DESCRIPTION",
        "A mirror session is one flow to AF_PACKET, and one worker gets all. xdp\\-erm takes the wrapping off in XDP, "
        "before the kernel sees the frame, so that the inner flows are balanced, each with its VLAN. Every packet gets "
        "one verdict and is counted; what is not a mirror's goes on untouched.",
        ".SH COMMANDS"]
    for name in commands.choices:
        # Only the command that is named is imported.
        lines += _command(f"xdp-erm {name}", _subparsers(cli.make_parser([name])), name)
    lines += [
        ".SH FILES",
        ".TP", f".I {_roff(str(config.DEFAULT_PATH))}",
        "Settings: those of every interface under defaults, those of each under interfaces.",
        ".TP", ".I /run/xdp\\-erm.journal", "What a command that is killed had changed; the next one undoes it.",
        ".TP", ".I /run/xdp\\-erm\\-publish.pid", "The publisher's lock and process.",
        ".TP", ".I /var/cache/xdp\\-erm", "Compiled programs. Can be removed at any time.",
        ".SH EXIT STATUS",
        "0: done. 1: it failed; one line on stderr says what, where, and what to do. 2: usage or configuration.",
        ".SH SEE ALSO", ".BR zeek (8),", ".BR tcpdump (8),", ".BR ip\\-link (8)"]
    return "\n".join(lines) + "\n"


def _subparsers(parser: argparse.ArgumentParser) -> argparse._SubParsersAction:
    return next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def _command(title: str, siblings: argparse._SubParsersAction, name: str) -> Iterator[str]:
    parser = siblings.choices[name]
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    inner = next((action for action in actions if isinstance(action, argparse._SubParsersAction)), None)
    operands = [action for action in actions if not action.option_strings and action is not inner]
    yield f".SS {_roff(title)} {' '.join(map(_operand, operands))}".rstrip()
    help_ = next(each.help for each in siblings._choices_actions if each.dest == name)
    yield _roff(_sentence(help_ or ""))
    for action in actions:
        if action is not inner and action.help:
            yield ".TP"
            yield _head(action)
            yield _roff(_sentence(_help(action)))
    for each in inner.choices if inner else ():
        yield from _command(f"{title} {each}", inner, each)


def _operand(action: argparse.Action) -> str:
    metavar = f"\\fI{_roff(str(action.metavar or action.dest))}\\fR"
    return {"*": f"[{metavar} ...]", "?": f"[{metavar}]"}.get(str(action.nargs), metavar)


def _head(action: argparse.Action) -> str:
    if not action.option_strings:
        return _operand(action)
    names = ", ".join(f"\\fB{_roff(option)}\\fR" for option in action.option_strings)
    if action.nargs == 0:
        return names
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    value = f"\\fI{_roff(str(action.metavar or choices))}\\fR"
    return f"{names} [{value}]" if action.nargs == "?" else f"{names} {value}"


def _help(action: argparse.Action) -> str:
    default = "the host's own" if action.default == socket.gethostname() else action.default
    return (action.help or "") % {**vars(action), "default": default}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _roff(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")


def pages() -> dict[Path, str]:
    """All files that are made here, or have tables that are, as they are to be."""
    made = {page: with_tables(page.read_text()) for page in sorted(DIRECTORY.glob("*.md"))}
    return {**made, DIRECTORY / MAN_PAGE: man_page()}


def main() -> None:
    for path, text in pages().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
