"""The shadow-VMCS indicator, and VMREAD and VMWRITE in L2 with and without VMCS shadowing.

SDM Vol. 3C, 25.2 (bit 31 of a VMCS region), 25.10 (ordinary and shadow VMCSs), 26.1.3 (which VMREADs and
VMWRITEs exit), 27.1 and 27.3.1.5 (VM entry).
"""

from __future__ import annotations

import pytest

from vmxlab import Case, End, ExitReason, Field, InstructionError, OutcomeKind, SecondaryControls, VmxRegion
from vmxlab.cases.steps import STANDARD, Enter, Vmclear, Vmptrld, Vmptrst, Vmread, Vmwrite, Vmxon, WriteVmcs
from vmxlab.image.layout import FREE_PAGES, SHADOW_VMCS_REGION, VMCS_REGION
from vmxlab.sdm.registers import RFLAGS

SHADOWING = SecondaryControls.VMCS_SHADOWING
EXIT_FOR_EVERY_FIELD = b"\xff" * 4096

LINK_POINTER_INVALID = 4
"""The exit qualification of an entry that failed for its VMCS link pointer (SDM Vol. 3C, 27.8)."""

FILL_SHADOW = (
    Vmxon(),
    Vmclear(region=SHADOW_VMCS_REGION),
    Vmptrld(region=SHADOW_VMCS_REGION),
    Vmwrite(Field.GUEST_RIP, 0x1122_3344_5566_7788),
    Vmwrite(Field.GUEST_ES_SELECTOR, 0x1234),
    Vmwrite(Field.EXCEPTION_BITMAP, 0x89AB_CDEF),
    Vmwrite(Field.TSC_OFFSET, 0xFEDC_BA98_7654_3210),
    Vmclear(region=SHADOW_VMCS_REGION),
)
"""Make a shadow VMCS the current one for a moment, and write to it, as SDM Vol. 3C, 25.10 allows."""

ENTER = (Vmclear(), Vmptrld(), WriteVmcs(), Enter())


def revision(vmxlab) -> int:
    return vmxlab.capabilities.basic.revision_id


def without(*fields: int) -> bytes:
    """A bitmap in which every field exits but these."""
    bitmap = bytearray(EXIT_FOR_EVERY_FIELD)
    for field in fields:
        bitmap[field >> 3] &= ~(1 << (field & 7))
    return bytes(bitmap)


def only(*fields: int) -> bytes:
    """A bitmap in which only these fields exit."""
    return bytes(byte ^ 0xFF for byte in without(*fields))


# --- the indicator in VMX root operation -------------------------------------------------------------------


def test_vmptrld_of_a_shadow_vmcs_needs_vmcs_shadowing(vmxlab):
    """Vol. 3C, 31.3, VMPTRLD: with bit 31 set VMfail(11), unless the processor has "VMCS shadowing"."""
    steps = (*STANDARD[:3], Vmptrld(region=SHADOW_VMCS_REGION, go_on=True), Vmptrst())
    run = vmxlab.run(
        Case(steps=steps, memory={SHADOW_VMCS_REGION: VmxRegion(revision(vmxlab), shadow=True).to_bytes()})
    )
    load, pointer = run.outcomes[-2:]
    if vmxlab.capabilities.supports(SHADOWING):
        assert load.kind is OutcomeKind.SUCCEED
        assert pointer.value == SHADOW_VMCS_REGION
    else:
        assert load.kind is OutcomeKind.FAIL_VALID
        assert load.error is InstructionError.VMPTRLD_INCORRECT_REVISION_ID
        assert pointer.value == VMCS_REGION


def test_a_wrong_revision_is_refused_with_the_shadow_bit_too(vmxlab):
    """Vol. 3C, 31.3, VMPTRLD: bits 30:0 must be the processor's identifier for a shadow VMCS as well."""
    region = VmxRegion(revision(vmxlab) ^ 1, shadow=True)
    steps = (*STANDARD[:3], Vmptrld(region=FREE_PAGES))
    run = vmxlab.run(Case(steps=steps, memory={FREE_PAGES: region.to_bytes()}))
    assert run.outcomes[-1].error is InstructionError.VMPTRLD_INCORRECT_REVISION_ID


