"""`python3 -m xdp_erm_py` and the .pyz start here."""

import sys

from .cli import main

sys.exit(main())
