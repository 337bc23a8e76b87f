"""The Python modules that some commands need, and what they are called as packages."""

#: The package of each module; where one is named, it is called so on Debian and Ubuntu and on RHEL and Fedora.
PACKAGES = {"yaml": "python3-yaml (Debian, Ubuntu) or python3-pyyaml (RHEL, Fedora)",
            **{name: f"python3-{name}" for name in ("pyroute2", "rich", "websockets")}}
