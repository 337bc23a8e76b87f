# @TEST-DOC: The package loads what it uses, so that it works without Zeek's default scripts.
#
# @TEST-EXEC: zeek -b $XDP_ERM %INPUT
