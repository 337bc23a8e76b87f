#!/usr/bin/env python3
"""Makes what zeekctl gets: the plugin, and the helper as one file beside it, which zeekctl copies to every host.

zkg runs this to build the package. It needs nothing but Python's standard library.
"""

import shutil
import tempfile
import zipapp
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "zeekctl"
PLUGIN = "xdp_erm_zeekctl.py"
HELPER = "xdp-erm.pyz"

# The Python that bcc is packaged for, which a virtual environment's is not; in UTF-8 as bin/xdp-erm.
INTERPRETER = "/usr/bin/python3 -Xutf8"


def main() -> None:
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    shutil.copy(ROOT / "zeekctl" / PLUGIN, BUILD)
    with tempfile.TemporaryDirectory() as directory:
        staging = Path(directory)
        for name in ("xdp_erm_py", "bpf"):
            shutil.copytree(ROOT / name, staging / name, ignore=shutil.ignore_patterns("__pycache__"))
        # zipapp's own would lose main()'s exit status.
        (staging / "__main__.py").write_text("import xdp_erm_py.__main__\n")
        zipapp.create_archive(staging, BUILD / HELPER, INTERPRETER, compressed=True)
    (BUILD / HELPER).chmod(0o755)


if __name__ == "__main__":
    main()
