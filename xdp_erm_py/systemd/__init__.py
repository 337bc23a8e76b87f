"""xdp-erm systemd: attaches at boot, and whenever the interface comes, and keeps the publisher running.

The units stand beside this file. Settings are those of /etc/xdp-erm.yaml.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import subprocess
import tempfile
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from .. import config
from ..errors import UsageError, XdpErmError
from ..kernel.links import Links
from ..printable import say
from ..publish import lock

UNIT_DIRECTORY = Path("/etc/systemd/system")
TEMPLATE = "xdp-erm@.service"
PUBLISHER = lock.UNIT
UNITS = (PUBLISHER, TEMPLATE)  # in the order to stop them: the publisher's last report needs the counters

#: How every unit file of ours begins, and the drop-in files for the units of Zeek's workers.
MARKER = "# Written by `xdp-erm systemd install`"
DROP_IN = "xdp-erm.conf"

#: The one that Zeek takes where nothing says otherwise.
ZEEKS_FANOUT_ID = "23"

#: It is there where systemd runs the system, see sd_booted(3).
_BOOTED = Path("/run/systemd/system")
_SYSTEMCTL_SECONDS = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    install = actions.add_parser("install", help="write the units and have them started at every boot")
    install.add_argument("interfaces", nargs="*", metavar="IFACE",
                         help="default: those in the configuration file, else those that Zeek's own units (zeek.conf) "
                              "capture from")
    install.add_argument("--require", action="store_true",
                         help="Zeek's own units of workers do not start where attaching fails, and stop with it")
    install.add_argument("--now", action="store_true", help="start them as well, or bring what runs up to date")
    install.set_defaults(act=_install)
    remove = actions.add_parser("remove", help="stop the units, which detaches, and remove them")
    remove.add_argument("interfaces", nargs="*", metavar="IFACE",
                        help="only these interfaces' units (default: all, and the publisher's)")
    remove.set_defaults(act=_remove)


def run(args: argparse.Namespace) -> int:
    """Installs or removes. XdpErmError: not root, no systemd, a unit file of somebody else, or what systemctl says."""
    if os.geteuid() != 0:
        raise XdpErmError("xdp-erm needs root to change systemd's units: run it with sudo")
    if not _BOOTED.is_dir():
        raise XdpErmError(f"systemd does not run this system (no {_BOOTED}): run `xdp-erm attach` from what starts "
                          "services here")
    args.act(args)
    return 0


def _install(args: argparse.Namespace) -> None:
    configuration = config.load()
    names = config.check_interface_names(args.interfaces) or list(configuration.interfaces)
    _systemctl("daemon-reload")  # which has zeek.conf read again
    workers = zeek_workers()
    if not names and workers:
        names = list(dict.fromkeys(worker.interface for worker in workers))
        say(f"{', '.join(names)}: as Zeek's workers capture from there")
    if not names:
        raise UsageError(f"no interface: name one, or put it under `interfaces` in {config.DEFAULT_PATH}")
    own = _own_names()
    absent = [name for name in names if name not in own]
    names = list(dict.fromkeys(own.get(name, name) for name in names))
    for name in absent:
        if len(name.encode()) > config.LONGEST_OWN_NAME:
            raise XdpErmError(f"{name}: there is no such interface now, and systemd can only wait for an interface by "
                              "its own name: name that, or install once it is there")
    texts = {UNIT_DIRECTORY / unit: unit_text(unit, _command()) for unit in UNITS}
    workers = [worker._replace(interface=own.get(worker.interface, worker.interface)) for worker in workers]
    drop_ins = _drop_ins(workers, set(names), args.require)
    changed = [path for path, text in [*texts.items(), *drop_ins.items()] if _read_ours(path) != text]
    for path in changed:
        _write(path, {**texts, **drop_ins}[path])
        say(f"wrote {path}")
    others = {worker.interface for worker in workers if _enabled(worker.interface)}
    _remove_drop_ins(_our_drop_ins() - drop_ins.keys() - _drop_ins(workers, others, args.require).keys())
    units = [_instance(name) for name in names]
    _systemctl("enable", *units, PUBLISHER)  # which also has systemd read its files again
    say(f"enabled {', '.join([*units, PUBLISHER])}")
    unused = [name for name in names if name not in {worker.interface for worker in workers}]
    if args.require and unused:
        say(f"--require: none of Zeek's own units (zeek.conf) captures from {', '.join(unused)}, so no worker waits "
            "for it")
    for name in absent:
        say(f"{name}: there is no such interface now; its unit starts when it appears")
    if args.now:
        units = [unit for name, unit in zip(names, units) if name not in absent]
        _systemctl("reload-or-restart", *units, PUBLISHER)  # starts those that do not run
        say(f"started {', '.join([*units, PUBLISHER])}")
        other = lock.holder(lock.DEFAULT)
        if other is not None and not lock.is_the_units(other):
            say(f"{lock.describe(lock.DEFAULT)} that {PUBLISHER} did not start: it takes over when that one ends")


def _own_names() -> dict[str, str]:
    """The kernel's own names of the interfaces that are there, which systemd's units go by, by all their names."""
    with Links() as links:
        return {name: link.name for link in links for name in link.names}


def _remove(args: argparse.Namespace) -> None:
    ours = [unit for unit in UNITS if _read_ours(UNIT_DIRECTORY / unit) is not None]
    own = _own_names()
    names = [own.get(name, name) for name in config.check_interface_names(args.interfaces)]
    if names and TEMPLATE in ours:
        for unit in map(_instance, names):
            _remove_drop_ins({path for path in _our_drop_ins() if f"After={unit}\n" in path.read_text()})
            _systemctl("disable", "--now", unit)
            say(f"{unit}: stopped and disabled")
    elif names or not ours:
        say("the units are not installed")
    else:
        _remove_drop_ins(_our_drop_ins())
        running = [unit.replace("@", "@*") for unit in ours]
        _systemctl("stop", *running)
        _systemctl("reset-failed", *running)
        _systemctl("disable", *ours)  # a template: all its instances
        for unit in ours:
            (UNIT_DIRECTORY / unit).unlink()
            say(f"stopped, disabled and removed {UNIT_DIRECTORY / unit}")
        _systemctl("daemon-reload")


class Worker(NamedTuple):
    """A worker of Zeek's that captures with AF_PACKET."""

    unit: str
    interface: str
    fanout_id: str | None
    """That of AF_PACKET's group which it joins, unless a script says otherwise; None: fanout is off."""


