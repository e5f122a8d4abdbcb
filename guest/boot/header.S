/*
 * What lets `qemu-system-x86_64 -kernel` (and GRUB) boot the monitor: a multiboot 1 header (Multiboot
 * Specification 0.6.96, 3.1) and a PVH entry note (Xen's x86/HVM direct boot ABI, XEN_ELFNOTE_PHYS32_ENTRY).
 */
#define MULTIBOOT_MAGIC 0x1badb002
#define MULTIBOOT_FLAGS 0               /* an ELF file needs no address fields */
#define XEN_ELFNOTE_PHYS32_ENTRY 18

	.section .multiboot, "a"
	.balign	4
	.long	MULTIBOOT_MAGIC
	.long	MULTIBOOT_FLAGS
	.long	-(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)

	.section .note.Xen, "a", @note
	.balign	4
	.long	4               /* name: "Xen\0" */
	.long	4               /* descriptor: a 32-bit entry */
	.long	XEN_ELFNOTE_PHYS32_ENTRY
	.asciz	"Xen"
	.long	start32

	.section .note.GNU-stack, "", @progbits
