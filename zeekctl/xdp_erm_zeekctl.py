"""zeekctl plugin: attaches xdp-erm on the hosts of AF_PACKET workers before these start, and runs its publisher there.

What is done on a host is always a command of the helper, xdp-erm.pyz, which zeekctl copies there along with this file.
zeekctl's state keeps what was attached and started: `zeekctl cron` mends that, and nothing else is detached or stopped.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import traceback
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ZeekControl.cmdresult
import ZeekControl.config
import ZeekControl.plugin

DIRECTORY = os.path.dirname(os.path.abspath(__file__))
HELPER = os.path.join(DIRECTORY, "xdp-erm.pyz")


class Setting(NamedTuple):
    """A setting of an interface, as the helper's table has it (xdp_erm_py/settings.py)."""

    option: str
    """Of the helper's command line."""
    help: str
    metavar: str | None
    """What its value is called; None: it is on or off, and the option stands for what is not the default."""
    many: bool
    number: bool
    default: Any

    @property
    def unset(self) -> bool | int | str:
        """What leaves it to the hosts' configuration file. zeekctl's option has this type."""
        if self.metavar is None:
            return bool(self.default)
        return 0 if self.number and not self.many else ""

    @property
    def description(self) -> str:
        """For zeekctl: what it can be set to, and what that does."""
        return f"{int(not self.default) if self.metavar is None else self.metavar}: {self.help}"


# Written by build.py when the package is built.
with open(os.path.join(DIRECTORY, "settings.json"), encoding="utf-8") as _file:
    _table = json.load(_file)
SETTINGS = {name: Setting(**setting) for name, setting in _table["settings"].items()}
# The setting of an encapsulation's UDP ports, by the encapsulation.
PORTS: dict[str, str] = _table["ports"]

# What else zeekctl.cfg can set, as xdp_erm.NAME: name, default, whose type is the option's, description.
OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("attach", True, "Attach xdp-erm to the interfaces of AF_PACKET workers."),
    ("config", "", "Configuration file on the hosts, in place of /etc/xdp-erm.yaml."),
    ("on_failure", "fallback", "Where attaching fails: fallback (workers start without) or veto (they do not start)."),
    ("detach_on_stop", False, "Detach when the last worker of an interface was stopped."),
    ("command_prefix", "", "What makes a command run as root on the hosts, such as sudo -n."),
    ("helper", "", "The helper on the hosts, root's own copy, in place of the one in the package."),
    ("publish", True, "Run a publisher on each host, which reports the counters to Zeek."),
    ("interval", 10, "Seconds between the publisher's reports."),
    ("transport", "auto", "How the publisher reaches Zeek: auto, websocket or broker."),
    ("websocket_port", 27758, "Port on loopback where one Zeek node of each host waits for the publisher."),
)
_DEFAULTS = {**{name: default for name, default, _ in OPTIONS},
             **{name: setting.unset for name, setting in SETTINGS.items()}}
_TYPES = {bool: "bool", int: "int", str: "string"}

# What node.cfg can set for a worker, as xdp_erm.NAME, over what zeekctl.cfg says.
NODE_KEYS = ("attach", "config", *SETTINGS)

# As zeekctl reads its own options of that type.
_BOOLEANS = {"0": False, "false": False, "1": True, "true": True}
_CHOICES = {"on_failure": ("fallback", "veto"), "transport": ("auto", "websocket", "broker")}
_RANGES = {"interval": (1, 3600, "a number of seconds from 1 to 3600"),
           "websocket_port": (1, 65535, "a TCP port (1 to 65535)")}


class Capture(NamedTuple):
    """An interface of a host from which workers capture with AF_PACKET."""

    nodes: list[Any]
    """The workers."""
    interface: str
    wanted: bool
    """Whether xdp-erm is to be attached."""
    arguments: list[str]
    """The settings, as the helper's command line says them."""

    @property
    def node(self) -> Any:
        """The node through which zeekctl reaches the host."""
        return self.nodes[0]

    @property
    def key(self) -> str:
        """What it is called in zeekctl's state."""
        return f"{self.node.addr} {self.interface}"

    def __str__(self) -> str:
        return f"{self.node.host}: {self.interface}"


