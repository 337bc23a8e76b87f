#!/usr/bin/env python3
"""Makes what zeekctl gets: the plugin, and beside it the settings it has to know, the helper as one file, its man page.

zkg runs this to build the package. It needs nothing but Python's standard library.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipapp
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "zeekctl"
PLUGIN = "xdp_erm_zeekctl.py"
HELPER = "xdp-erm.pyz"
SETTINGS = "settings.json"
MAN_PAGE = "xdp-erm.8"

# The Python that bcc is packaged for, which a virtual environment's is not.
PYTHON = "/usr/bin/python3"


def settings() -> str:
    """The table of settings, as far as they are zeekctl's options as well, for the plugin."""
    sys.path.insert(0, str(ROOT))
    from xdp_erm_py.settings import DEFAULTS, PORTS, SETTINGS
    table = {name: {"option": each.option, "help": each.help, "metavar": each.metavar, "many": each.many,
                    "number": each.number, "default": DEFAULTS[name]}
             for name, each in SETTINGS.items() if each.zeekctl}
    return json.dumps({"settings": table, "ports": PORTS}, indent=2) + "\n"


def compile_beside(directory: Path) -> None:
    """Python keeps no bytecode of what it imports from an archive: without it every command would compile us anew.

    Where another version of Python runs the archive, it does just that. What it is of and how old says nothing there,
    as the two come in one file.
    """
    if Path(PYTHON).exists():  # a manager need not have it
        subprocess.run([PYTHON, "-I", "-m", "compileall", "-q", "-b", "--invalidation-mode=unchecked-hash",
                        f"-s{directory}", directory], check=True)


def build(directory: Path) -> None:
    shutil.copy(ROOT / "zeekctl" / PLUGIN, directory)
    shutil.copy(ROOT / "docs" / MAN_PAGE, directory)
    (directory / SETTINGS).write_text(settings())
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary)
        for name in ("xdp_erm_py", "bpf"):
            shutil.copytree(ROOT / name, staging / name, ignore=shutil.ignore_patterns("__pycache__"))
        # zipapp's own would lose main()'s exit status.
        (staging / "__main__.py").write_text("import xdp_erm_py.__main__\n")
        compile_beside(staging)
        zipapp.create_archive(staging, directory / HELPER, f"{PYTHON} -Xutf8", compressed=True)  # as bin/xdp-erm
    (directory / HELPER).chmod(0o755)


if __name__ == "__main__":
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    build(BUILD)
