"""The command line. Exit status: 0 done, 1 it failed, 2 usage or configuration."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, config
from .errors import UsageError, XdpErmError
from .modules import PACKAGES
from .printable import printable, say
from .settings import DEFAULTS, SETTINGS, InterfaceConfig, Setting, check


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; what it prints is for people, --json for programs."""
    if arguments is None:
        arguments = sys.argv[1:]
    _open_streams()
    try:
        args = make_parser(arguments[:1]).parse_args(arguments)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except XdpErmError as error:
        return _failed(error)
    except ModuleNotFoundError as error:
        package = PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        return _failed(XdpErmError(f"the Python module {error.name} is missing: install {package}"))
    except BrokenPipeError:
        _discard_output()
        return XdpErmError.exit_status
    except OSError as error:
        if error.errno not in _EXHAUSTED:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            _discard_output()
        where = f"{error.filename}: " if error.filename else ""
        return _failed(XdpErmError(f"{where}{error.strerror}: run it again once there is more"))
    except KeyboardInterrupt:
        return 130


def _open_streams() -> None:
    """Whoever starts a command with a closed stream wants nothing of it; nothing else may get its descriptor."""
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(null, True)
    os.close(null)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    # Names may be in another alphabet than the terminal's. As Python does it with stderr:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


# What a process or the machine can have run out of.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT)


