"""Checks on VM-execution control fields (SDM Vol. 3C, 27.2.1.1)."""

from __future__ import annotations

from vmxlab.oracle.entry.addresses import structure_address
from vmxlab.oracle.entry.reserved import reserved_controls
from vmxlab.oracle.entry.rule import Area, NotChecked, RuleTable
from vmxlab.oracle.entry.vmcs import Vmcs
from vmxlab.sdm.controls import (
    ControlSet,
    EntryControls,
    ExitControls,
    PinControls,
    PrimaryControls,
    SecondaryControls,
    TertiaryControls,
)
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import MemoryType
from vmxlab.structures import EPTPointer

TABLE = RuleTable(Area.CONTROLS, "27.2.1.1")
rule = TABLE.rule

_Primary, _Secondary, _Tertiary = PrimaryControls, SecondaryControls, TertiaryControls
_EPTP_SWITCHING = 1 << 0

for _set in (ControlSet.PIN, ControlSet.PRIMARY, ControlSet.SECONDARY, ControlSet.TERTIARY):
    reserved_controls(TABLE, _set)


@rule(Field.CR3_TARGET_COUNT)
def cr3_target_count(vmcs: Vmcs) -> bool:
    """The CR3-target count is at most what IA32_VMX_MISC[24:16] says (4)."""
    return vmcs[Field.CR3_TARGET_COUNT] <= vmcs.capability(lambda: vmcs.capabilities.misc.cr3_target_count)


structure_address(TABLE, Field.IO_BITMAP_A, "address of I/O bitmap A", when=[_Primary.USE_IO_BITMAPS])
structure_address(TABLE, Field.IO_BITMAP_B, "address of I/O bitmap B", when=[_Primary.USE_IO_BITMAPS])
structure_address(TABLE, Field.MSR_BITMAP, "MSR-bitmap address", when=[_Primary.USE_MSR_BITMAPS])


# --- APIC virtualization -----------------------------------------------------------------------------------

structure_address(TABLE, Field.VIRTUAL_APIC_ADDRESS, "virtual-APIC address", when=[_Primary.USE_TPR_SHADOW])


@rule(Field.TPR_THRESHOLD, when=[_Primary.USE_TPR_SHADOW], unless=[_Secondary.VIRTUAL_INTERRUPT_DELIVERY])
def tpr_threshold_reserved(vmcs: Vmcs) -> bool:
    """Bits 31:4 of the TPR threshold are 0."""
    return not vmcs[Field.TPR_THRESHOLD] >> 4


@rule(
    Field.TPR_THRESHOLD,
    Field.VIRTUAL_APIC_ADDRESS,
    when=[_Primary.USE_TPR_SHADOW],
    unless=[_Secondary.VIRTUALIZE_APIC_ACCESSES, _Secondary.VIRTUAL_INTERRUPT_DELIVERY],
)
def tpr_threshold_above_vtpr(vmcs: Vmcs) -> bool:
    """Bits 3:0 of the TPR threshold are not greater than bits 7:4 of VTPR on the virtual-APIC page."""
    threshold = vmcs[Field.TPR_THRESHOLD] & 0xF
    return not threshold or threshold <= vmcs.read(vmcs[Field.VIRTUAL_APIC_ADDRESS] + 0x80, 1) >> 4


@rule(
    when=[_Secondary.VIRTUALIZE_X2APIC_MODE],
)
def x2apic_mode_needs_tpr_shadow(vmcs: Vmcs) -> bool:
    """ "Virtualize x2APIC mode" needs "use TPR shadow"."""
    return vmcs.on(_Primary.USE_TPR_SHADOW)


@rule(when=[_Secondary.APIC_REGISTER_VIRTUALIZATION])
def apic_register_virtualization_needs_tpr_shadow(vmcs: Vmcs) -> bool:
    """ "APIC-register virtualization" needs "use TPR shadow"."""
    return vmcs.on(_Primary.USE_TPR_SHADOW)


@rule(when=[_Secondary.VIRTUAL_INTERRUPT_DELIVERY])
def virtual_interrupt_delivery_needs_tpr_shadow(vmcs: Vmcs) -> bool:
    """ "Virtual-interrupt delivery" needs "use TPR shadow"."""
    return vmcs.on(_Primary.USE_TPR_SHADOW)


@rule(when=[_Tertiary.IPI_VIRTUALIZATION])
def ipi_virtualization_needs_tpr_shadow(vmcs: Vmcs) -> bool:
    """ "IPI virtualization" needs "use TPR shadow"."""
    return vmcs.on(_Primary.USE_TPR_SHADOW)