def zeek_workers() -> list[Worker]:
    """Those that zeek-systemd-generator makes units for, from Zeek's zeek.conf; none where there is no such file.

    systemd is asked for them, which knows where the file is, what its templates are filled with, and who has changed
    the units since. XdpErmError: what systemctl says.
    """
    if not _BOOTED.is_dir():
        return []
    wanted = _output("systemctl", "show", "--value", "--property=Wants", "zeek.target").split()
    units = [unit for unit in wanted if unit.startswith("zeek-worker")]
    if not units:
        return []
    workers = []
    for block in _output("systemctl", "show", "--property=Id,Environment,ExecStart", *sorted(units)).split("\n\n"):
        shown = _assignments(block.splitlines())
        environment = _assignments(shlex.split(shown.get("Environment", "")))
        source, _, interface = environment.get("INTERFACE", "").rpartition("::")
        if source == "af_packet":
            workers.append(Worker(shown["Id"], interface, _fanout_id(shown.get("ExecStart", ""))))
    return workers


def _fanout_id(command: str) -> str | None:
    if "AF_Packet::enable_fanout=F" in command:
        return None
    found = re.search(r"AF_Packet::fanout_id=(\d+)", command)
    return found[1] if found else ZEEKS_FANOUT_ID


def _assignments(texts: list[str]) -> dict[str, str]:
    return dict(text.split("=", 1) for text in texts if "=" in text)


