"""The configuration: what takes precedence, and that each mistake is told with file, line and value."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from xdp_erm_py import config
from xdp_erm_py.errors import UsageError
from xdp_erm_py.settings import InterfaceConfig

pytestmark = pytest.mark.check

COMMAND = [sys.executable, str(Path(__file__).resolve().parents[1] / "bin" / "xdp-erm"), "config"]
TIMEOUT = 60  # seconds

DEFAULT = InterfaceConfig()


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A configuration file to write, in the current directory, so that messages name it as it is here."""
    monkeypatch.chdir(tmp_path)
    return Path("erm.yaml")


def problem_of(file: Path, text: str) -> str:
    file.write_text(text)
    with pytest.raises(UsageError) as raised:
        config.load(file)
    return str(raised.value)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False)


def refusal(file: Path, text: str, arguments: tuple[str, ...]) -> str:
    """What the command says, and nothing else, where it refuses file and arguments together."""
    file.write_text(text)
    done = run("--config", str(file), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


# Precedence

def test_built_in_defaults():
    assert DEFAULT.as_dict() == {
        "encapsulations": ["erm"], "port": [7932], "vxlan_port": [4789], "geneve_port": [6081], "tzsp_port": [37008],
        "vlan": "restore", "depth": 1, "mode": "auto", "sources": [], "targets": [], "sessions": True,
        "set_mtu": False, "isolate": True, "spread": "none", "spread_cpus": [], "spread_avoid": [],
        "spread_queue": 2048, "spread_ports": False}


def test_every_key(file):
    file.write_text("""
interfaces:
  eth1:
    port: [7933, 7932, 7933]
    vlan: tagged
    depth: 2
    mode: generic
    sources: [192.0.2.0/24, 10.0.0.1, 10.0.0.0/8]
    targets: [192.0.2.9, 192.0.2.10, 192.0.2.9]
    sessions: false
    set_mtu: true
    isolate: false
    spread: cpumap
    spread_cpus: [2-4, 8, 3]
    spread_avoid: 0,9
    spread_queue: 64
    spread_ports: true
""")
    # Lists are in order and without duplicates, so that what means the same is the same.
    assert config.load(file).interfaces == {"eth1": InterfaceConfig(
        port=(7932, 7933), vlan="tagged", depth=2, mode="generic",
        sources=("10.0.0.0/8", "10.0.0.1/32", "192.0.2.0/24"), targets=("192.0.2.9", "192.0.2.10"),
        sessions=False, set_mtu=True, isolate=False, spread="cpumap", spread_cpus=(2, 3, 4, 8), spread_avoid=(0, 9),
        spread_queue=64, spread_ports=True)}


def test_a_single_value_stands_for_a_list_of_it(file):
    file.write_text("defaults: {port: 53, sources: 10.0.0.0/8, targets: 192.0.2.1}")
    expected = InterfaceConfig(port=(53,), sources=("10.0.0.0/8",), targets=("192.0.2.1",))
    assert config.load(file).defaults == expected


def test_interface_over_defaults_over_built_in(file):
    file.write_text("""
defaults: {vlan: strip, spread_queue: 1}
interfaces:
  eth1: {spread_queue: 2}
  eth2:
""")
    configuration = config.load(file)
    assert configuration.of(("eth1",), {}) == InterfaceConfig(vlan="strip", spread_queue=2)
    assert configuration.of(("eth2",), {}) == InterfaceConfig(vlan="strip", spread_queue=1)
    assert configuration.of(("eth3",), {}) == InterfaceConfig(vlan="strip", spread_queue=1)
    assert configuration.of(("eth1",), {"vlan": "tagged"}) == InterfaceConfig(vlan="tagged", spread_queue=2)


def test_an_interface_by_any_of_its_names(file):
    file.write_text(f"interfaces: {{eth1: {{spread_queue: 1}}, {'x' * 127}: {{spread_queue: 2}}}}")
    configuration = config.load(file)
    assert configuration.of(("eth2", "uplink0", "x" * 127), {}).spread_queue == 2
    with pytest.raises(UsageError, match=r"interfaces: eth1 and x+ are names of one interface: keep one of them"):
        configuration.of(("eth1", "x" * 127), {})


@pytest.mark.parametrize("text", ["", "# nothing\n", "defaults:\n", "interfaces:\n", "defaults: {}\ninterfaces: {}\n"])
def test_empty_files(file, text):
    file.write_text(text)
    assert config.load(file) == config.Configuration({}, DEFAULT)


def test_the_default_file_may_be_missing(file, monkeypatch):
    monkeypatch.setattr(config, "DEFAULT_PATH", file)
    assert config.load() == config.Configuration({}, DEFAULT)
    file.write_text("defaults: {vlan: strip}")
    assert config.load().defaults.vlan == "strip"


# Mistakes

MISTAKES = {
    "vlan: keep": "vlan: 'keep' is none of restore, tagged, strip",
    "vlan: true": "vlan: True is none of restore, tagged, strip",
    "vlan: [strip]": "vlan: ['strip'] is none of restore, tagged, strip",
    "mode: offload": "mode: 'offload' is none of auto, native, generic",
    "mode:": "mode: None is none of auto, native, generic",
    "depth: 0": "depth: 0 is not a depth (1 to 3)",
    "depth: 4": "depth: 4 is not a depth (1 to 3)",
    "depth: 1.0": "depth: 1.0 is not a depth (1 to 3)",
    "depth: true": "depth: True is not a depth (1 to 3)",
    "depth: '2'": "depth: '2' is not a depth (1 to 3)",
    "port: 0": "port: 0 is not a UDP port (1 to 65535)",
    "port: 65536": "port: 65536 is not a UDP port (1 to 65535)",
    "port: -1": "port: -1 is not a UDP port (1 to 65535)",
    "port: '7932'": "port: '7932' is not a UDP port (1 to 65535)",
    "port: [7932, true]": "port: True is not a UDP port (1 to 65535)",
    "port: {7932: 1}": "port: {7932: 1} is not a UDP port (1 to 65535)",
    "port: []": "port: no port given",
    "port:": "port: None is not a UDP port (1 to 65535)",
    "sources: here":
        "sources: 'here' is not a prefix like 192.0.2.0/24 or 2001:db8::/32: Expected 4 octets in 'here'",
    "sources: [10.0.0.0/33]":
        "sources: '10.0.0.0/33' is not a prefix like 192.0.2.0/24 or 2001:db8::/32: '33' is not a valid netmask",
    "sources: 10.0.0.1/8":
        "sources: '10.0.0.1/8' is not a prefix like 192.0.2.0/24 or 2001:db8::/32: 10.0.0.1/8 has host bits set",
    "sources: 2001:db8::1/32":
        "sources: '2001:db8::1/32' is not a prefix like 192.0.2.0/24 or 2001:db8::/32: 2001:db8::1/32 has host bits "
        "set",
    "sources: '::ffff:10.0.0.0/104'": "sources: '::ffff:10.0.0.0/104': write an IPv4 address as such, and an IPv6 "
                                      "address without an interface",
    "encapsulations: [erm, nvgre]": "encapsulations: 'nvgre' is none of erm, erspan, gre, vxlan, geneve, tzsp",
    "encapsulations: []": "encapsulations: no encapsulation given",
    "vxlan_port: 0": "vxlan_port: 0 is not a UDP port (1 to 65535)",
    "sources: [10]": "sources: 10 is not a prefix like 192.0.2.0/24 or 2001:db8::/32",
    "targets: 10.0.0.0/8": "targets: '10.0.0.0/8' is not an address like 192.0.2.7 or 2001:db8::7",
    "targets: [192.0.2.1, 7]": "targets: 7 is not an address like 192.0.2.7 or 2001:db8::7",
    "targets: '::1/64'": "targets: '::1/64' is not an address like 192.0.2.7 or 2001:db8::7",
    "sessions: 1": "sessions: 1 is neither true nor false",
    "sessions: 'no'": "sessions: 'no' is neither true nor false",
    "set_mtu: 1554": "set_mtu: 1554 is neither true nor false",
    "spread: all": "spread: 'all' is none of none, auto, rps, cpumap",
    "spread_cpus: -1": "spread_cpus: -1 is not a CPU's number, nor a list like 2-5,8",
    "spread_cpus: [1, true]": "spread_cpus: True is not a CPU's number, nor a list like 2-5,8",
    "spread_avoid: 1;2": "spread_avoid: '1;2' is not a list of CPUs like 2-5,8",
    "spread_avoid: 0-99999999999": "spread_avoid: '0-99999999999' is not a list of CPUs like 2-5,8",
    "spread_queue: 16385": "spread_queue: 16385 is not a number of frames (1 to 16384)",
    "spread_ports: 1": "spread_ports: 1 is neither true nor false",
    "ports: 7932": "unknown key 'ports' (known: encapsulations, port, vxlan_port, geneve_port, tzsp_port, "
                   "vlan, depth, mode, sources, targets, sessions, set_mtu, "
                                    "isolate, spread, spread_cpus, spread_avoid, spread_queue, spread_ports)",
    "2: 3": "unknown key 2 (known: encapsulations, port, vxlan_port, geneve_port, tzsp_port, vlan, depth, "
            "mode, sources, targets, sessions, set_mtu, "
                                    "isolate, spread, spread_cpus, spread_avoid, spread_queue, spread_ports)",
}


@pytest.mark.parametrize("setting", MISTAKES)
@pytest.mark.parametrize("section", ["defaults:\n", "interfaces:\n eth1:\n"])
def test_mistaken_settings(file, section, setting):
    text = f"# configuration\n{section}  {setting}\n"
    assert problem_of(file, text) == f"erm.yaml:{text.count(chr(10))}: {MISTAKES[setting]}"


@pytest.mark.parametrize("text, problem", [
    ("defaults:\ninterface:\n", ":2: unknown key 'interface' (known: defaults, interfaces)"),
    ("defaults:\n  depth: 1\n  vlan: strip\n  depth: 1\n", ":4: 'depth' stands twice, first in line 2"),
    ("interfaces:\n  eth1: {depth: 1}\n  eth2:\n  eth1: {depth: 1}\n", ":4: 'eth1' stands twice, first in line 2"),
    ("defaults:\ndefaults:\n", ":2: 'defaults' stands twice, first in line 1"),
    ("- eth1\n", ":1: the configuration must be a mapping, not ['eth1']"),
    ("eth1", ":1: the configuration must be a mapping, not 'eth1'"),
    ("interfaces:\n- eth1\n", ":2: interfaces must be a mapping, not ['eth1']"),
    ("interfaces:\n  eth1: 7932\n", ":2: eth1 must be a mapping, not 7932"),
    ("defaults: strip\n", ":1: defaults must be a mapping, not 'strip'"),
    (f"interfaces:\n  {'e' * 128}:\n", f":2: '{'e' * 128}' is not an interface name"),
    ("interfaces:\n  a b:\n", ":2: 'a b' is not an interface name"),
    ("interfaces:\n  ../x:\n", ":2: '../x' is not an interface name"),
    ("interfaces:\n  7:\n", ":2: 7 is not an interface name"),
    ("defaults:\n  port: [7932\n", ":3: not YAML: expected ',' or ']', but got '<stream end>'"),
    ("defaults:\n\tport: 1\n", ":2: not YAML: found character '\\t' that cannot start any token"),
    ("--- 1\n--- 2\n", ":2: not YAML: but found another document"),
    ("defaults: {port: *ports}\n", ":1: not YAML: found undefined alias 'ports'"),
    ("defaults: {\0}\n", ": not YAML: unacceptable character #x0000: special characters are not allowed"),
    ("defaults:\n  vlan: !!int strip\n",
     ":2: strip is not a decimal number: write it as one"),
    ("defaults:\n  vlan: !!python/name:os.system\n",
     ":2: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'"),
    ("defaults: {vlan: {[1]: 2}}\n", ":1: found unhashable key"),
    ("defaults: &self {vlan: *self}\n", ":1: found unconstructable recursive node"),
    ("defaults:\n  ? [vlan]\n  : strip\n", ":2: ['vlan'] is not a key"),
    ("? {interfaces: 1}\n: eth1\n", ":1: {'interfaces': 1} is not a key"),
])
def test_mistaken_files(file, text, problem):
    assert problem_of(file, text) == f"erm.yaml{problem}"


def test_a_file_that_is_not_there(file):
    with pytest.raises(UsageError) as raised:
        config.load(file)
    assert str(raised.value) == "erm.yaml: no such file"


def test_a_file_that_is_no_text(file):
    file.write_bytes(b"defaults: \xff\n")
    with pytest.raises(UsageError) as raised:
        config.load(file)
    assert str(raised.value).startswith("erm.yaml: cannot be read: 'utf-8' codec can't decode byte 0xff in position 10")


def test_a_directory(file):
    file.mkdir()
    with pytest.raises(UsageError) as raised:
        config.load(file)
    assert str(raised.value) == "erm.yaml: cannot be read: [Errno 21] Is a directory: 'erm.yaml'"


# xdp-erm config

def test_the_command_prints_what_is_in_effect(file):
    file.write_text("defaults: {vlan: strip, depth: 1}\ninterfaces: {eth1: {depth: 2, port: [1, 2]}}\n")
    done = run("--config", str(file), "--port", "7,9", "--port", "8", "--source", "10.0.0.0/8", "--target", "192.0.2.1",
               "--mode", "native", "--no-sessions", "--set-mtu", "--no-isolate", "--spread", "cpumap",
               "--spread-cpus", "2-4,8", "--spread-cpus", "0", "--spread-avoid", "1", "--spread-queue", "64",
               "--spread-ports", "eth1", "eth2")
    overridden = {"encapsulations": ["erm"], "port": [7, 8, 9], "vxlan_port": [4789], "geneve_port": [6081],
                  "tzsp_port": [37008], "vlan": "strip", "mode": "native", "sources": ["10.0.0.0/8"],
                  "targets": ["192.0.2.1"], "sessions": False, "set_mtu": True, "isolate": False,
                  "spread": "cpumap", "spread_cpus": [0, 2, 3, 4, 8], "spread_avoid": [1], "spread_queue": 64,
                  "spread_ports": True}
    assert (done.returncode, done.stderr) == (0, "")
    assert yaml.safe_load(done.stdout) == {"interfaces": {
        "eth1": {**overridden, "depth": 2}, "eth2": {**overridden, "depth": 1}}}


def test_the_command_prints_a_configuration_file(file):
    file.write_text("interfaces: {eth1: {vlan: tagged, port: [1, 2], sources: 10.0.0.0/8}, eth2: {set_mtu: true}}")
    printed = run("--config", str(file)).stdout
    again = Path("again.yaml")
    again.write_text(printed)
    assert config.load(again).interfaces == config.load(file).interfaces != {}
    assert run("--config", str(again)).stdout == printed


@pytest.mark.parametrize("arguments, message", [
    ([], "xdp-erm: no interface: name one, or put it under `interfaces` in erm.yaml"),
    (["a/b"], "xdp-erm: 'a/b' is not an interface name"),
    ([b"\xff"], r"xdp-erm: '\udcff' is not an interface name"),
    (["eth1", "--depth", "4"], "xdp-erm config: error: argument --depth: 4 is not a depth (1 to 3)"),
    (["eth1", "--depth", "two"], "xdp-erm config: error: argument --depth: 'two' is not a depth (1 to 3)"),
    (["eth1", "--vlan", "keep"],
     "xdp-erm config: error: argument --vlan: 'keep' is none of restore, tagged, strip"),
    (["eth1", "--port", "1,x"], "xdp-erm config: error: argument --port: 'x' is not a UDP port (1 to 65535)"),
    (["eth1", "--port", "0"], "xdp-erm config: error: argument --port: 0 is not a UDP port (1 to 65535)"),
    (["eth1", "--target", "here"],
     "xdp-erm config: error: argument --target: 'here' is not an address like 192.0.2.7 or 2001:db8::7"),
    (["eth1", "--spread", "all"],
     "xdp-erm config: error: argument --spread: 'all' is none of none, auto, rps, cpumap"),
    (["eth1", "--spread-cpus", "1,x"],
     "xdp-erm config: error: argument --spread-cpus: 'x' is not a list of CPUs like 2-5,8"),
    (["eth1", "--spread-cpus", "5-2"], "xdp-erm config: error: argument --spread-cpus: '5-2' in '5-2' runs backwards"),
    (["eth1", "--spread-queue", "0"],
     "xdp-erm config: error: argument --spread-queue: 0 is not a number of frames (1 to 16384)"),
    (["eth1", "--source", "10.0.0.1/8"], "xdp-erm config: error: argument --source: '10.0.0.1/8' is not a prefix "
     "like 192.0.2.0/24 or 2001:db8::/32: 10.0.0.1/8 has host bits set"),
])
def test_mistakes_on_the_command_line(file, arguments, message):
    file.write_text("")
    done = run("--config", str(file), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == message


UNSAFE = ("needs `sources`, the switches' addresses (--source): every mirrored host can send the like, and would put "
          "frames of its own before Zeek\n")


@pytest.mark.parametrize("text, arguments, where", [
    ("defaults:\n  depth: 2\n", ("eth1",), "erm.yaml:2: depth: 2"),
    ("interfaces:\n  eth1:\n    depth: 3\n", (), "erm.yaml:3: depth: 3"),
    ("defaults: {depth: 2}\ninterfaces:\n  eth2: {sources: 10.0.0.0/8}\n  eth1:\n", (), "erm.yaml:1: depth: 2"),
    ("defaults: {depth: 2, sources: 10.0.0.0/8}\ninterfaces:\n  eth1: {sources: []}\n", (), "erm.yaml:1: depth: 2"),
    ("defaults: {depth: 2}", ("eth1", "--depth", "3"), "argument --depth: 3"),
    ("", ("eth1", "--depth", "2", "--target", "192.0.2.1"), "argument --depth: 2"),
], ids=str)
def test_levels_within_are_peeled_for_known_sources_only(file, text, arguments, where):
    assert refusal(file, text, arguments) == f"xdp-erm: {where} {UNSAFE}"


@pytest.mark.parametrize("text, arguments, problem", [
    ("defaults: {sources: 2001:db8::/32}", ("eth1",),
     "erm.yaml:1: sources: '2001:db8::/32' is IPv6, in which erm does not come"),
    ("", ("eth1", "--encapsulation", "erm,tzsp", "--target", "2001:db8::1"),
     "argument --target: '2001:db8::1' is IPv6, in which erm and tzsp do not come"),
    ("defaults:\n  encapsulations: [vxlan, erm]\n  vxlan_port: 7932\n", ("eth1",),
     "erm.yaml:3: vxlan_port: 7932 is a port of both erm and vxlan"),
    ("defaults: {encapsulations: [vxlan, erm]}", ("eth1", "--port", "4789"),
     "argument --port: 4789 is a port of both erm and vxlan"),
], ids=str)
def test_settings_that_contradict_each_other(file, text, arguments, problem):
    assert refusal(file, text, arguments) == f"xdp-erm: {problem}\n"


@pytest.mark.parametrize("text, arguments", [
    ("defaults: {sources: 2001:db8::/32, encapsulations: erspan}", ("eth1",)),
    ("", ("eth1", "--encapsulation", "erm,gre", "--encapsulation", "tzsp", "--target", "2001:db8::1,192.0.2.1")),
    ("defaults: {vxlan_port: 7932}", ("eth1",)),
    ("defaults: {depth: 3}", ("eth1", "--source", "10.0.0.0/8")),
    ("defaults: {depth: 3}\ninterfaces: {eth1: {sources: 10.0.0.0/8}}", ("eth1",)),
    ("defaults: {sources: 10.0.0.0/8}", ("eth1", "--depth", "3")),
    ("defaults: {depth: 3}\ninterfaces: {eth1: {depth: 1}}", ("eth1",)),
    ("defaults: {depth: 3}", ("eth1", "--depth", "1")),
], ids=str)
def test_what_is_in_effect_counts(file, text, arguments):
    file.write_text(text)
    done = run("--config", str(file), *arguments)
    assert (done.returncode, done.stderr) == (0, "")


def test_mistakes_in_the_file_end_the_command(file):
    file.write_text("interfaces:\n  eth1: {depth: 9}\n")
    done = run("--config", str(file), "eth2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "xdp-erm: erm.yaml:2: depth: 9 is not a depth (1 to 3)\n"


def test_as_dict_is_plain_data():
    plain = InterfaceConfig(sources=("10.0.0.0/8",)).as_dict()
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert list(plain) == [field.name for field in dataclasses.fields(InterfaceConfig)]


# What YAML reads and nobody means

@pytest.mark.parametrize("value", ["22:22", "[7932, 22:22]", "010", "0x1f", "0b11", "7_932", "+7932"])
def test_numbers_that_are_not_decimal(file, value):
    wrong = value.split()[-1].strip("[]")
    assert problem_of(file, f"interfaces:\n  eth1:\n    port: {value}\n") == \
        f"erm.yaml:3: {wrong} is not a decimal number: write it as one"


def test_cpus_are_numbers_as_well(file):
    assert problem_of(file, "defaults: {spread_cpus: [1, 010]}\n") == \
        "erm.yaml:1: 010 is not a decimal number: write it as one"


def test_merge_keys(file):
    assert problem_of(file, "defaults: &d {vlan: strip}\ninterfaces:\n  eth1:\n    <<: *d\n") == \
        "erm.yaml:4: << is not supported: what is for every interface goes under `defaults`"


@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-15"])
def test_in_any_locale(file, locale):
    """Also with the mark of order of bytes that some editors begin a file with."""
    file.write_bytes("\ufeffinterfaces: {schnüffel0: {vlan: strip}}\n".encode())
    done = subprocess.run([*COMMAND[1:], "--config", str(file), "schnüffel0"], capture_output=True, timeout=TIMEOUT,
                          check=False, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": locale,
                                            "PYTHONCOERCECLOCALE": "0"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert "strip" in done.stdout.decode()