@pytest.mark.vmx_needs(SHADOWING)
def test_a_current_shadow_vmcs_can_be_read_and_written(vmxlab):
    """Vol. 3C, 25.10: VMREAD and VMWRITE work on a current shadow VMCS, and VMCLEAR keeps its data."""
    reads = [Vmread(step.field) for step in FILL_SHADOW if isinstance(step, Vmwrite)]
    run = vmxlab.run(Case(shadow_vmcs=True, steps=(*FILL_SHADOW, Vmptrld(region=SHADOW_VMCS_REGION), *reads)))
    written = [step.value for step in FILL_SHADOW if isinstance(step, Vmwrite)]
    assert [outcome.value for outcome in run.outcomes if outcome.operation == "vmread"] == written
    assert run.end is End.DONE


@pytest.mark.vmx_needs(SHADOWING)
@pytest.mark.vmx_known_difference("vm-entry-with-shadow-vmcs")
@pytest.mark.parametrize("resume", [False, True], ids=["vmlaunch", "vmresume"])
def test_vm_entry_with_a_shadow_vmcs_fails_invalid(vmxlab, resume):
    """Vol. 3C, 27.1: VM entry ends with CF set where the current VMCS is a shadow VMCS."""
    region = VmxRegion(revision(vmxlab), shadow=True)
    run = vmxlab.run(Case(vmcs_region=region, steps=(*STANDARD[:-1], Enter(resume=resume))))
    assert run.entry is not None
    assert run.entry.kind is OutcomeKind.FAIL_INVALID
    assert run.exits == ()


# --- the link pointer --------------------------------------------------------------------------------------


@pytest.mark.vmx_needs(SHADOWING)
@pytest.mark.parametrize(("shadow", "control"), [(True, False), (False, True), (False, False), (True, True)])
def test_the_link_pointers_shadow_bit_must_equal_the_control(vmxlab, shadow, control):
    """Vol. 3C, 27.3.1.5: bit 31 of the linked VMCS must be the setting of the "VMCS shadowing" control."""
    run = vmxlab.run(
        Case(
            enable=SHADOWING if control else (),
            fields={Field.VMCS_LINK_POINTER: FREE_PAGES},
            memory={FREE_PAGES: VmxRegion(revision(vmxlab), shadow=shadow).to_bytes()},
        )
    )
    if shadow is control:
        assert run.reasons == [ExitReason.HLT]
    else:
        assert [exit_.full_reason for exit_ in run.exits] == [0x8000_0021]
        assert run.exits[0].raw_qualification == LINK_POINTER_INVALID


def test_a_link_pointer_that_can_not_be_fails_the_entry(vmxlab):
    """Vol. 3C, 27.3.1.5 and 27.8: alignment, width, and revision are checked; qualification 4."""
    region = VmxRegion(revision(vmxlab)).to_bytes()
    wrong = VmxRegion(revision(vmxlab) ^ 1).to_bytes()
    pointers = {
        "misaligned": (FREE_PAGES + 8, region),
        "bit 0": (FREE_PAGES + 1, region),
        "too wide": (FREE_PAGES | 1 << vmxlab.lab.target.physical_address_width, region),
        "wrong revision": (FREE_PAGES, wrong),
        "all ones but bit 0": ((1 << 64) - 2, region),
    }
    for name, (pointer, content) in pointers.items():
        case = Case(fields={Field.VMCS_LINK_POINTER: pointer}, memory={FREE_PAGES: content})
        run = vmxlab.run(case)
        assert [exit_.full_reason for exit_ in run.exits] == [0x8000_0021], name
        assert run.exits[0].raw_qualification == LINK_POINTER_INVALID, name


@pytest.mark.vmx_known_difference("kvm-link-pointer-to-the-current-vmcs")
def test_a_link_pointer_to_the_current_vmcs_fails_the_entry(vmxlab):
    """Vol. 3C, 27.3.1.5 and 27.8: outside SMM it must not contain the current-VMCS pointer."""
    run = vmxlab.run(Case(fields={Field.VMCS_LINK_POINTER: VMCS_REGION}))
    assert [exit_.full_reason for exit_ in run.exits] == [0x8000_0021]
    assert run.exits[0].raw_qualification == LINK_POINTER_INVALID


@pytest.mark.vmx_needs(SHADOWING)
@pytest.mark.parametrize("field", [Field.VMREAD_BITMAP, Field.VMWRITE_BITMAP], ids=lambda field: field.name)
def test_bitmap_addresses_are_checked_with_shadowing_alone(vmxlab, field):
    """Vol. 3C, 27.2.1.1: with "VMCS shadowing" a misaligned or too wide bitmap address is VMfail(7)."""
    for address in (FREE_PAGES + 8, FREE_PAGES | 1 << vmxlab.lab.target.physical_address_width):
        run = vmxlab.run(Case(enable=SHADOWING, fields={field: address}))
        assert run.entry is not None
        assert run.entry.error is InstructionError.ENTRY_INVALID_CONTROL_FIELDS
        assert vmxlab.run(Case(fields={field: address})).reasons == [ExitReason.HLT]


