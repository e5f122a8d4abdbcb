"""Unrestricted guest: L2 without paging or protection, and between the modes (SDM Vol. 3C, 26.6)."""

from __future__ import annotations

import struct

import pytest

from vmxlab import Case, EntryControls, ExitReason, Field, Mode, PrimaryControls, SecondaryControls, guest_ept
from vmxlab.cases.memory import DATA, PROGRAM, STACK_TOP
from vmxlab.image.layout import FREE_PAGES
from vmxlab.sdm.registers import CR0, CR4, EFER, RFLAGS, Vector

S = SecondaryControls
pytestmark = pytest.mark.vmx_needs(S.UNRESTRICTED_GUEST)

NO_CR3_EXITS = (PrimaryControls.CR3_LOAD_EXITING, PrimaryControls.CR3_STORE_EXITING)
WATCH = [Field.GUEST_CR0, Field.GUEST_CS_SELECTOR, Field.GUEST_CS_BASE, Field.GUEST_CS_ACCESS_RIGHTS]


def cr0_of(vmxlab, *, paging: bool, protection: bool = True) -> int:
    cr0 = CR0.ET | CR0.NE | vmxlab.capabilities.cr0_fixed0
    cr0 = cr0 & ~(CR0.PE | CR0.PG) | (CR0.PE if protection else 0) | (CR0.PG if paging else 0)
    return int(cr0)


def flat_case(vmxlab, program: str, **more) -> Case:
    """32-bit protected mode without paging."""
    fields = {Field.GUEST_CR0: cr0_of(vmxlab, paging=False), **more.pop("fields", {})}
    return Case(
        program=program,
        mode=Mode.PROTECTED,
        enable=S.UNRESTRICTED_GUEST,
        disable=NO_CR3_EXITS,
        fields=fields,
        **more,
    )


# --- paging off --------------------------------------------------------------------------------------------


