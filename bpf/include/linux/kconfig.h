/* The two options that bcc's helpers.h asks the kernel's configuration for. */
#define CONFIG_BPF 1
#define CONFIG_BPF_SYSCALL 1