class Outcome(NamedTuple):
    """What came of a command on a host."""

    success: bool
    output: str
    """What it wrote to stdout, and after that what it, sudo or the shell wrote to stderr."""

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()


class Host(NamedTuple):
    """What was found on a host."""

    interfaces: dict[str, Any]
    """Where xdp-erm is attached: `xdp-erm status` by interface, under each of its names."""
    publishing: bool
    problem: str | None = None
    """Why nothing is known."""


def guarded(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Reports an exception and goes on as if there were no hook: it would abort the user's zeekctl command."""
    @functools.wraps(hook)
    def call(self: XdpErm, *arguments: Any) -> Any:
        try:
            return hook(self, *arguments)
        except Exception as error:
            self.error(f"xdp_erm: {hook.__name__} failed, zeekctl goes on without it: {error!r}")
            self.debug(traceback.format_exc())
            return None
    return call


class XdpErm(ZeekControl.plugin.Plugin):
    def __init__(self) -> None:
        super().__init__(apiversion=1)
        self._starting: list[Any] = []

    def name(self) -> str:
        return "xdp_erm"

    def pluginVersion(self) -> int:
        return 1

    def options(self) -> list[tuple[str, str, Any, str]]:
        descriptions = {**{name: description for name, _, description in OPTIONS},
                        **{name: setting.description for name, setting in SETTINGS.items()}}
        return [(name, _TYPES[type(default)], default, descriptions[name]) for name, default in _DEFAULTS.items()]

    def nodeKeys(self) -> list[str]:
        return list(NODE_KEYS)

    def commands(self) -> list[tuple[str, str, str]]:
        return [
            ("status", "[<nodes>]", "Show where xdp-erm is attached, and its publishers"),
            ("stats", "[<nodes>]", "Show xdp-erm's packet counters"),
            ("doctor", "[<nodes>]", "Check all that xdp-erm needs on the nodes' hosts, and say what to do"),
            ("attach", "[<nodes>]", "Attach xdp-erm to the nodes' interfaces"),
            ("detach", "[<nodes>]", "Detach xdp-erm from the nodes' interfaces"),
        ]

    def init(self) -> bool:
        for mistake in self._mistakes():
            self.error(mistake)
        return True

    @guarded
    def zeekctl_config(self) -> str:
        """Tells Zeek's scripts what they share with the helper. They may be unloaded: hence the condition."""
        lines = []
        # What each worker's interface takes off: an encapsulation that none does keeps Zeek's own treatment.
        workers = [(node, self._several(node, "encapsulations")) for node in self.nodes() if _uses_af_packet(node)]
        for encapsulation, name in PORTS.items():
            ports = {int(port) for node, taken in workers if encapsulation in taken
                     for port in self._several(node, name)}
            known = set(SETTINGS[name].default) if encapsulation == "erm" else set()  # without being told
            if workers and ports != known:
                lines.append(f"redef XDP_ERM::{name}s = {{ {', '.join(f'{port}/udp' for port in sorted(ports))} }};")
        if any(set(taken) - set(PORTS) for _, taken in workers):
            lines.append("redef XDP_ERM::gre = T;")
        lines.append(f"redef XDP_ERM::websocket_port = {self.getOption('websocket_port')}/tcp;")
        if self.getOption("transport") == "broker":
            lines.append("redef XDP_ERM::websocket_listen = F;")
        silence = 3 * self.getOption("interval")
        if silence > 120:  # so long the scripts wait for a report anyway
            lines.append(f"redef XDP_ERM::publisher_silence = {silence} secs;")
        return "\n".join(["@ifdef ( XDP_ERM::ports )", *lines, "@endif"])

    @guarded
    def cmd_install_pre(self) -> bool:
        """Keeps `install` and `deploy` from changing anything while the configuration is wrong."""
        if not self._mistakes() and not self._refused_settings():
            return True
        self.error("xdp_erm: not installed: correct this in zeekctl.cfg or node.cfg first")
        return False

    @guarded
    def cmd_start_pre(self, nodes: list[Any]) -> list[Any]:
        """Attaches. Returns the nodes to start; those that run already are not touched by being left out."""
        self._starting = nodes
        if self._mistakes():  # said when zeekctl started
            self.error("xdp_erm: neither attached nor detached anything: correct zeekctl.cfg or node.cfg first")
            return nodes
        self._detach_unwanted()
        self._report(self._stale(capture.node for capture in self._captures(nodes) if capture.wanted))
        failed = self._attach([capture for capture in self._captures(nodes) if capture.wanted])
        vetoed = set()
        for capture in failed:
            workers = ", ".join(node.name for node in capture.nodes)
            if self.getOption("on_failure") == "veto":
                vetoed.update(node.name for node in capture.nodes)
                self.error(f"{capture}: xdp-erm is NOT attached, so {workers} must not start (xdp_erm.on_failure)")
            else:
                self.error(f"{capture}: xdp-erm is NOT attached: {workers} start without it, and one of them gets the "
                           "whole of each mirror session")
        return [node for node in nodes if node.name not in vetoed]

    @guarded
    def cmd_start_post(self, results: list[tuple[Any, ...]]) -> None:
        """Starts the publishers, now that there is a Zeek to report to; `results` lack those that ran already."""
        if self.getOption("publish") is True:
            captures = self._captures(node for node in self._starting if node.getPID())
            self._report(self._start_publishers(capture.node for capture in captures if capture.wanted))

    @guarded
    def cmd_stop_pre(self, nodes: list[Any]) -> None:
        """Stops a host's publisher along with its last worker; before it, so that Zeek still gets the last report."""
        stopping = {node.name for node in nodes}
        staying = {node.addr for capture in self._captures() for node in capture.nodes
                   if node.name not in stopping and _runs(node)}
        captures = self._captures(nodes)
        self._report(self._stop_publishers(capture.node for capture in captures if capture.node.addr not in staying))

    @guarded
    def cmd_stop_post(self, results: list[tuple[Any, ...]]) -> None:
        """Detaches from interfaces that no worker uses any longer, if that is wished."""
        if self.getOption("detach_on_stop") is True:
            attached = self._remembered("attached")
            self._detach([capture for capture in self._captures(node for node, *_ in results)
                          if capture.key in attached and not any(map(_runs, capture.nodes))])

    @guarded
    def cmd_cron_pre(self, argument: str, watch: bool) -> None:
        """Mends what was attached and started, before zeekctl restarts workers that crashed."""
        if argument or not watch or not ZeekControl.config.Config.get_state("cronenabled", True):
            return
        attached, publishing = self._remembered("attached"), self._remembered("publishing")
        captures = [capture for capture in self._captures() if capture.wanted and capture.key in attached]
        nodes = _one_for_each_host([capture.node for capture in captures]
                                   + [node for node in self.nodes() if node.addr in publishing])
        hosts = self._look(nodes)
        problems = [f"{node.host}: {hosts[node.addr].problem}" for node in nodes if hosts[node.addr].problem]

        for capture in captures:
            host = hosts[capture.node.addr]
            lost = None if host.problem else _lost(host.interfaces.get(capture.interface))
            if lost:
                outcome = self._change("attach", [capture])[0]
                if outcome.success:
                    self.message(f"{capture}: xdp-erm was no longer {lost}, and is again:")
                    self._tell(capture.node, outcome.output)
                else:
                    problems.append(f"{capture}: xdp-erm is no longer {lost}: {outcome.output}")
        for node in nodes:
            host = hosts[node.addr]
            if not host.problem and not host.publishing and node.addr in publishing:
                failures = self._start_publishers([node])
                if not failures:
                    self.message(f"{node.host}: xdp-erm's publisher was no longer running, and is again")
                problems += failures

        # cron runs every five minutes: only what is new is worth a mail.
        self._report(problem for problem in problems if problem not in self._remembered("problems"))
        self._remember("problems", problems)

    def cmd_custom(self, command: str, arguments: str, cmdout: Any) -> Any:
        return ZeekControl.cmdresult.CmdResult(ok=bool(self._custom(command, arguments, cmdout)))

    @guarded
    def _custom(self, command: str, arguments: str, cmdout: Any) -> bool:
        """Runs a command of ours; whether it succeeded."""
        nodes, unknown = self.parseNodes(arguments) if arguments else (self.nodes(), [])
        if unknown:
            cmdout.error(f"unknown node: {', '.join(unknown)}")
            return False
        captures = self._captures(nodes)
        if not captures:
            cmdout.error("none of these nodes captures with AF_PACKET (interface=af_packet::...)")
            return False
        if command == "attach":
            return not self._attach(captures)
        if command == "detach":
            return not self._detach(captures)
        show = {"status": self._status, "stats": self._stats, "doctor": self._doctor}[command]
        return show(captures, cmdout)

    def _status(self, captures: list[Capture], cmdout: Any) -> bool:
        """Shows one table; whether all is as it should be."""
        hosts = self._look(_one_for_each_host(capture.node for capture in captures))
        rows = [("Host", "Interface", "XDP", "Program", "Attached since", "Publisher", "Workers")]
        as_wanted = True
        for capture in captures:
            host = hosts[capture.node.addr]
            found = host.interfaces.get(capture.interface)
            if host.problem:
                cmdout.error(f"{capture.node.host}: {host.problem}")
            not_run = " (not run)" if found and found["unseen"] else ""
            as_wanted &= not host.problem and capture.wanted == bool(found) and not not_run
            rows.append((capture.node.host, capture.interface,
                         *((found["mode"] + not_run, str(found["program_id"]), found["attached_at"]) if found else
                           ("unknown" if host.problem else "off", "-", "-")),
                         "unknown" if host.problem else "running" if host.publishing else "off",
                         " ".join(node.name for node in capture.nodes)))
        _show_table(rows, cmdout)
        return as_wanted

    def _stats(self, captures: list[Capture], cmdout: Any) -> bool:
        """Shows one table; whether every interface is in it."""
        outcomes = self._run([(capture.node, self._privileged("stats", "--json", "--", capture.interface))
                              for capture in captures])
        rows = []
        for capture, outcome in zip(captures, outcomes):
            if outcome.success:
                counters = json.loads(outcome.lines[0])["interfaces"][0]["counters"]
                rows += [] if rows else [("Host", "Interface", *counters)]
                rows.append((capture.node.host, capture.interface,
                             *(str(counter["packets"]) for counter in counters.values())))
            else:
                cmdout.error(f"{capture.node.host}: {outcome.output}")
        _show_table(rows, cmdout)
        return all(outcome.success for outcome in outcomes)

    def _doctor(self, captures: list[Capture], cmdout: Any) -> bool:
        """Shows what is found on each host; whether there is no problem."""
        nodes = _one_for_each_host(capture.node for capture in captures)
        stale = self._stale(nodes)
        for problem in stale:
            cmdout.error(problem)
        groups: dict[tuple[str, str], list[Capture]] = {}  # it reads one file at a time
        for capture in captures:
            groups.setdefault((capture.node.addr, self._setting(capture.node, "config")), []).append(capture)
        outcomes = self._run([
            (group[0].node, self._privileged("doctor", *_config_option(config), "--",
                                             *(capture.interface for capture in group)))
            for (_, config), group in groups.items()])
        for group, outcome in zip(groups.values(), outcomes):
            for line in outcome.lines:
                cmdout.info(f"{group[0].node.host}: {line}")
        for node in nodes:
            for line in self._shared_fanout_ids(node):
                cmdout.info(f"{node.host}: {line}")
        if any("`xdp-erm attach " in outcome.output for outcome in outcomes):
            cmdout.info("Attach by `zeekctl xdp_erm.attach` (--set-mtu: xdp_erm.set_mtu = 1, --mode: xdp_erm.mode), as "
                        "`xdp-erm attach` on a host goes by that host's file alone")
        return not stale and all(outcome.success for outcome in outcomes)

    def _shared_fanout_ids(self, node: Any) -> Iterable[str]:
        """What doctor says of workers on the node's host whose groups the kernel cannot tell apart."""
        groups: dict[str, list[str]] = {}
        for capture in self._captures():
            if capture.node.addr == node.addr:
                for number in sorted({_fanout_id(worker) for worker in capture.nodes} - {""}):
                    groups.setdefault(number, []).append(capture.interface)
        for number, interfaces in groups.items():
            if len(interfaces) > 1:
                yield (f"warning  host: workers of {', '.join(interfaces)} have one AF_PACKET fanout id ({number}), so "
                       "that those of one interface start and the others do not: unless a script does, give those of "
                       "each, in node.cfg, `lb_procs` and an `af_packet_fanout_id` of their own")

    # The configuration

    def _setting(self, node: Any, name: str) -> Any:
        """A worker's own setting, else the one for all. One that is wrong is what it reads."""
        own = getattr(node, f"xdp_erm_{name}")
        return self.getOption(name) if own == "" else _typed(name, own)

    def _several(self, node: Any, name: str) -> list[Any]:
        """The values of a worker's setting that can have several, those by default if it has none."""
        return _words(self._setting(node, name)) or SETTINGS[name].default

    def _captures(self, nodes: Iterable[Any] | None = None) -> list[Capture]:
        """What workers capture from; with `nodes`, where at least one of these does."""
        captures: dict[tuple[str, str], Capture] = {}
        for node in filter(_uses_af_packet, self.nodes()):
            capture = Capture([], node.interface.rpartition("::")[2], self._setting(node, "attach") is True,
                              self._arguments(node))
            captures.setdefault((node.addr, capture.interface), capture).nodes.append(node)
        if nodes is None:
            return list(captures.values())
        names = {node.name for node in nodes}
        return [capture for capture in captures.values() if any(node.name in names for node in capture.nodes)]

    def _arguments(self, node: Any) -> list[str]:
        arguments = _config_option(self._setting(node, "config"))
        for name, setting in SETTINGS.items():
            value = self._setting(node, name)
            if setting.metavar is None:
                arguments += [setting.option] if value is (not setting.default) else []
            elif value:
                arguments.append(f"{setting.option}={','.join(_words(value)) if setting.many else value}")
        # A number where there is one, of which 0 is one as well, else an empty string.
        pinned = [str(other.pin_cpus) for other in self.nodes() if other.addr == node.addr and other.pin_cpus != ""]
        if pinned:
            arguments.append(f"--spread-avoid={','.join(pinned)}")
        return arguments

    def _mistakes(self) -> list[str]:
        """What is wrong in zeekctl.cfg and node.cfg, as far as can be seen without asking the helper."""
        names = list(_DEFAULTS)
        mistakes = [f"{option}: there is no such option (there are: {', '.join(names)})"
                    for option, _ in ZeekControl.config.Config.options(dynamic=False)
                    if option.startswith("xdp_erm.") and option.partition(".")[2] not in names]
        values = [("zeekctl.cfg", name, self.getOption(name)) for name in names]
        values += [(node.name, name, self._setting(node, name)) for node in self.nodes() for name in NODE_KEYS
                   if getattr(node, f"xdp_erm_{name}") != ""]
        for where, name, value in values:
            problem = self._problem(name, value)
            if problem:
                mistakes.append(f"{where}: xdp_erm.{name} = {value}: {problem}")
        for node in self.nodes():
            if node.xdp_erm_attach != "" and self._setting(node, "attach") is True and not _uses_af_packet(node):
                mistakes.append(f"{node.name}: xdp_erm.attach = {node.xdp_erm_attach}: its interface "
                                f"{node.interface or '(none)'} is not captured from with AF_PACKET (af_packet::...)")
        for capture in self._captures():
            for node in capture.nodes:
                mistakes += [f"{node.name}: xdp_erm.{name} = {self._setting(node, name)}: differs from "
                             f"{capture.node.name}'s, which captures from the same {capture}" for name in NODE_KEYS
                             if self._setting(node, name) != self._setting(capture.node, name)]
        return mistakes

    def _problem(self, name: str, value: Any) -> str | None:
        """What is wrong with a value; those for the helper are left to it."""
        if type(value) is not type(_DEFAULTS[name]):
            return "is neither 0 nor 1" if isinstance(_DEFAULTS[name], bool) else "is not a whole number"
        if name in _CHOICES:
            return None if value in _CHOICES[name] else f"is none of {', '.join(_CHOICES[name])}"
        if name in ("config", "helper"):
            return None if value == "" or value.startswith("/") else "is not an absolute path"
        if name in _RANGES:
            least, most, what = _RANGES[name]
            if not least <= value <= most:
                return f"is not {what}"
        if name == "websocket_port" and self.getGlobalOption("UseWebSocket") \
                and value == self.getGlobalOption("WebSocketPort"):
            return "is the port of zeekctl's own server (WebSocketPort)"
        return None

    def _refused_settings(self) -> bool:
        """Has the helper check the settings on this host, and reports what it refuses."""
        refused, unchecked = False, ""
        for capture in self._captures():
            # The configuration file is on the workers' hosts. The last one counts.
            command = [HELPER, "config", *capture.arguments, "--config=/dev/null", "--", capture.interface]
            try:
                done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=60,
                                      check=False)
            except OSError as error:
                unchecked = f"{HELPER}, which needs /usr/bin/python3, does not run here: {error.strerror}"
                break
            if done.returncode == 2:
                refused = True
                problem = done.stderr.strip().splitlines()[-1].replace("xdp-erm config: error: ", "")
                problem = problem.replace("xdp-erm: ", "", 1)
                for name, setting in SETTINGS.items():
                    problem = problem.replace(f"argument {setting.option}:", f"xdp_erm.{name}:")
                self.error(f"{capture.node.name}: {problem}")
            elif done.returncode != 0:
                unchecked = done.stderr.strip()
        if unchecked:
            self.error(f"xdp_erm: settings are not checked here, only where they are used: {unchecked}")
        return refused

    # The hosts

    def _privileged(self, *command: str) -> str:
        """A shell command that runs the helper as root."""
        helper = self.getOption("helper") or HELPER
        return f"{self.getOption('command_prefix')} {shlex.join([helper, *command])}".strip()

    def _stale(self, nodes: Iterable[Any]) -> list[str]:
        """What is to be said of root's own copies of the helper that are not of the package's version."""
        helper = self.getOption("helper")
        if not helper:
            return []
        version, nodes = _version(), _one_for_each_host(nodes)
        outcomes = self._run([(node, f"{shlex.quote(helper)} --version") for node in nodes])
        command = shlex.join(["install", "-m", "755", HELPER, helper])
        return [f"{node.host}: {helper} should be {version}, as this package is ({outcome.output}): run there, as "
                f"root, `{command}`"
                for node, outcome in zip(nodes, outcomes) if not outcome.success or outcome.lines[:1] != [version]]

    def _run(self, commands: list[tuple[Any, str]]) -> list[Outcome]:
        """Runs commands on the nodes' hosts at the same time, one for each node; their outcomes in the same order."""
        outcomes = {node.name: Outcome(success, output.strip())
                    for node, success, output in self.executeParallel(commands)}
        return [outcomes.get(node.name, Outcome(False, "no answer")) for node, _ in commands]

    def _change(self, verb: str, captures: list[Capture]) -> list[Outcome]:
        """Attaches or detaches, and remembers it."""
        outcomes = self._run([
            (capture.node,
             self._privileged(verb, *(capture.arguments if verb == "attach" else ()), "--", capture.interface))
            for capture in captures])
        attached = self._remembered("attached")
        for capture, outcome in zip(captures, outcomes):
            if verb == "attach":
                attached.add(capture.key)  # even if it failed: cron tries again
            elif outcome.success:
                attached.discard(capture.key)
        self._remember("attached", attached)
        return outcomes

    def _attach(self, captures: list[Capture]) -> list[Capture]:
        """Attaches and says what was done; returns where it failed."""
        return self._reported(captures, self._change("attach", captures))

    def _detach(self, captures: list[Capture]) -> list[Capture]:
        """Detaches and says what was done; returns where it failed."""
        return self._reported(captures, self._change("detach", captures))

    def _reported(self, captures: list[Capture], outcomes: list[Outcome]) -> list[Capture]:
        for capture, outcome in zip(captures, outcomes):
            if outcome.success:
                self._tell(capture.node, outcome.output)
            else:
                self.error(f"{capture.node.host}: {outcome.output}")
        return [capture for capture, outcome in zip(captures, outcomes) if not outcome.success]

    def _detach_unwanted(self) -> None:
        """Detaches what we attached where it has been switched off since, or where there is no worker any more."""
        captures = {capture.key: capture for capture in self._captures()}
        nodes = {node.addr: node for node in self.nodes()}
        for key in self._remembered("attached"):
            address, interface = key.split()
            capture = captures.get(key)
            if capture is None and address in nodes:
                capture = Capture([nodes[address]], interface, False, [])
            if capture is None:
                self.message(f"{address} has left node.cfg: `xdp-erm detach {interface}` detaches there")
                self._remember("attached", self._remembered("attached") - {key})
            elif not capture.wanted:
                outcome = self._change("detach", [capture])[0]
                host = self._look([capture.node])[address]
                if outcome.success or host.problem or interface in host.interfaces:
                    self._reported([capture], [outcome])
                else:  # the interface is gone, and so is what was on it
                    self.message(f"{capture}: nothing is left to detach: {outcome.output}")
                    self._remember("attached", self._remembered("attached") - {key})

    def _start_publishers(self, nodes: Iterable[Any]) -> list[str]:
        """Starts a publisher on each of the nodes' hosts that has none; returns what went wrong."""
        nodes = _one_for_each_host(nodes)
        arguments = [f"--interval={self.getOption('interval')}", f"--transport={self.getOption('transport')}",
                     f"--websocket=127.0.0.1:{self.getOption('websocket_port')}"]
        manager = ZeekControl.config.Config.manager()
        if self.getGlobalOption("ClusterBackend").lower() == "broker":
            arguments.append(f"--peer={manager.addr}:{manager.getPort()}")
        log = shlex.quote(os.path.join(self.getGlobalOption("SpoolDir"), "xdp-erm-publish.log"))
        # zeekctl would wait for a process that has its streams. zeek-config in PATH tells where Broker's bindings are.
        running = self._privileged("publish", "--running")
        script = (f'said=$({running} 2>/dev/null) && echo "$said" && exit 0\n'  # somebody's, which it names
                  f"export PATH={shlex.quote(self.getGlobalOption('BinDir'))}:$PATH\n"
                  f"setsid {self._privileged('publish', *arguments)} </dev/null >{log} 2>&1 &\n"
                  "for look in $(seq 25); do\n"
                  f"  sleep 0.2; {running} >/dev/null 2>&1 && echo ours && exit 0; [ -d /proc/$! ] || break\n"
                  f"done; tail -n 1 {log}; exit 1")
        outcomes = self._run([(node, script) for node in nodes])
        ours = {node.addr for node, outcome in zip(nodes, outcomes)
                if not outcome.success or outcome.lines[:1] == ["ours"]}
        self._remember("publishing", self._remembered("publishing") | ours)
        return [f"{node.host}: xdp-erm's publisher does not start: {outcome.output}"
                for node, outcome in zip(nodes, outcomes) if not outcome.success]

    def _stop_publishers(self, nodes: Iterable[Any]) -> list[str]:
        """Stops what we started; returns what went wrong. The publisher of our systemd unit is left to systemd."""
        publishing = self._remembered("publishing")
        nodes = [node for node in _one_for_each_host(nodes) if node.addr in publishing]
        outcomes = self._run([(node, self._privileged("publish", "--stop")) for node in nodes])
        for node, outcome in zip(nodes, outcomes):
            if outcome.success:
                self._tell(node, outcome.output)
        stopped = {node.addr for node, outcome in zip(nodes, outcomes) if outcome.success}
        self._remember("publishing", publishing - stopped)
        return [f"{node.host}: xdp-erm's publisher is not stopped: {outcome.output}"
                for node, outcome in zip(nodes, outcomes) if not outcome.success]

    def _look(self, nodes: list[Any]) -> dict[str, Host]:
        """What is attached and runs on the nodes' hosts, by address."""
        status, running = self._privileged("status", "--json"), self._privileged("publish", "--running")
        script = f"{status} && if {running} >/dev/null; then echo true; else echo false; fi"
        hosts = {}
        for node, outcome in zip(nodes, self._run([(node, script) for node in nodes])):
            if outcome.success:
                status, publishing = map(json.loads, outcome.lines[:2])
                interfaces = {name: found for found in status["interfaces"]
                              for name in (found["name"], *found["other_names"])}
                hosts[node.addr] = Host(interfaces, publishing)
            else:
                hosts[node.addr] = Host({}, False, outcome.output)
        return hosts

    # What is said and remembered

    def _tell(self, node: Any, output: str) -> None:
        for line in output.splitlines():
            self.message(f"{node.host}: {line}")

    def _report(self, problems: Iterable[str]) -> None:
        for problem in problems:
            self.error(problem)

    def _remembered(self, name: str) -> set[str]:
        return set(json.loads(self.getState(name) or "[]"))

    def _remember(self, name: str, values: Iterable[str]) -> None:
        self.setState(name, json.dumps(sorted(values)))


