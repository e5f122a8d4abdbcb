"""A dump as KVM prints it, made of field values: the words and widths are those of Linux 6.x."""

from __future__ import annotations

from collections.abc import Mapping

from vmxlab import Field


def _segment(name: str, fields: Mapping[Field, int]) -> str:
    parts = [fields[Field[f"GUEST_{name}_{part}"]] for part in ("SELECTOR", "ACCESS_RIGHTS", "LIMIT", "BASE")]
    label = f"{name}:".ljust(5)
    return (
        f"{label}sel=0x{parts[0]:04x}, attr=0x{parts[1]:05x}, limit=0x{parts[2]:08x}, base=0x{parts[3]:016x}"
    )


def _table(name: str, fields: Mapping[Field, int]) -> str:
    limit, base = fields[Field[f"GUEST_{name}_LIMIT"]], fields[Field[f"GUEST_{name}_BASE"]]
    return f"{name}:                           limit=0x{limit:08x}, base=0x{base:016x}"


def kvm_dump(fields: Mapping[Field, int], *, cpu: int = 0) -> list[str]:
    """The lines, without what the kernel log puts before each."""
    f = {field.name: fields.get(field, 0) for field in Field}
    return [
        f"VMCS 00000000f971be22, last attempted VM-entry on CPU {cpu}",
        "*** Guest State ***",
        f"CR0: actual=0x{f['GUEST_CR0']:016x}, shadow=0x{f['CR0_READ_SHADOW']:016x}, "
        f"gh_mask={f['CR0_GUEST_HOST_MASK']:016x}",
        f"CR4: actual=0x{f['GUEST_CR4']:016x}, shadow=0x{f['CR4_READ_SHADOW']:016x}, "
        f"gh_mask={f['CR4_GUEST_HOST_MASK']:016x}",
        f"CR3 = 0x{f['GUEST_CR3']:016x}",
        f"PDPTR0 = 0x{f['GUEST_PDPTE0']:016x}  PDPTR1 = 0x{f['GUEST_PDPTE1']:016x}",
        f"PDPTR2 = 0x{f['GUEST_PDPTE2']:016x}  PDPTR3 = 0x{f['GUEST_PDPTE3']:016x}",
        f"RSP = 0x{f['GUEST_RSP']:016x}  RIP = 0x{f['GUEST_RIP']:016x}",
        f"RFLAGS=0x{f['GUEST_RFLAGS']:08x}         DR7 = 0x{f['GUEST_DR7']:016x}",
        f"Sysenter RSP={f['GUEST_IA32_SYSENTER_ESP']:016x} "
        f"CS:RIP={f['GUEST_IA32_SYSENTER_CS']:04x}:{f['GUEST_IA32_SYSENTER_EIP']:016x}",
        *(_segment(name, fields) for name in ("CS", "DS", "SS", "ES", "FS", "GS")),
        _table("GDTR", fields),
        _segment("LDTR", fields),
        _table("IDTR", fields),
        _segment("TR", fields),
        f"EFER= 0x{f['GUEST_IA32_EFER']:016x}",
        f"DebugCtl = 0x{f['GUEST_IA32_DEBUGCTL']:016x}  "
        f"DebugExceptions = 0x{f['GUEST_PENDING_DEBUG_EXCEPTIONS']:016x}",
        f"Interruptibility = {f['GUEST_INTERRUPTIBILITY_STATE']:08x}  "
        f"ActivityState = {f['GUEST_ACTIVITY_STATE']:08x}",
        f"S_CET = 0x{f['GUEST_IA32_S_CET']:016x}, SSP = 0x{f['GUEST_SSP']:016x}, "
        f"SSP TABLE = 0x{f['GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR']:016x}",
        "MSR guest autoload:",
        "   0: msr=0x00000600 value=0x0000000000000000",
        "*** Host State ***",
        f"RIP = 0x{f['HOST_RIP']:016x}  RSP = 0x{f['HOST_RSP']:016x}",
        " ".join(
            f"{name}={f[f'HOST_{name}_SELECTOR']:04x}" for name in ("CS", "SS", "DS", "ES", "FS", "GS", "TR")
        ),
        f"FSBase={f['HOST_FS_BASE']:016x} GSBase={f['HOST_GS_BASE']:016x} TRBase={f['HOST_TR_BASE']:016x}",
        f"GDTBase={f['HOST_GDTR_BASE']:016x} IDTBase={f['HOST_IDTR_BASE']:016x}",
        f"CR0={f['HOST_CR0']:016x} CR3={f['HOST_CR3']:016x} CR4={f['HOST_CR4']:016x}",
        f"Sysenter RSP={f['HOST_IA32_SYSENTER_ESP']:016x} "
        f"CS:RIP={f['HOST_IA32_SYSENTER_CS']:04x}:{f['HOST_IA32_SYSENTER_EIP']:016x}",
        f"EFER= 0x{f['HOST_IA32_EFER']:016x}",
        "*** Control State ***",
        f"CPUBased=0x{f['PRIMARY_PROCESSOR_BASED_CONTROLS']:08x} "
        f"SecondaryExec=0x{f['SECONDARY_PROCESSOR_BASED_CONTROLS']:08x} TertiaryExec=0x{0:016x}",
        f"PinBased=0x{f['PIN_BASED_CONTROLS']:08x} EntryControls={f['ENTRY_CONTROLS']:08x} "
        f"ExitControls={f['EXIT_CONTROLS']:08x}",
        f"ExceptionBitmap={f['EXCEPTION_BITMAP']:08x} PFECmask={f['PAGE_FAULT_ERROR_CODE_MASK']:08x} "
        f"PFECmatch={f['PAGE_FAULT_ERROR_CODE_MATCH']:08x}",
        f"VMEntry: intr_info={f['ENTRY_INTERRUPTION_INFORMATION']:08x} "
        f"errcode={f['ENTRY_EXCEPTION_ERROR_CODE']:08x} ilen={f['ENTRY_INSTRUCTION_LENGTH']:08x}",
        "VMExit: intr_info=00000000 errcode=00000000 ilen=00000003",
        "        reason=80000021 qualification=0000000000000000",
        "IDTVectoring: info=00000000 errcode=00000000",
        f"TSC Offset = 0x{f['TSC_OFFSET']:016x}",
        f"EPT pointer = 0x{f['EPT_POINTER']:016x}",
    ]
