# make demo   run the lab: a mirroring switch and a sensor in network namespaces of this machine (root)
# make test   run all tests (root: most of them use XDP)
# make fuzz   compare the XDP program with the reference on millions of frames (root); FUZZ="--seed 1 --frames 9000000"
# make soak   all faults at random under traffic, with exact books (root); SOAK="--minutes 10 --seed 1"
# make bench  measure costs, gains and alternatives (root); BENCH="--quick --only cost balance --json FILE --plot FILE"
# make clean  remove what the other targets made here

PYTHON := /usr/bin/python3
VENV := .venv

# What xdp-erm needs at run time, and what its tests need besides. bcc and Zeek's broker module are in no Python
# registry, so the virtual environment looks at the system's packages too.
RUNTIME_PACKAGES := python3-bpfcc python3-yaml python3-pyroute2 python3-rich python3-websockets
TEST_PACKAGES := python3-venv iproute2 ethtool procps util-linux git python3-git python3-semantic-version rsync systemd udev \
	valgrind nftables
# What the benchmark needs besides what runs.
BENCH_PACKAGES := python3-matplotlib gcc libc6-dev iproute2 ethtool

.PHONY: demo test fuzz soak bench runtime clean

demo: runtime
	bin/xdp-erm lab

test: $(VENV)/ready
	PATH="$(CURDIR)/$(VENV)/bin:/opt/zeek/bin:/usr/sbin:/usr/bin:/sbin:/bin" $(VENV)/bin/python -m pytest tests

fuzz: $(VENV)/ready
	PATH="$(CURDIR)/$(VENV)/bin:/usr/sbin:/usr/bin:/sbin:/bin" PYTHONPATH="$(CURDIR):$(CURDIR)/tests" \
		$(VENV)/bin/python -m fuzz $(FUZZ)

soak: $(VENV)/ready
	PATH="$(CURDIR)/$(VENV)/bin:/usr/sbin:/usr/bin:/sbin:/bin" PYTHONPATH="$(CURDIR):$(CURDIR)/tests" \
		$(VENV)/bin/python -m soak $(SOAK)

bench:
	@$(call install,$(RUNTIME_PACKAGES) $(BENCH_PACKAGES))
	PATH=/usr/sbin:/usr/bin:/sbin:/bin $(PYTHON) -m bench $(BENCH)

runtime:
	@$(call install,$(RUNTIME_PACKAGES))

$(VENV)/ready: tests/requirements.txt Makefile
	@$(call install,$(RUNTIME_PACKAGES) $(TEST_PACKAGES) $(BENCH_PACKAGES))
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(VENV)/bin/pip install --quiet --requirement tests/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis tests/btest/.tmp

# Installs Debian or Ubuntu packages, if one of them is missing.
define install
if ! dpkg -s $(1) >/dev/null 2>&1; then \
	command -v apt-get >/dev/null || { echo "not Debian or Ubuntu: install what $(1) are called here" >&2; exit 1; }; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1); \
fi
endef