@rule(when=[_Secondary.VIRTUALIZE_X2APIC_MODE])
def x2apic_mode_excludes_apic_accesses(vmcs: Vmcs) -> bool:
    """ "Virtualize x2APIC mode" and "virtualize APIC accesses" are not both 1."""
    return not vmcs.on(_Secondary.VIRTUALIZE_APIC_ACCESSES)


structure_address(
    TABLE,
    Field.APIC_ACCESS_ADDRESS,
    "APIC-access address",
    when=[_Secondary.VIRTUALIZE_APIC_ACCESSES],
)


@rule(when=[_Secondary.VIRTUAL_INTERRUPT_DELIVERY])
def virtual_interrupt_delivery_needs_external_interrupt_exiting(vmcs: Vmcs) -> bool:
    """ "Virtual-interrupt delivery" needs "external-interrupt exiting"."""
    return vmcs.on(PinControls.EXTERNAL_INTERRUPT_EXITING)


@rule(when=[PinControls.PROCESS_POSTED_INTERRUPTS])
def posted_interrupts_need_virtual_interrupt_delivery(vmcs: Vmcs) -> bool:
    """ "Process posted interrupts" needs "virtual-interrupt delivery"."""
    return vmcs.on(_Secondary.VIRTUAL_INTERRUPT_DELIVERY)


@rule(when=[PinControls.PROCESS_POSTED_INTERRUPTS])
def posted_interrupts_need_acknowledge(vmcs: Vmcs) -> bool:
    """ "Process posted interrupts" needs the VM-exit control "acknowledge interrupt on exit"."""
    return vmcs.on(ExitControls.ACKNOWLEDGE_INTERRUPT_ON_EXIT)


@rule(Field.POSTED_INTERRUPT_NOTIFICATION_VECTOR, when=[PinControls.PROCESS_POSTED_INTERRUPTS])
def posted_interrupt_notification_vector(vmcs: Vmcs) -> bool:
    """The posted-interrupt notification vector is 0 to 255."""
    return vmcs[Field.POSTED_INTERRUPT_NOTIFICATION_VECTOR] <= 0xFF


structure_address(
    TABLE,
    Field.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS,
    "posted-interrupt descriptor address",
    alignment=64,
    when=[PinControls.PROCESS_POSTED_INTERRUPTS],
)
structure_address(
    TABLE,
    Field.PID_POINTER_TABLE_ADDRESS,
    "PID-pointer table address",
    alignment=8,
    when=[_Tertiary.IPI_VIRTUALIZATION],
)


@rule(
    Field.PID_POINTER_TABLE_ADDRESS,
    Field.LAST_PID_POINTER_INDEX,
    when=[_Tertiary.IPI_VIRTUALIZATION],
)
def pid_pointer_table_end(vmcs: Vmcs) -> bool:
    """The last entry of the PID-pointer table lies within the physical-address width, if the first does."""
    table = vmcs[Field.PID_POINTER_TABLE_ADDRESS]
    return not vmcs.fits(table) or vmcs.fits(table + 8 * vmcs[Field.LAST_PID_POINTER_INDEX])


# --- NMIs --------------------------------------------------------------------------------------------------


@rule(when=[PinControls.VIRTUAL_NMIS])
def virtual_nmis_need_nmi_exiting(vmcs: Vmcs) -> bool:
    """ "Virtual NMIs" needs "NMI exiting"."""
    return vmcs.on(PinControls.NMI_EXITING)


@rule(when=[_Primary.NMI_WINDOW_EXITING])
def nmi_window_exiting_needs_virtual_nmis(vmcs: Vmcs) -> bool:
    """ "NMI-window exiting" needs "virtual NMIs"."""
    return vmcs.on(PinControls.VIRTUAL_NMIS)


# --- VPID and EPT ------------------------------------------------------------------------------------------


@rule(Field.VPID, when=[_Secondary.ENABLE_VPID])
def vpid_is_not_zero(vmcs: Vmcs) -> bool:
    """The VPID is not 0."""
    return vmcs[Field.VPID] != 0


_EPT = [_Secondary.ENABLE_EPT]


@rule(Field.EPT_POINTER, when=_EPT)
def eptp_memory_type(vmcs: Vmcs) -> bool:
    """Bits 2:0 of EPTP are a memory type that IA32_VMX_EPT_VPID_CAP names (0, UC: bit 8; 6, WB: bit 14)."""
    can = vmcs.capability(lambda: vmcs.capabilities.ept_vpid)
    kind = EPTPointer.from_bits(vmcs[Field.EPT_POINTER]).memory_type
    return bool({MemoryType.UC: can.memory_type_uc, MemoryType.WB: can.memory_type_wb}.get(kind, False))  # type: ignore[call-overload]