def test_protected_mode_without_paging(vmxlab):
    """Vol. 3C, 26.6 and 29.3.1: with CR0.PG 0 a linear address is a guest-physical one, for EPT."""
    far = 0x8000_0000  # no page table of the baseline reaches it
    ept = guest_ept()
    ept.map(far, FREE_PAGES)
    case = flat_case(
        vmxlab,
        f"mov eax, [{far:#x}]; mov ebx, cr0; hlt",
        ept=ept,
        memory={FREE_PAGES: b"\x78\x56\x34\x12"},
        watch=WATCH,
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rax"] == 0x1234_5678
    assert run.exits[0].registers["rbx"] & 0x8000_0001 == 1
    assert run.exits[0].watched[Field.GUEST_CR0] == cr0_of(vmxlab, paging=False)


def test_an_ept_violation_without_paging(vmxlab):
    """Vol. 3C, 28.2.1: the guest-linear address is that of the access, the physical one too."""
    run = vmxlab.run(flat_case(vmxlab, "nop; mov [0x80000123], al"))
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    violation = run.exits[0]
    assert (violation.guest_linear_address, violation.guest_physical_address) == (0x8000_0123, 0x8000_0123)
    q = violation.qualification
    assert (q.read, q.write, q.guest_linear_valid, q.translated) == (False, True, True, True)
    assert violation.rip == PROGRAM + 1


def test_vm_entry_without_paging_needs_the_control(vmxlab):
    """Vol. 3C, 27.3.1.1: with "unrestricted guest" 0, CR0.PG and CR0.PE must be 1: reason 33."""
    for protection in (True, False):
        fields = {Field.GUEST_CR0: cr0_of(vmxlab, paging=False, protection=protection)}
        run = vmxlab.run(Case(mode=Mode.PROTECTED, disable=S.UNRESTRICTED_GUEST, fields=fields))
        assert run.exits[0].entry_failed
        assert run.exits[0].reason is ExitReason.ENTRY_FAILURE_GUEST_STATE
        assert run.exits[0].raw_qualification == 0


def test_paging_without_protection_is_refused(vmxlab):
    """Vol. 3C, 27.3.1.1: if bit 31 of CR0 is 1, bit 0 must be too."""
    fields = {Field.GUEST_CR0: cr0_of(vmxlab, paging=True, protection=False)}
    run = vmxlab.run(Case(mode=Mode.PROTECTED, enable=S.UNRESTRICTED_GUEST, fields=fields))
    assert run.exits[0].entry_failed
    assert run.exits[0].reason is ExitReason.ENTRY_FAILURE_GUEST_STATE


# --- between the modes -------------------------------------------------------------------------------------


def test_l2_turns_paging_on_and_off(vmxlab):
    """Vol. 3C, 26.3 and 26.6: MOV to CR0 may change PG and PE, which are not fixed for such a guest."""
    program = (
        "mov eax, cr0; bts eax, 31; mov cr0, eax; vmcall; mov ebx, [DATA]; "
        "btr eax, 31; mov cr0, eax; vmcall; mov ecx, [DATA]; hlt"
    )
    run = vmxlab.run(flat_case(vmxlab, program, data={DATA: b"\x55\0\0\0"}, watch=WATCH))
    assert run.reasons == [ExitReason.VMCALL, ExitReason.VMCALL, ExitReason.HLT]
    assert [bool(exit_.watched[Field.GUEST_CR0] & CR0.PG) for exit_ in run.exits] == [True, False, False]
    assert (run.exits[2].registers["rbx"], run.exits[2].registers["rcx"]) == (0x55, 0x55)


def test_l2_goes_from_real_to_protected_mode(vmxlab):
    """Vol. 3C, 26.6 and Vol. 3A, 10.9.1: LGDT, CR0.PE, a far jump: CS as the descriptor has it."""
    gdt = 0x7000
    code = struct.pack("<HI", 0x27, gdt)
    descriptors = struct.pack("<5Q", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0, 0)
    target = 0x7100
    run = vmxlab.run(
        Case(
            program="lgdt [0x6f00]; mov eax, cr0; or al, 1; mov cr0, eax; vmcall; "
            ".byte 0xea; .word 0x7100, 8",
            mode=Mode.REAL,
            # mov ax, 10h; mov ds, ax; mov ebx, [10000h]; hlt
            data={
                0x6F00: code,
                gdt: descriptors,
                target: bytes.fromhex("66 b8 10 00 8e d8 8b 1d 00 00 01 00 f4"),
                DATA: b"\x78\x56\x34\x12",
            },
            watch=WATCH,
        )
    )
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    assert run.exits[0].watched[Field.GUEST_CR0] & CR0.PE
    assert run.exits[0].watched[Field.GUEST_CS_BASE] == 0
    assert run.exits[1].registers["rbx"] == 0x1234_5678
    assert run.exits[1].watched[Field.GUEST_CS_SELECTOR] == 8
    assert run.exits[1].watched[Field.GUEST_CS_ACCESS_RIGHTS] == 0xC09B
    assert run.exits[1].rip == target + 12


def test_l2_goes_into_ia_32e_mode(vmxlab):
    """Vol. 3C, 26.3 and 28.3.1: with LME set MOV to CR0 sets LMA; the exit saves it in the entry control."""
    vmxlab.require(EntryControls.LOAD_IA32_EFER)
    tables = {0x18000: 0x19003, 0x19000: 0x1A003, 0x1A000: 0x83}
    fields = {
        Field.GUEST_CR3: 0x18000,
        Field.GUEST_CR4: int(CR4.PAE | vmxlab.capabilities.cr4_fixed0),
        Field.GUEST_IA32_EFER: int(EFER.LME),
    }
    run = vmxlab.run(
        flat_case(
            vmxlab,
            "mov eax, cr0; bts eax, 31; mov cr0, eax; vmcall; hlt",
            fields=fields,
            data={at: struct.pack("<Q", value) for at, value in tables.items()},
            watch=[Field.GUEST_IA32_EFER, Field.ENTRY_CONTROLS, Field.GUEST_CR0],
        )
    )
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    first = run.exits[0].watched
    assert EFER(first[Field.GUEST_IA32_EFER]) & (EFER.LMA | EFER.LME) == EFER.LMA | EFER.LME
    if vmxlab.capabilities.misc.stores_efer_lma:
        assert first[Field.ENTRY_CONTROLS] & EntryControls.IA32E_MODE_GUEST


# --- real mode ---------------------------------------------------------------------------------------------


def test_interrupts_in_real_mode_use_the_vector_table(vmxlab):
    """Vol. 3B, 21.1.4: INT n takes CS:IP from address 4n, and pushes FLAGS, CS, IP as words."""
    run = vmxlab.run(
        Case(
            program="nop; int 0x40; hlt",
            mode=Mode.REAL,
            data={0x40 * 4: struct.pack("<HH", 0x100, 0x700), 0x7100: bytes.fromhex("58 5b 59 f4")},
        )
    )
    assert run.reasons == [ExitReason.HLT]
    registers = run.exits[0].registers
    assert (registers["rax"], registers["rbx"], registers["rcx"]) == (PROGRAM + 3, 0, 2)
    assert registers["rsp"] == STACK_TOP


@pytest.mark.vmx_known_difference("error-code-in-real-mode")
def test_an_exception_in_real_mode_has_no_error_code(vmxlab):
    """Vol. 3C, 28.2.2: real-mode exceptions have no error code: bit 11 is clear for #GP of a bad offset."""
    run = vmxlab.run(Case(program="nop; mov eax, [0xfffe]", mode=Mode.REAL))
    assert run.reasons == [ExitReason.EXCEPTION_OR_NMI]
    assert run.exits[0].interruption.vector == Vector.GP
    assert not run.exits[0].interruption.error_code_valid
    assert run.exits[0].rip == PROGRAM + 1


def test_virtual_8086_mode(vmxlab):
    """Vol. 3C, 27.3.1.2 and Vol. 3B, 21.2: RFLAGS.VM with segments as 27.3.1.2 wants them; HLT is #GP(0)."""
    fields = {Field.GUEST_RFLAGS: int(RFLAGS.VM | RFLAGS.FIXED1)}
    for name in ("ES", "CS", "SS", "DS", "FS", "GS"):
        fields |= {
            Field[f"GUEST_{name}_SELECTOR"]: 0,
            Field[f"GUEST_{name}_BASE"]: 0,
            Field[f"GUEST_{name}_LIMIT"]: 0xFFFF,
            Field[f"GUEST_{name}_ACCESS_RIGHTS"]: 0xF3,
        }
    user_pages = struct.pack("<I", 0x87)
    run = vmxlab.run(
        Case(
            program=bytes.fromhex("90 0f a2 b8 34 12 f4"),  # nop; cpuid; mov ax, 1234h; hlt
            mode=Mode.PROTECTED,
            data={0x18000: user_pages},
            fields={**fields, Field.GUEST_CR3: 0x18000},
        )
    )
    assert run.reasons == [ExitReason.CPUID, ExitReason.EXCEPTION_OR_NMI]
    assert run.exits[0].rip == PROGRAM + 1
    assert run.exits[1].interruption.vector == Vector.GP
    assert run.exits[1].interruption_error_code == 0
    assert run.exits[1].registers["rax"] & 0xFFFF == 0x1234
    assert run.exits[1].rflags & RFLAGS.VM
