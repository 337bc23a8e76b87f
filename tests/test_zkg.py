"""The package: what zkg builds and installs, and that a sensor goes on working after upgrade, unload and remove."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from machine import REPOSITORY, Machine, commit, copy_of_zeek, needs_zeek, package_repository

from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR
from xdp_erm_py.lab.cable import Cable

TIMEOUT = 60  # seconds
PACKAGE = "lib/zeek/plugins/packages/xdp-erm"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin directory, built by a Python with nothing but its standard library, then away from its sources."""
    directory = tmp_path_factory.mktemp("package")
    repository = package_repository(directory)
    subprocess.run(["/usr/bin/python3", "-I", "-S", "zeekctl/build.py"], cwd=repository, check=True, timeout=TIMEOUT)
    shutil.move(repository / "build" / "zeekctl", directory / "built")
    shutil.rmtree(repository)
    return directory / "built"


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd="/", capture_output=True, text=True, timeout=TIMEOUT, check=False)


def test_zeekctl_finds_one_module_and_what_it_needs(built):
    assert sorted(path.name for path in built.iterdir()) == ["settings.json", "xdp-erm.8", "xdp-erm.pyz",
                                                           "xdp_erm_zeekctl.py"]


@pytest.mark.check
def test_the_helper_is_one_file_that_says_what_the_package_says(built):
    helper = built / "xdp-erm.pyz"
    with zipfile.ZipFile(helper) as archive:
        names = archive.namelist()
    assert {"__main__.py", "xdp_erm_py/cli.py", "bpf/xdp_erm.c", "bpf/shared.h"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]
    shown = run(helper, "config", "eth0", "--config=/dev/null")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == run(REPOSITORY / "bin" / "xdp-erm", "config", "eth0", "--config=/dev/null").stdout
    assert run(helper, "config", "eth0", "--depth=4").returncode == 2


def altered(helper: Path, suffix: str, alter: Callable[[bytes], bytes]) -> Path:
    """The helper with other files of that suffix in it."""
    other = helper.with_name(f"other{suffix}.pyz")
    with zipfile.ZipFile(helper) as archive, zipfile.ZipFile(other, "w") as changed:
        for name in archive.namelist():
            content = archive.read(name)
            changed.writestr(name, alter(content) if name.endswith(suffix) else content)
    return other


def test_the_helper_runs_from_its_bytecode(built, tmp_path):
    helper = Path(shutil.copy(built / "xdp-erm.pyz", tmp_path))
    for suffix, alter in ((".py", lambda source: b"raise SystemExit('this is the source')\n"),
                          (".pyc", lambda bytecode: b"none" + bytecode[4:])):  # of another version of Python
        shown = run("/usr/bin/python3", altered(helper, suffix, alter), "config", "eth0", "--config=/dev/null")
        assert (shown.returncode, shown.stderr) == (0, ""), suffix
        assert shown.stdout == run(helper, "config", "eth0", "--config=/dev/null").stdout


def test_the_helper_compiles_and_attaches_what_is_in_it(built, cable):
    assert "attached (native" in run(built / "xdp-erm.pyz", "attach", SENSOR).stdout
    assert run(built / "xdp-erm.pyz", "detach", SENSOR).returncode == 0


@pytest.fixture
def sensor(xdp: None) -> Iterator[tuple[Cluster, Path]]:
    """A cluster without the package, and the package's repository."""
    with tempfile.TemporaryDirectory(prefix="xdp-erm-test-") as path, copy_of_zeek(Path(path)) as prefix, \
            Cable() as cable:
        with cable.sensor.entered():
            machine = Machine("sensor", prefix)
        with machine:
            machine.run("zkg", "autoconfig", "--force")
            yield Cluster(cable, machine), package_repository(Path(path))


@needs_zeek
def test_the_life_of_the_package_on_a_sensor(sensor):
    cluster, repository = sensor
    zkg = cluster.machine.run
    links = cluster.machine.run("ip", "-details", "link") + cluster.machine.run("ethtool", "-k", SENSOR)

    # Its tests run first, and there is no network to get anything from. What they say is in what fails.
    said = zkg("zkg", "install", "--force", str(repository))
    assert f'Running unit tests for "{repository}"\n' in said
    assert f'Installed "{repository}" (main)\n' in said
    assert cluster.machine.run("ip", "-details", "link") + cluster.machine.run("ethtool", "-k", SENSOR) == links
    assert cluster.machine.run("xdp-erm", "--version").startswith("xdp-erm ")
    assert "arning" not in cluster.zeekctl("install")
    assert cluster.zeekctl("xdp_erm.status", status=1).startswith("Host ")
    cluster.zeekctl("deploy")
    program = cluster.status()[0]["program_id"]

    # Upgraded while it runs: deploy goes on with the new one, and the program stays, being the same.
    shared = repository / "xdp_erm_py" / "__init__.py"
    shared.write_text(shared.read_text().replace('__version__ = "', '__version__ = "9.'))
    commit(repository, "The next version")
    zkg("zkg", "refresh")
    assert f'Upgraded "{repository}"' in zkg("zkg", "upgrade", "--force", "--skiptests")
    assert cluster.machine.run("xdp-erm", "--version").startswith("xdp-erm 9.")
    publisher = cluster.publisher()
    assert f"{SENSOR}: already attached (native, program {program})" in cluster.zeekctl("deploy")
    assert cluster.publisher() not in (None, publisher)

    # Unloaded: no scripts, the rest stays.
    zkg("zkg", "unload", "--force", "xdp-erm")
    assert "scripts are ok" in cluster.zeekctl("check")
    cluster.zeekctl("deploy")
    assert len(cluster.running()) == 6
    assert cluster.status()[0]["program_id"] == program

    # Removed as the documentation says, and then once more without the first steps.
    cluster.zeekctl("stop")
    cluster.zeekctl("xdp_erm.detach")
    assert (cluster.status(), cluster.publisher()) == ([], None)
    zkg("zkg", "remove", "--force", "xdp-erm")
    assert not (cluster.prefix / PACKAGE).exists()
    assert cluster.machine.run("ethtool", "-k", SENSOR) in links
    said = cluster.zeekctl("deploy")
    assert "xdp" not in said and "arning" not in said
    assert len(cluster.running()) == 6
    cluster.zeekctl("stop")
