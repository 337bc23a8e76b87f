"""The bare strip: the shortest program that decapsulates, to compare with.

It knows frames without VLAN tags and IP options, and believes every length; it counts nothing, keeps no frame from the
host and loses the VLAN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from xdp_erm_py.kernel import bpf
from xdp_erm_py.program import compiler
from xdp_erm_py.program.module import Module

#: C, with `ctx` for the frame.
STATEMENT = """{
	u8 *at = (void *)(long)ctx->data;

	if (at + 54 <= (u8 *)(long)ctx->data_end && *(__be16 *)(at + 12) == bpf_htons(0x0800) && at[14] == 0x45)
		if (at[23] == 17 && *(__be16 *)(at + 36) == bpf_htons(7932))
			bpf_xdp_adjust_head(ctx, 54);
}"""
_PROGRAM = f"""
#include <linux/types.h>
int bare(struct xdp_md *ctx)
{{
	{STATEMENT}
	return XDP_PASS;
}}
"""


@contextlib.contextmanager
def loaded() -> Iterator[int]:
    """The program: its descriptor."""
    with Module(compiler.compiled(_PROGRAM, [])) as module, bpf.descriptor(module.load_xdp("bare")) as program:
        yield program