# --- VMREAD and VMWRITE in L2 ------------------------------------------------------------------------------

READ_AND_WRITE = f"""
    mov ecx, {Field.GUEST_RIP:#x}
    vmread rax, rcx
    mov ecx, {Field.GUEST_RSP:#x}
    vmwrite rcx, rbx
    hlt
"""


def test_without_shadowing_every_vmread_and_vmwrite_exits(vmxlab):
    """Vol. 3C, 26.1.3: VMREAD and VMWRITE exit where "VMCS shadowing" is 0, whatever the bitmaps say."""
    clear = bytes(4096)
    bitmaps = {}
    if vmxlab.capabilities.supports(SHADOWING):
        bitmaps = {"vmread_bitmap": clear, "vmwrite_bitmap": clear}
    run = vmxlab.run(Case(program=READ_AND_WRITE, registers={"rax": 0x77}, **bitmaps))
    assert run.reasons == [ExitReason.VMREAD, ExitReason.VMWRITE, ExitReason.HLT]
    assert run.exits[-1].registers["rax"] == 0x77


@pytest.mark.vmx_needs(SHADOWING)
def test_l2_reads_and_writes_the_shadow_vmcs(vmxlab):
    """Vol. 3C, 25.10 and 31.3: where the bitmap bits are clear, VMREAD and VMWRITE reach the linked VMCS."""
    written = {
        Field.GUEST_RSP: 0x0123_4567_89AB_CDEF,
        Field.GUEST_ES_LIMIT: 0xDEAD_BEEF,
        Field.TSC_OFFSET: 0x0F0F_F0F0_3C3C_C3C3,
        Field.GUEST_SS_SELECTOR: 0xCAFE,
    }
    program = f"""
        mov ecx, {Field.GUEST_RIP:#x};         vmread r8, rcx;  pushf; pop r12
        mov ecx, {Field.GUEST_ES_SELECTOR:#x}; vmread r9, rcx
        mov ecx, {Field.EXCEPTION_BITMAP:#x};  vmread [DATA], rcx
        mov ecx, {Field.TSC_OFFSET:#x};        vmread [DATA + 8], rcx
        mov r10, [DATA]
        mov r11, [DATA + 8]
        mov ecx, {Field.GUEST_RSP:#x};         mov rdx, {written[Field.GUEST_RSP]:#x}; vmwrite rcx, rdx
        pushf; pop r13
        mov ecx, {Field.GUEST_ES_LIMIT:#x};    mov edx, {written[Field.GUEST_ES_LIMIT]:#x}; vmwrite rcx, rdx
        mov ecx, {Field.TSC_OFFSET:#x};        mov rdx, {written[Field.TSC_OFFSET]:#x}
        mov [DATA + 16], rdx;                  vmwrite rcx, [DATA + 16]
        mov ecx, {Field.GUEST_SS_SELECTOR:#x}; mov edx, {written[Field.GUEST_SS_SELECTOR]:#x}
        vmwrite rcx, rdx
        hlt
    """
    steps = (*FILL_SHADOW, *ENTER, Vmclear(), Vmptrld(region=SHADOW_VMCS_REGION))
    run = vmxlab.run(
        Case(
            program=program,
            shadow_vmcs=True,
            enable=SHADOWING,
            watch=[Field.GUEST_ES_LIMIT, Field.TSC_OFFSET, Field.GUEST_SS_SELECTOR],
            steps=(*steps, *(Vmread(field) for field in written)),
        )
    )
    assert run.reasons == [ExitReason.HLT]
    registers = run.exits[0].registers
    read = {name: registers[name] for name in ("r8", "r9", "r10", "r11")}
    assert read == {
        "r8": 0x1122_3344_5566_7788,
        "r9": 0x1234,
        "r10": 0x89AB_CDEF,
        "r11": 0xFEDC_BA98_7654_3210,
    }
    assert (registers["r12"], registers["r13"]) == (RFLAGS.FIXED1, RFLAGS.FIXED1)  # VMsucceed
    shadow = {outcome.field: outcome.value for outcome in run.outcomes if outcome.operation == "vmread"}
    assert shadow == written
    # L2's own VMCS is not what it wrote to.
    assert all(run.exits[0].watched[field] != written[field] for field in run.exits[0].watched)