def _drop_ins(workers: list[Worker], interfaces: set[str], require: bool) -> dict[Path, str]:
    """Files that put the workers of these interfaces after what attaches to them: one for a template, if its workers,
    of which `workers` has all, have one interface."""
    of_template: dict[str, set[str]] = {}
    for worker in workers:
        of_template.setdefault(_template(worker.unit), set()).add(worker.interface)
    texts = {}
    for worker in (worker for worker in workers if worker.interface in interfaces):
        template = _template(worker.unit)
        unit = template if len(of_template[template]) == 1 else worker.unit
        attaches = _instance(worker.interface)
        requires = f"Requires={attaches}\n" if require else ""
        texts[UNIT_DIRECTORY / f"{unit}.d" / DROP_IN] = (
            f"{MARKER}\n[Unit]\nAfter={attaches}\n{requires}"
            f"# The publisher, which stops before it, brings its last report to a worker.\nBefore={PUBLISHER}\n")
    return texts


def _template(unit: str) -> str:
    return re.sub("@.*[.]", "@.", unit)


def _our_drop_ins() -> set[Path]:
    return {path for path in UNIT_DIRECTORY.glob(f"zeek-worker*.d/{DROP_IN}") if _read_ours(path) is not None}


def _remove_drop_ins(paths: set[Path]) -> None:
    for path in sorted(paths):
        path.unlink()
        say(f"removed {path}")
        with contextlib.suppress(OSError):  # others have files there
            path.parent.rmdir()


def _instance(name: str) -> str:
    """The unit of an interface: br-lan's is xdp-erm@br\\x2dlan.service."""
    return _output("systemd-escape", f"--template={TEMPLATE}", "--", name).strip()


def _enabled(name: str) -> bool:
    return (UNIT_DIRECTORY / "multi-user.target.wants" / _instance(name)).is_symlink()


def _command() -> Path:
    """The file that runs this very package: the .pyz it is in, or the launcher of the tree it is in."""
    root = Path(__file__).resolve().parents[2]
    command = root if root.is_file() else root / "bin" / "xdp-erm"
    if not os.access(command, os.X_OK):
        raise XdpErmError(f"{command}: systemd needs to run it, but it is not an executable file")
    return command


def unit_text(unit: str, command: Path) -> str:
    """A unit file's text. XdpErmError: the command's path would need quoting, which is no good in a unit."""
    if not re.fullmatch(r"/[\w./+@,:~-]+", str(command)):
        raise XdpErmError(f"{str(command)!r}: a path with such characters cannot stand in a unit: move xdp-erm")
    return (resources.files(__name__) / unit).read_text().replace("@XDP_ERM@", str(command))


def _read_ours(path: Path) -> str | None:
    """An installed file's text, None: there is none. XdpErmError: it is not ours."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise XdpErmError(f"{path}: cannot be read: {error}") from None
    if not text.startswith(MARKER):
        raise XdpErmError(f"{path}: was not written by xdp-erm and stays as it is: move it away first")
    return text


def _write(path: Path, text: str) -> None:
    """Writes a file so that it is there as a whole or not at all."""
    try:
        path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write(text)
                os.fchmod(file.fileno(), 0o644)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise XdpErmError(f"{path}: cannot be written: {error.strerror}") from None


def _systemctl(*arguments: str) -> None:
    _output("systemctl", "--quiet", *arguments)


def _output(*command: str) -> str:
    """What a command of systemd's prints. XdpErmError: it fails, with what it said in one line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SYSTEMCTL_SECONDS, check=False)
    except FileNotFoundError:
        raise XdpErmError(f"{command[0]} is not in PATH") from None
    except subprocess.TimeoutExpired:
        raise XdpErmError(f"`{' '.join(command)}` did not finish in {_SYSTEMCTL_SECONDS} s: `systemctl list-jobs` "
                          "says what it waits for") from None
    if done.returncode != 0:
        raise XdpErmError(f"`{' '.join(command)}`: {' '.join(done.stderr.split())}")
    return done.stdout
