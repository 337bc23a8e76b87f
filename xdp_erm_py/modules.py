"""The Python modules that some commands need, and what they are called as packages."""

#: The package of each module, of the same name on Debian and Ubuntu and on RHEL and Fedora.
PACKAGES = {name: f"python3-{name}" for name in ("pyroute2", "rich", "websockets")}
