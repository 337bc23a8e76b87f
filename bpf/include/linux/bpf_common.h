/* The instruction classes of classic BPF, which bcc/bpf.h builds on. */