@rule(Field.EPT_POINTER, when=_EPT)
def eptp_page_walk_length(vmcs: Vmcs) -> bool:
    """Bits 5:3 of EPTP, plus 1, are a walk length that IA32_VMX_EPT_VPID_CAP names (4: bit 6; 5: bit 7)."""
    can = vmcs.capability(lambda: vmcs.capabilities.ept_vpid)
    length = EPTPointer.from_bits(vmcs[Field.EPT_POINTER]).page_walk_length
    return bool({4: can.page_walk_length_4, 5: can.page_walk_length_5}.get(length, False))


@rule(Field.EPT_POINTER, when=_EPT)
def eptp_accessed_dirty(vmcs: Vmcs) -> bool:
    """Bit 6 of EPTP is 0 where IA32_VMX_EPT_VPID_CAP[21] is 0: no accessed and dirty flags for EPT."""
    can = vmcs.capability(lambda: vmcs.capabilities.ept_vpid.accessed_dirty)
    return can or not vmcs[Field.EPT_POINTER] & EPTPointer.ENABLE_ACCESSED_DIRTY


@rule(Field.EPT_POINTER, when=_EPT)
def eptp_supervisor_shadow_stack(vmcs: Vmcs) -> bool:
    """Bit 7 of EPTP is 0 where IA32_VMX_EPT_VPID_CAP[23] is 0: no supervisor shadow-stack control."""
    can = vmcs.capability(lambda: vmcs.capabilities.ept_vpid.supervisor_shadow_stack)
    return can or not vmcs[Field.EPT_POINTER] & EPTPointer.ENABLE_SUPERVISOR_SHADOW_STACK


@rule(Field.EPT_POINTER, when=_EPT)
def eptp_reserved(vmcs: Vmcs) -> bool:
    """Bits 11:8 of EPTP are 0."""
    return not EPTPointer.from_bits(vmcs[Field.EPT_POINTER]).reserved


@rule(Field.EPT_POINTER, when=_EPT)
def eptp_width(vmcs: Vmcs) -> bool:
    """EPTP sets no bit beyond the physical-address width."""
    return vmcs.fits(vmcs[Field.EPT_POINTER])


def _needs_ept(control: SecondaryControls | TertiaryControls, name: str, words: str) -> None:
    TABLE.add(
        f"{name}-needs-ept",
        f'"{words}" needs "enable EPT".',
        lambda vmcs: vmcs.on(_Secondary.ENABLE_EPT),
        (),
        when=[control],
    )


_needs_ept(_Secondary.ENABLE_PML, "pml", "Enable PML")
structure_address(TABLE, Field.PML_ADDRESS, "PML address", when=[_Secondary.ENABLE_PML])
_needs_ept(_Secondary.UNRESTRICTED_GUEST, "unrestricted-guest", "Unrestricted guest")
_needs_ept(
    _Secondary.MODE_BASED_EXECUTE_CONTROL_FOR_EPT,
    "mode-based-execute-control",
    "Mode-based execute control for EPT",
)
_needs_ept(
    _Secondary.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT,
    "sub-page-write-permissions",
    "Sub-page write permissions for EPT",
)
structure_address(
    TABLE,
    Field.SUB_PAGE_PERMISSION_TABLE_POINTER,
    "sub-page-permission-table pointer",
    when=[_Secondary.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT],
)


# --- VM functions, shadowing, #VE --------------------------------------------------------------------------


@rule(Field.VM_FUNCTION_CONTROLS, when=[_Secondary.ENABLE_VM_FUNCTIONS])
def vm_function_controls_reserved(vmcs: Vmcs) -> bool:
    """The VM-function controls set only bits that are 1 in IA32_VMX_VMFUNC."""
    can = vmcs.capability(lambda: vmcs.capabilities.vmfunc.raw)
    return not vmcs[Field.VM_FUNCTION_CONTROLS] & ~can


def _eptp_switching(vmcs: Vmcs) -> bool:
    return bool(vmcs[Field.VM_FUNCTION_CONTROLS] & _EPTP_SWITCHING)


@rule(Field.VM_FUNCTION_CONTROLS, when=[_Secondary.ENABLE_VM_FUNCTIONS])
def eptp_switching_needs_ept(vmcs: Vmcs) -> bool:
    """VM function 0 (EPTP switching) needs "enable EPT"."""
    return not _eptp_switching(vmcs) or vmcs.on(_Secondary.ENABLE_EPT)


