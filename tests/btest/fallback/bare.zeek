# @TEST-DOC: The package loads what it uses, so that it works without Zeek's default scripts, and loading it gives no warning.
#
# @TEST-EXEC: zeek -b $XDP_ERM %INPUT > said 2>&1
# @TEST-EXEC: zeek $XDP_ERM %INPUT >> said 2>&1
# @TEST-EXEC: zeek $XDP_ERM $XDP_ERM/skip.zeek %INPUT 2>&1 | grep -v "XDP_ERM: before Zeek 9.0" >> said || true
# @TEST-EXEC: test ! -s said
