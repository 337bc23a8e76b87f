"""The documentation against the code: tables, links, paths and commands."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from bench import plot
from docs import generated, pictures
from xdp_erm_py import cli, config
from xdp_erm_py.errors import UsageError, XdpErmError
from xdp_erm_py.lab.cable import SENSOR_INTERFACE, Cable
from xdp_erm_py.program.counters import BY_NAME

pytestmark = pytest.mark.check

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md")] + sorted(DOCS.glob("*.md"))
TIMEOUT = 120  # seconds

each_page = pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])


def section(name: str, heading: str) -> str:
    """What stands under the heading that begins so, on a page of docs/."""
    parts = re.split(r"^#+ (.*)\n", (DOCS / name).read_text(), flags=re.MULTILINE)
    found = [text for title, text in zip(parts[1::2], parts[2::2]) if title.startswith(heading)]
    assert len(found) == 1, f"{name} has {len(found)} sections {heading!r}"
    return found[0]


def table(text: str) -> list[list[str]]:
    """The rows of the only table, without the one at its top."""
    rows = [re.split(r"(?<!\\) *\| *", line.strip())[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert sum(set("".join(row)) == {"-"} for row in rows) == 1
    return rows[2:]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def script(name: str) -> str:
    return (REPOSITORY / "scripts" / name).read_text()


# What is made from the code

@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in generated.pages()])
def test_what_is_made_is_up_to_date(path):
    assert path.read_text() == generated.pages()[path], "run make docs"


def test_each_table_has_its_page():
    text = "".join(page.read_text() for page in PAGES)
    assert not [name for name in generated.TABLES if text.count(f"<!-- table: {name} -->") != 1]


def test_drawings_are_up_to_date():
    assert (DOCS / "architecture.svg").read_text() == pictures.architecture(), "run make pictures"
    workers = pictures.read_lab((DOCS / "lab.txt").read_text())
    assert len(workers) == 4
    assert (DOCS / "balance.svg").read_text() == pictures.balance(workers), "run make pictures"


def test_the_picture_of_the_bench_is_of_its_figures():
    assert (DOCS / "bench.svg").read_text() == plot.draw(json.loads((DOCS / "bench.json").read_text())), \
        "run make pictures"


def test_the_screen_is_of_these_counters():
    """The rest of it is what was counted when it was made."""
    text = (DOCS / "watch.svg").read_text()
    assert [name for name in re.findall(r">([a-z_]+)&#160;", text) if name in BY_NAME] == list(BY_NAME), \
        "run make pictures"


# Tables

def fields(name: str) -> dict[str, str]:
    """The columns of a log, with their types, as the script has them."""
    record = script("main.zeek").partition(f"type {name}: record {{")[2].partition("};")[0]
    return dict(re.findall(r"^\t\t(\w+): (\w+) &log", record, re.MULTILINE))


def test_fields_of_the_log():
    documented: dict[str, str] = {}
    for cell, kind, _ in table(section("zeek.md", "xdp_erm.log")):
        name = names(cell)[0]
        if name.endswith(".packets"):
            assert names(cell)[1:] == [".bytes"]
            name, kind = name.removesuffix(".packets"), {"count": "Counter"}[kind]
        documented[name] = kind
    assert documented == fields("Info")
    assert list(documented) == list(fields("Info"))


def test_fields_of_the_sessions_log():
    documented = {name: kind for cell, kind, _ in table(section("zeek.md", "xdp_erm_sessions.log"))
                  for name in names(cell)}
    assert list(documented) == list(fields("SessionInfo"))
    assert {name: kind or fields("Info")[name] for name, kind in documented.items()} == fields("SessionInfo")


def test_options_of_the_scripts():
    """Those that may change: options, and constants with &redef."""
    text = "".join(path.read_text() for path in (REPOSITORY / "scripts").glob("*.zeek"))
    found = re.findall(r"^\t(?:option (?=.*;)|const (?=.* &redef;))(\w+)(?:: [\w\[\]]+)? = (.*?)(?: &redef)?;$", text,
                       re.MULTILINE)
    documented = {name: names(default)[0] for cell, default, _ in table(section("zeek.md", "Options"))
                  for name in names(cell)}
    assert documented == dict(found)


def test_notices():
    kinds = script("notices.zeek").partition("redef enum Notice::Type += {")[2].partition("}")[0]
    documented = [name for cell, _ in table(section("zeek.md", "Notices")) for name in names(cell)]
    assert sorted(documented) == sorted(re.findall(r"^\t\t(\w+),$", kinds, re.MULTILINE))


def test_metrics():
    found = {f"zeek_{name.replace('-', '_')}{'_total' if kind == 'counter' else ''}" for kind, name in
             re.findall(r'register_(counter|gauge)_family\(.*?\$name="([\w-]+)"', script("telemetry.zeek"), re.DOTALL)}
    assert set(re.findall(r"`(zeek_\w+)`", section("zeek.md", "Metrics"))) == found


def test_options_of_zeekctl():
    plugin = ast.parse((REPOSITORY / "zeekctl" / "xdp_erm_zeekctl.py").read_text())
    options = next(ast.literal_eval(node.value) for node in plugin.body
                   if isinstance(node, (ast.Assign, ast.AnnAssign)) and "OPTIONS" in ast.unparse(node).split("=")[0])
    [own] = re.findall(r"(?:^\|.*\n)+(?=\n)", section("install.md", "Options and node keys"), re.MULTILINE)
    documented = {name: default for cell, default, _ in table(own) for name in names(cell)}
    defaults = {name: str(int(value) if isinstance(value, bool) else value) for name, value, _ in options}
    assert set(documented) == set(defaults)
    # Where the cell is empty, or says it in words, the host's file or the package decides.
    assert {name: default for name, default in documented.items() if re.fullmatch(r"\w*\d|fallback|auto", default)} \
        == {name: default for name, default in defaults.items()
            if re.fullmatch(r"\w*\d|fallback|auto", documented[name])}


def test_exit_statuses():
    sentence = next(line for line in (DOCS / "operate.md").read_text().splitlines() if line.startswith("Exit status: "))
    assert re.findall(r"\b\d\b", sentence) == ["0", str(XdpErmError.exit_status), str(UsageError.exit_status)]


def test_fields_of_json(cable):
    """JSON of a reading has no name that is not written down."""
    subprocess.run([REPOSITORY / "bin/xdp-erm", "attach", SENSOR_INTERFACE], check=True, timeout=TIMEOUT,
                   stdout=subprocess.PIPE)
    text = (DOCS / "operate.md").read_text()
    for command, known in (("stats", r'"(\w+)"'), ("status", r'["`](\w+)["`]')):
        output = subprocess.run([REPOSITORY / "bin/xdp-erm", command, "--json"], check=True, timeout=TIMEOUT, text=True,
                                stdout=subprocess.PIPE).stdout
        [interface] = yaml.safe_load(output)["interfaces"]
        assert not set(interface) - set(re.findall(known, text))


# Links and paths

def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL),
                        re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@each_page
def test_paths(page):
    named = re.findall(r"`((?:bench|bpf|docs|scripts|tests|tools|xdp_erm_py|zeekctl)/[\w./]*)`", page.read_text())
    assert not [path for path in named if not (REPOSITORY / path).exists()]


@each_page
def test_targets_of_make(page):
    targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z]+(?: [a-z]+)*)", page.read_text(), re.MULTILINE))
    assert not [words for words in named if set(words.split()) - set(targets)]


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


# Commands

def code(page: Path, language: str = "") -> Iterator[tuple[str, bool]]:
    """The blocks of code, indented or between fences, and whether each is to be run: it follows `<!-- run -->`."""
    text = page.read_text()
    for match in re.finditer(rf"(<!-- run -->\n+)?^( *)```{language}\n(.*?)^\2```$", text, re.MULTILINE | re.DOTALL):
        yield match[3], bool(match[1])
    if not language:
        for match in re.finditer(r"(<!-- run -->\n)?\n((?: {4,}\S.*\n)+)", text):
            yield match[2], bool(match[1])


RUN = [page for page in PAGES if any(is_run for _, is_run in code(page))]


def commands(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("# ") for line in lines if line.strip()]


def ours() -> Iterator[str]:
    """Each command line of ours that is shown, without what is said of it behind two spaces or a #."""
    for page in PAGES:
        for block, _ in (*code(page), *code(page, "console")):
            for line in commands(block):
                line = re.split(r" {2,}| #", line)[0]
                # What stands in [] or behind a comma is a choice.
                if line.startswith("xdp-erm ") and not set("[,") & set(line):
                    yield line