def _discard_output() -> None:
    """Nobody takes it any more. Python would complain of that once more when it flushes stdout at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failed(error: XdpErmError) -> int:
    """Says what is wrong; returns the exit status."""
    print(printable(f"xdp-erm: {error}"), file=sys.stderr)
    return error.exit_status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def make_parser(command: Sequence[str]) -> argparse.ArgumentParser:
    """`command`: the one that was given, if any; only its own module is imported."""
    parser = _Parser(
        prog="xdp-erm", description="Strips HP ERM, ERSPAN, VXLAN and other wrapping from mirrored traffic in "
        "XDP, before AF_PACKET's fanout sees it.")
    parser.add_argument("--version", action="version", version=f"xdp-erm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    attach = commands.add_parser("attach", help="attach to interfaces, or bring what is attached to the configuration")
    _interfaces(attach, "default: those in the configuration file")
    _settings(attach)
    attach.add_argument("--force", action="store_true", help="replace another's XDP program")
    attach.set_defaults(run=_attach)

    detach = commands.add_parser("detach", help="take xdp-erm off and bring the NIC's old settings back")
    _interfaces(detach, "default: all it is attached to")
    detach.set_defaults(run=_detach)

    status = commands.add_parser("status", help="what is attached where, since when, and how it is configured")
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(run=_status)

    stats = commands.add_parser("stats", help="verdict counters and sessions")
    stats.add_argument("interface", nargs="?", metavar="IFACE", help="default: all it is attached to")
    stats.add_argument("--json", action="store_true", help="for programs; with --watch one line a reading")
    stats.add_argument("--watch", nargs="?", type=_seconds, const=1.0, metavar="SECONDS",
                       help="show rates, every second or as told")
    stats.set_defaults(run=_stats)

    show = commands.add_parser("config", help="print the effective configuration")
    _interfaces(show, "default: those in the configuration file")
    _settings(show)
    show.set_defaults(run=_config)

    for name, (module_name, text) in _SEPARATE_COMMANDS.items():
        separate = commands.add_parser(name, help=text)
        if name in command:
            module = importlib.import_module(f"xdp_erm_py{module_name}")
            module.add_arguments(separate)
            separate.set_defaults(run=module.run)
    return parser


#: Commands in a module of their own, which says `add_arguments(parser)` and `run(args) -> int`.
_SEPARATE_COMMANDS = {
    "doctor": (".doctor", "look at everything that decapsulation depends on, and say what to do"),
    "generate": (".lab.generate", "send ERM made in the kernel into a veth interface, as a load"),
    "lab": (".lab", "try it without hardware: a switch and a sensor in network namespaces"),
    "publish": (".publish", "report the counters to Zeek for as long as it runs"),
    "systemd": (".systemd", "attach at every boot: install or remove the systemd units"),
}


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0.1 and 3600 seconds")
    return seconds


def _interfaces(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("interfaces", nargs="*", metavar="IFACE", help=text)


def _checked(name: str, setting: Setting) -> Any:
    """A parser of one option's text, by the setting's own rules."""
    def parse(text: str) -> Any:
        values = text.split(",") if setting.many else [text]
        try:
            value: Any = [int(item) if setting.number and item.isdecimal() else item for item in values]
            return check(name, value if setting.many else value[0])
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return parse


def _settings(parser: argparse.ArgumentParser) -> None:
    """The options that stand over the configuration file. Those that name several things may be repeated."""
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"default: {config.DEFAULT_PATH}, if it is there")
    group = parser.add_argument_group("settings (over the configuration file)")
    for name, setting in SETTINGS.items():
        how: dict[str, Any]
        if setting.metavar is None:
            how = {"action": "store_const", "const": not DEFAULTS[name]}
        else:
            how = {"action": "append" if setting.many else "store", "type": _checked(name, setting),
                   "metavar": setting.metavar}
        group.add_argument(setting.option, dest=name, help=setting.help, **how)


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    overrides = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    for name in overrides:
        if SETTINGS[name].many:
            overrides[name] = check(name, [item for items in overrides[name] for item in items])
    return overrides


def _configured(args: argparse.Namespace) -> dict[str, InterfaceConfig]:
    """The interfaces that a command is for, by the kernel's names where they are there, each with its effective
    configuration."""
    from .kernel.links import Links
    configuration = config.load(args.config)
    names = config.check_interface_names(args.interfaces) or list(configuration.interfaces)
    if not names:
        raise UsageError("no interface: name one, or put it under `interfaces` in "
                         f"{args.config or config.DEFAULT_PATH}")
    overrides = _overrides(args)
    with Links() as links:
        known = {name: link.names for link in links for name in link.names}
    interfaces = dict.fromkeys(known.get(name, (name,)) for name in names)
    return {names[0]: configuration.of(names, overrides) for names in interfaces}


def _each(names: Any, act: Any) -> int:
    """Does it for each interface. One that fails does not keep the others from being done."""
    failed = 0
    for name in names:
        try:
            for line in act(name):
                say(line)
        except XdpErmError as error:
            failed = _failed(error)
    return failed


def _attach(args: argparse.Namespace) -> int:
    from .interface import loader
    from .kernel import privileges
    configured = _configured(args)
    privileges.require_to_change()
    return _each(configured, lambda name: loader.attach(name, configured[name], args.force))


def _detach(args: argparse.Namespace) -> int:
    from .interface import loader, ours, topology
    from .kernel import privileges
    from .kernel.links import Links
    privileges.require_to_change()
    with Links() as links:
        names = list(dict.fromkeys(args.interfaces)) or [found.link.name for found in ours.find_all(links)]
        names = topology.downwards(links, names)
    if not names:
        print("xdp-erm is not attached to any interface of this network namespace")
    return _each(names, loader.detach)


# How long a status looks at frames that a program seems not to see.
_PATIENCE = 0.5  # seconds


def _status(args: argparse.Namespace) -> int:
    from .interface import isolation, ours, running, stats
    from .kernel import privileges
    from .kernel.links import Links
    privileges.require_to_look()
    with Links() as links:
        interfaces = ours.undisturbed(lambda: [
            {**stats.describe(found), **isolation.look(found.link).as_dict(), "leaked": stats.leaked(found),
             "unmarked": stats.unmarked(found), "scattered": stats.scattered(found),
             "unseen": running.unseen(links, found, _PATIENCE),
             "outdated": found.outdated}
            for found in ours.find_all(links)])
    if args.json:
        print(json.dumps({"interfaces": interfaces}))
    else:
        from . import display
        display.status(interfaces)
    return 0


def _stats(args: argparse.Namespace) -> int:
    from .interface import stats
    if args.watch is not None:
        from . import display
        return display.watch(args.interface, args.watch, args.json)
    interfaces = stats.snapshot(args.interface)
    if args.json:
        print(json.dumps({"interfaces": interfaces}))
    else:
        from . import display
        display.stats(interfaces)
    return 0


def _config(args: argparse.Namespace) -> int:
    import yaml
    configured = _configured(args)
    print(yaml.safe_dump({"interfaces": {name: settings.as_dict() for name, settings in configured.items()}},
                         sort_keys=False, default_flow_style=None), end="")
    return 0
