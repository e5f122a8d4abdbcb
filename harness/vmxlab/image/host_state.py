"""The baseline of L1: the host-state area that brings a VM exit back into the monitor (SDM Vol. 3C, 25.5)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from vmxlab.image import layout
from vmxlab.image.monitor import Monitor
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import CR0, CR4, EFER
from vmxlab.structures import Capabilities


def host_efer() -> int:
    """IA32_EFER in the monitor."""
    return int(EFER.LME | EFER.LMA)


@lru_cache(maxsize=8)
def host_state(monitor: Monitor, capabilities: Capabilities) -> Mapping[Field, int]:
    """Every host-state field that each processor with VMX has.

    CR0 and CR4 are what guest/vmx/operation.c makes of the fixed bits; the rest are the monitor's addresses.
    """
    cr0 = (CR0.PG | CR0.WP | CR0.NE | CR0.ET | CR0.PE | capabilities.cr0_fixed0) & capabilities.cr0_fixed1
    cr4 = (CR4.PAE | CR4.VMXE | capabilities.cr4_fixed0) & capabilities.cr4_fixed1
    state = {
        Field.HOST_CR0: int(cr0),
        Field.HOST_CR3: monitor.page_table_root,
        Field.HOST_CR4: int(cr4),
        Field.HOST_CS_SELECTOR: layout.SELECTOR_CODE,
        Field.HOST_TR_SELECTOR: layout.SELECTOR_TSS,
        Field.HOST_TR_BASE: monitor.tss,
        Field.HOST_GDTR_BASE: monitor.gdt,
        Field.HOST_IDTR_BASE: monitor.idt,
        Field.HOST_RSP: monitor.exit_stack_top,
        Field.HOST_RIP: monitor.exit_entry,
    }
    for name in ("ES", "SS", "DS", "FS", "GS"):
        state[Field[f"HOST_{name}_SELECTOR"]] = layout.SELECTOR_DATA
    state |= dict.fromkeys(_ZERO, 0)
    return MappingProxyType(state)


_ZERO = (
    Field.HOST_FS_BASE,
    Field.HOST_GS_BASE,
    Field.HOST_IA32_SYSENTER_CS,
    Field.HOST_IA32_SYSENTER_ESP,
    Field.HOST_IA32_SYSENTER_EIP,
)