@rule(Field.VM_FUNCTION_CONTROLS, Field.EPTP_LIST_ADDRESS, when=[_Secondary.ENABLE_VM_FUNCTIONS])
def eptp_list_address_alignment(vmcs: Vmcs) -> bool:
    """With VM function 0 (EPTP switching), bits 11:0 of the EPTP-list address are 0."""
    return not _eptp_switching(vmcs) or not vmcs[Field.EPTP_LIST_ADDRESS] & 0xFFF


@rule(Field.VM_FUNCTION_CONTROLS, Field.EPTP_LIST_ADDRESS, when=[_Secondary.ENABLE_VM_FUNCTIONS])
def eptp_list_address_width(vmcs: Vmcs) -> bool:
    """With VM function 0, the EPTP-list address sets no bit beyond the physical-address width."""
    return not _eptp_switching(vmcs) or vmcs.fits(vmcs[Field.EPTP_LIST_ADDRESS])


structure_address(TABLE, Field.VMREAD_BITMAP, "VMREAD-bitmap address", when=[_Secondary.VMCS_SHADOWING])
structure_address(TABLE, Field.VMWRITE_BITMAP, "VMWRITE-bitmap address", when=[_Secondary.VMCS_SHADOWING])
structure_address(
    TABLE,
    Field.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS,
    "virtualization-exception information address",
    when=[_Secondary.EPT_VIOLATION_VE],
)


# --- Intel PT, HLAT, PASID, TSC ----------------------------------------------------------------------------

_PT = [_Secondary.PT_USES_GUEST_PHYSICAL_ADDRESSES]
_needs_ept(_PT[0], "pt-guest-physical-addresses", "Intel PT uses guest physical addresses")


@rule(when=_PT)
def pt_guest_physical_addresses_need_load(vmcs: Vmcs) -> bool:
    """ "Intel PT uses guest physical addresses" needs the VM-entry control "load IA32_RTIT_CTL"."""
    return vmcs.on(EntryControls.LOAD_IA32_RTIT_CTL)


@rule(when=_PT)
def pt_guest_physical_addresses_need_clear(vmcs: Vmcs) -> bool:
    """ "Intel PT uses guest physical addresses" needs the VM-exit control "clear IA32_RTIT_CTL"."""
    return vmcs.on(ExitControls.CLEAR_IA32_RTIT_CTL)


structure_address(
    TABLE,
    Field.LOW_PASID_DIRECTORY_ADDRESS,
    "low PASID directory address",
    when=[_Secondary.PASID_TRANSLATION],
)
structure_address(
    TABLE,
    Field.HIGH_PASID_DIRECTORY_ADDRESS,
    "high PASID directory address",
    when=[_Secondary.PASID_TRANSLATION],
)


@rule(Field.TSC_MULTIPLIER, when=[_Secondary.USE_TSC_SCALING])
def tsc_multiplier_is_not_zero(vmcs: Vmcs) -> bool:
    """The TSC multiplier is not 0, on processors that demand it."""
    # The chapter's list has no such sentence that could be found; Bochs demands it, KVM does not.
    if vmcs[Field.TSC_MULTIPLIER] == 0:
        raise NotChecked("whether the processor takes a TSC multiplier of 0 is not known")
    return True


_HLAT = [_Tertiary.ENABLE_HLAT]
_needs_ept(_Tertiary.ENABLE_HLAT, "hlat", "Enable HLAT")
_needs_ept(_Tertiary.EPT_PAGING_WRITE_CONTROL, "ept-paging-write-control", "EPT paging-write control")
_needs_ept(_Tertiary.GUEST_PAGING_VERIFICATION, "guest-paging-verification", "Guest-paging verification")


@rule(Field.HLAT_POINTER, when=_HLAT)
def hlat_pointer_reserved(vmcs: Vmcs) -> bool:
    """Bits 2:0 and 11:5 of the HLAT pointer are 0."""
    return not vmcs[Field.HLAT_POINTER] & 0xFE7


@rule(Field.HLAT_POINTER, when=_HLAT)
def hlat_pointer_width(vmcs: Vmcs) -> bool:
    """The HLAT pointer sets no bit beyond the physical-address width."""
    return vmcs.fits(vmcs[Field.HLAT_POINTER])


@rule(Field.HLAT_PREFIX_SIZE, when=_HLAT)
def hlat_prefix_size(vmcs: Vmcs) -> bool:
    """The HLAT prefix size is at most what IA32_VMX_EPT_VPID_CAP[53:48] says."""
    limit = vmcs.capability(lambda: vmcs.capabilities.ept_vpid.max_hlat_prefix_size)
    return vmcs[Field.HLAT_PREFIX_SIZE] <= limit
