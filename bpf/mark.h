/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * What bpf/xdp_erm.c writes into the XDP metadata of a decapsulated frame, for bpf/isolate.c. To be included after
 * shared.h.
 */
#ifndef XDP_ERM_MARK_H
#define XDP_ERM_MARK_H

struct mark {
	u32 magic;		/* MARK */
	__be32 type;		/* the EtherType and the two bytes behind it; 0 where the frame ends before them */
};

#endif