@pytest.mark.vmx_needs(SHADOWING)
def test_each_bit_of_the_bitmaps_decides_for_its_field(vmxlab):
    """Vol. 3C, 26.1.3: bit n of the VMREAD (VMWRITE) bitmap makes it exit for the field numbered n."""
    fields = (Field.VPID, Field.GUEST_ES_SELECTOR, Field.TSC_OFFSET, Field.TSC_OFFSET | 1, Field.GUEST_RIP)
    accesses = "; ".join(f"mov ecx, {field:#x}; vmread rax, rcx; vmwrite rcx, rax" for field in fields)
    for field in fields:
        for reads, writes in ((only(field), bytes(4096)), (bytes(4096), only(field))):
            run = vmxlab.run(
                Case(
                    program=f"{accesses}; hlt",
                    shadow_vmcs=True,
                    enable=SHADOWING,
                    vmread_bitmap=reads,
                    vmwrite_bitmap=writes,
                )
            )
            reason = ExitReason.VMREAD if reads != bytes(4096) else ExitReason.VMWRITE
            assert run.reasons == [reason, ExitReason.HLT], (field, reason)
            assert run.exits[0].registers["rcx"] == field


@pytest.mark.vmx_needs(SHADOWING)
def test_a_clear_bit_lets_one_field_through(vmxlab):
    """Vol. 3C, 26.1.3: with all bits set but one, that field alone does not exit."""
    run = vmxlab.run(
        Case(
            program=f"mov ecx, {Field.GUEST_RSP:#x}; vmread rax, rcx; vmwrite rcx, rax; {READ_AND_WRITE}",
            shadow_vmcs=True,
            enable=SHADOWING,
            vmread_bitmap=without(Field.GUEST_RIP),
            vmwrite_bitmap=without(Field.GUEST_RSP),
            steps=(*FILL_SHADOW, *ENTER),
        )
    )
    assert run.reasons == [ExitReason.VMREAD, ExitReason.HLT]
    assert run.exits[-1].registers["rax"] == 0x1122_3344_5566_7788


@pytest.mark.vmx_needs(SHADOWING)
@pytest.mark.parametrize("bit", [15, 31, 32, 63])
def test_an_encoding_beyond_15_bits_always_exits(vmxlab, bit):
    """Vol. 3C, 26.1.3: in 64-bit mode VMREAD and VMWRITE exit where bits 63:15 of the encoding are not 0."""
    run = vmxlab.run(
        Case(
            program="vmread rax, rcx; vmwrite rcx, rax; hlt",
            registers={"rcx": Field.GUEST_RIP | 1 << bit},
            shadow_vmcs=True,
            enable=SHADOWING,
        )
    )
    assert run.reasons == [ExitReason.VMREAD, ExitReason.VMWRITE, ExitReason.HLT]


FLAGS_OF_FAILURE = RFLAGS.CF | RFLAGS.PF | RFLAGS.AF | RFLAGS.ZF | RFLAGS.SF | RFLAGS.OF


@pytest.mark.vmx_needs(SHADOWING)
def test_l2s_accesses_fail_invalid_without_a_link_pointer(vmxlab):
    """Vol. 3C, 31.3: in L2, VMREAD and VMWRITE are VMfailInvalid where the VMCS link pointer is all ones."""
    run = vmxlab.run(
        Case(
            program="vmread rax, rcx; pushf; pop r8; vmwrite rcx, rax; pushf; pop r9; hlt",
            registers={"rcx": Field.GUEST_RIP, "rax": 0x55},
            enable=SHADOWING,
        )
    )
    assert run.reasons == [ExitReason.HLT]
    registers = run.exits[0].registers
    assert registers["r8"] & FLAGS_OF_FAILURE == RFLAGS.CF
    assert registers["r9"] & FLAGS_OF_FAILURE == RFLAGS.CF
    assert registers["rax"] == 0x55


@pytest.mark.vmx_needs(SHADOWING)
def test_l2s_accesses_to_an_unsupported_field_fail_valid(vmxlab):
    """Vol. 3C, 31.3: in L2, VMREAD and VMWRITE of what is no field set ZF, and leave the operand alone."""
    run = vmxlab.run(
        Case(
            program="vmread rax, rcx; pushf; pop r8; vmwrite rcx, rax; pushf; pop r9; hlt",
            registers={"rcx": 0x7FFE, "rax": 0x55},
            shadow_vmcs=True,
            enable=SHADOWING,
        )
    )
    assert run.reasons == [ExitReason.HLT]
    registers = run.exits[0].registers
    assert registers["r8"] & FLAGS_OF_FAILURE == RFLAGS.ZF
    assert registers["r9"] & FLAGS_OF_FAILURE == RFLAGS.ZF
    assert registers["rax"] == 0x55
