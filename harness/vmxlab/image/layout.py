"""The physical memory of a machine that runs an image: who owns which addresses.

L1 is identity-mapped over the first 4 GiB, so L1-physical and L1-linear addresses are the same number.
The C side gets these numbers from the header that `vmxlab.image.protocol` writes; `guest/boot/monitor.ld`
asserts that the monitor ends where this page says.
"""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

MEMORY_BYTES = 64 * MIB
"""RAM that every engine gives a machine."""

TRAMPOLINE = 0x8000
"""Where the second processor starts: a SIPI names a page below 1 MiB (SDM Vol. 3A, 9.4.3)."""

MONITOR_BASE = 1 * MIB
MONITOR_LIMIT = 2 * MIB

# Selectors in the monitor's GDT (guest/cpu/gdt.c), which the host-state area names too.
SELECTOR_CODE = 0x08
SELECTOR_DATA = 0x10
SELECTOR_TSS = 0x18

SCRIPT_BUFFER_BYTES = 512 * KIB
"""The longest script (one case, decoded) that the monitor takes."""
SCRIPT_BUFFER_0 = 2 * MIB
SCRIPT_BUFFER_1 = SCRIPT_BUFFER_0 + SCRIPT_BUFFER_BYTES

FRAME_BUFFER_BYTES = 1 * MIB
"""The longest frame that the monitor takes over the serial line."""
FRAME_BUFFER = 3 * MIB

PAYLOAD_BASE = 4 * MIB
PAYLOAD_BYTES = 8 * MIB
"""Room for the cases that come with an image."""

CASE_BASE = 16 * MIB
"""From here to the end of RAM everything belongs to the running case."""
CASE_LIMIT = MEMORY_BYTES

# The structures of a case, one after the other; a page each unless said otherwise.
VMXON_REGION = CASE_BASE
VMCS_REGION = CASE_BASE + 0x1000
SHADOW_VMCS_REGION = CASE_BASE + 0x2000
IO_BITMAP_A = CASE_BASE + 0x3000
IO_BITMAP_B = CASE_BASE + 0x4000
MSR_BITMAP = CASE_BASE + 0x5000
VMREAD_BITMAP = CASE_BASE + 0x6000
VMWRITE_BITMAP = CASE_BASE + 0x7000
VIRTUAL_APIC_PAGE = CASE_BASE + 0x8000
APIC_ACCESS_PAGE = CASE_BASE + 0x9000
POSTED_INTERRUPT_DESCRIPTOR = CASE_BASE + 0xA000
EPT_TABLES = CASE_BASE + 0x10000
"""The EPT's root; its other tables follow."""
EPT_TABLES_MAX = 0xF0
"""So many pages of tables fit before the next MiB."""

# The MSR areas have the next MiB; the EPT's tables end before it.
ENTRY_MSR_LOAD_AREA = CASE_BASE + 0x100000
EXIT_MSR_STORE_AREA = CASE_BASE + 0x110000
EXIT_MSR_LOAD_AREA = CASE_BASE + 0x120000
MSR_AREA_BYTES = 64 * KIB
"""Room for 4,096 entries: the most that any IA32_VMX_MISC[27:25] recommends."""

SECOND_PROGRAM = CASE_BASE + 0x180000
"""What the second processor runs."""
SECOND_PROGRAM_BYTES = 64 * KIB

# vmxlab.cases.memory.L2_MEMORY lies here, at CASE_BASE + 2 MiB.

FREE_PAGES = CASE_BASE + 4 * MIB
"""Nothing of the harness lies from here to CASE_LIMIT: a case's own pages."""