@pytest.mark.parametrize("line", sorted(set(ours())))
def test_command_lines_are_understood(line):
    words = shlex.split(line)[1:]
    cli.make_parser(words[:1]).parse_args(words)


@each_page
def test_configurations_are_taken(page, tmp_path):
    file = tmp_path / "xdp-erm.yaml"
    for block, _ in code(page, "yaml"):
        file.write_text(block)
        assert config.load(file).interfaces, block


@pytest.fixture
def eth1(xdp) -> Iterator[Cable]:
    """In a sensor's namespace, whose interface is called as in the examples."""
    with Cable() as cable, cable.sensor.entered():
        script = f"ip link set {SENSOR_INTERFACE} down; ip link set {SENSOR_INTERFACE} name eth1; ip link set eth1 up"
        subprocess.run(["sh", "-ec", script], check=True, timeout=TIMEOUT)
        cable.wait_for_carrier("eth1")
        yield cable


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in RUN])
def test_commands_run(page, eth1, tmp_path):
    """Those marked so, one after the other, as they stand there."""
    blocks = [block for block, is_run in code(page) if is_run]
    (tmp_path / "xdp-erm").symlink_to(REPOSITORY / "bin/xdp-erm")
    for line in (line for block in blocks for line in commands(block)):
        done = subprocess.run(["sh", "-c", line], env={"PATH": f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin"},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}"


# What make install puts where

def test_install(tmp_path):
    subprocess.run(["cp", "-a", *(REPOSITORY / name for name in ("Makefile", "bpf", "docs", "xdp_erm_py", "zeekctl")),
                    tmp_path], check=True, timeout=TIMEOUT)
    subprocess.run(["make", "--silent", "install", "PREFIX=/usr", f"DESTDIR={tmp_path}/root"], cwd=tmp_path, check=True,
                   timeout=TIMEOUT)
    installed = {str(path.relative_to(tmp_path / "root")) for path in (tmp_path / "root").rglob("*") if path.is_file()}
    assert installed == {"usr/sbin/xdp-erm", "usr/share/man/man8/xdp-erm.8"}
    version = subprocess.run([tmp_path / "root/usr/sbin/xdp-erm", "--version"], check=True, timeout=TIMEOUT, text=True,
                             stdout=subprocess.PIPE).stdout
    assert version.strip().replace("-", "\\-") in (DOCS / "xdp-erm.8").read_text()
