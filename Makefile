# make demo      run the lab: a mirroring switch and a sensor in network namespaces of this machine (root)
# make check     what to run at each change: lint, types, program, configuration and one of each kind of test (root)
# make test      run the tests but for those that take long (root: most of them use XDP); TEST="-k attach -x",
#                ZEEK=/opt/zeek9 for another Zeek than that in /opt/zeek, XDP_ERM_REQUIRE=zeek,bcc,qemu to fail for want of these
# make nightly   run all tests, then fuzz, soak, nics and bench
# make fuzz      compare the XDP program with the reference on millions of frames (root); FUZZ="--seed 1 --frames 9000000"
# make soak      all faults at random under traffic, with exact books (root); SOAK="--minutes 10 --seed 1"
# make nics      try drivers of real NICs in emulated machines (root, hours without KVM); NICS="vmxnet3 igb" KERNELS=6.12
# make bench     measure costs, gains and alternatives (root); BENCH="--quick --only cost balance --json FILE --plot FILE"
# make figures   make bench for docs/cost.md: its picture and table
# make install   put xdp-erm and its man page below /usr/local; PREFIX=, DESTDIR=
# make docs      make anew what the documentation has from the code: tables and the man page
# make pictures  make the documentation's pictures anew, with what is counted and balanced now (root)
# make clean     remove what the other targets made here

PYTHON := /usr/bin/python3
VENV := .venv
ZEEK ?= /opt/zeek
PREFIX := /usr/local

# What xdp-erm needs at run time, and what its tests need besides. bcc and Zeek's broker module are in no Python
# registry, so the virtual environment looks at the system's packages too.
RUNTIME_PACKAGES := python3-bpfcc python3-yaml python3-pyroute2 python3-rich python3-websockets
TEST_PACKAGES := python3-venv iproute2 ethtool procps util-linux git python3-git python3-semantic-version rsync systemd udev \
	valgrind nftables strace
# What the benchmark needs besides what runs.
BENCH_PACKAGES := gcc libc6-dev iproute2 ethtool

# What tests run: those of the project, with Zeek's commands if there is a Zeek. Two processes, as much of a test is
# waiting; those of a group, which share a cluster for example, run in one of them.
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$(ZEEK)/bin:/usr/sbin:/usr/bin:/sbin:/bin" $(VENV)/bin/python
PYTEST := $(IN_VENV) -m pytest --numprocesses=2 --dist=loadgroup
TEST :=

.PHONY: demo check test nightly fuzz soak nics bench figures install docs pictures runtime clean

demo: runtime
	bin/xdp-erm lab

check: $(VENV)/ready
	$(PYTEST) -m check $(TEST)

test: $(VENV)/ready
	$(PYTEST) -m "not nightly" $(TEST)

nightly: $(VENV)/ready
	$(PYTEST)
	$(MAKE) fuzz soak nics bench

fuzz: $(VENV)/ready
	PYTHONPATH=tests $(IN_VENV) -m fuzz $(FUZZ)

soak: $(VENV)/ready
	PYTHONPATH=tests $(IN_VENV) -m soak $(SOAK)

nics: $(VENV)/ready
	@tools/apt-install debootstrap debian-archive-keyring e2fsprogs iproute2
	PYTHONPATH=.:tests $(IN_VENV) -m nics $(if $(NICS),--nics $(NICS)) $(if $(KERNELS),--kernels $(KERNELS))

bench:
	@tools/apt-install $(RUNTIME_PACKAGES) $(BENCH_PACKAGES)
	PATH=/usr/sbin:/usr/bin:/sbin:/bin $(PYTHON) -m bench $(BENCH)

figures:
	$(MAKE) bench BENCH="--json docs/bench.json --plot docs/bench.svg"
	$(MAKE) docs

install:
	$(PYTHON) zeekctl/build.py
	install -D -m 755 build/zeekctl/xdp-erm.pyz $(DESTDIR)$(PREFIX)/sbin/xdp-erm
	install -D -m 644 docs/xdp-erm.8 $(DESTDIR)$(PREFIX)/share/man/man8/xdp-erm.8

docs: runtime
	PYTHONPATH=. $(PYTHON) docs/generated.py

pictures: runtime
	bin/xdp-erm lab --sessions 1 --packets 4000 > docs/lab.txt
	$(PYTHON) docs/pictures.py
	PYTHONPATH=. $(PYTHON) docs/screen.py
	$(PYTHON) -m bench.plot docs/bench.json docs/bench.svg

runtime:
	@tools/apt-install $(RUNTIME_PACKAGES)

$(VENV)/ready: tests/requirements.txt Makefile
	@tools/apt-install $(RUNTIME_PACKAGES) $(TEST_PACKAGES) $(BENCH_PACKAGES)
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(VENV)/bin/pip install --quiet --requirement tests/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis tests/btest/.tmp /var/cache/xdp-erm-tests