def _uses_af_packet(node: Any) -> bool:
    # zeekctl's own plugin puts the prefix before the interface when it comes to lb_method.
    return node.type in ("worker", "standalone") and bool(node.interface) and (
        node.interface.startswith("af_packet::") or node.lb_method == "af_packet")


def _runs(node: Any) -> bool:
    """Also one that crashed, which `zeekctl cron` starts again without the hooks here."""
    return bool(node.getPID() or node.getExpectRunning())


def _fanout_id(node: Any) -> str:
    """Of the group that the worker joins; empty: of none. Where there is no lb_procs, zeekctl heeds neither key."""
    keys = ("af_packet_enable_fanout", "af_packet_fanout_id")
    enabled, number = (getattr(node, key, "") if node.lb_procs else "" for key in keys)
    return "" if enabled == "F" else number or "23"  # Zeek's default


def _version() -> str:
    """What the package's helper says with --version. It is only read here, as it may lack what it needs to run."""
    with zipfile.ZipFile(HELPER) as package:
        found = re.search('__version__ = "(.*)"', package.read("xdp_erm_py/__init__.py").decode())
    return f"xdp-erm {found[1]}" if found else "of another version"


def _typed(name: str, text: str) -> Any:
    """What a worker's key in node.cfg says. Text where it is of another type than the option, which is a mistake."""
    kind = type(_DEFAULTS[name])
    if kind is bool:
        return _BOOLEANS.get(text.lower(), text)
    return int(text) if kind is int and re.fullmatch("[0-9]{1,9}", text) else text


def _config_option(file: str) -> list[str]:
    return [f"--config={file}"] if file else []


def _lost(interface: dict[str, Any] | None) -> str | None:
    """What an interface on which xdp-erm was attached has lost since: the program, the filter beside it, or its use."""
    if interface is None:
        return "attached"
    if interface.get("unmarked") or interface.get("scattered") or (
            interface.get("unseen") and (interface["config"]["mode"], interface["mode"]) == ("auto", "native")):
        return "decapsulating"  # in native mode; it changes to generic
    if interface.get("outdated"):
        return f"attached as it has to be ({interface['outdated']})"
    return "isolated" if interface["config"]["isolate"] and not interface["isolated"] else None


def _one_for_each_host(nodes: Iterable[Any]) -> list[Any]:
    return list({node.addr: node for node in nodes}.values())


def _words(text: str) -> list[str]:
    """The parts of a list with commas, spaces or both between them."""
    return text.replace(",", " ").split()


def _show_table(rows: list[tuple[str, ...]], cmdout: Any) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cmdout.info("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
