"""VMX instructions in VMX root operation: each one's success, VMfailInvalid, VMfailValid(number) and faults.

SDM Vol. 3C, chapter 31: 31.2 the conventions, 31.3 each instruction, 31.4 the error numbers. INVEPT and
INVVPID have a file of their own, test_invept_invvpid.py.
"""

from __future__ import annotations

import pytest

from vmxlab import Case, End, Field, OutcomeKind, VmxRegion
from vmxlab import InstructionError as Error
from vmxlab.cases.steps import (
    Enter,
    Invept,
    Invvpid,
    SetCr0,
    SetCr4,
    Step,
    Vmcall,
    Vmclear,
    Vmptrld,
    Vmptrst,
    Vmread,
    Vmwrite,
    Vmxoff,
    Vmxon,
)
from vmxlab.image.layout import FREE_PAGES, VMCS_REGION, VMXON_REGION
from vmxlab.sdm.fields import FieldType, FieldWidth, encode
from vmxlab.sdm.registers import CR0, CR4, Vector

from .instruction_outcomes import WITH_VMCS, fails_invalid, fails_valid, faults, last, steps, succeeds

NO_VMCS = (1 << 64) - 1
"""What VMPTRST stores where there is no current VMCS."""

UNSUPPORTED_FIELD = 0xFFFF
"""An encoding with reserved bits set, which no processor has a field for."""


def too_wide(vmxlab, address: int) -> int:
    """`address` with the lowest bit set that the processor's physical addresses lack."""
    if vmxlab.capabilities.basic.is_32bit_address:
        return address | 1 << 32
    return address | 1 << vmxlab.lab.target.physical_address_width


def revision(vmxlab) -> int:
    return vmxlab.capabilities.basic.revision_id


# --- VMXON -------------------------------------------------------------------------------------------------


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_vmxon_succeeds_and_leaves_no_current_vmcs(vmxlab):
    """Vol. 3C, 31.3, VMXON: VMsucceed; the current-VMCS pointer is set to all ones."""
    pointer = last(vmxlab, Vmxon(), Vmptrst())
    assert succeeds(pointer)
    assert pointer.value == NO_VMCS


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_vmxon_with_a_wrong_revision_identifier_fails_invalid(vmxlab):
    """Vol. 3C, 31.3, VMXON: VMfailInvalid unless bits 30:0 of the region are the processor's identifier."""
    for bit in (0, 15, 30):
        region = VmxRegion(revision(vmxlab) ^ 1 << bit)
        assert fails_invalid(last(vmxlab, Vmxon(), vmxon_region=region)), bit


def test_vmxon_with_bit_31_of_the_region_set_fails_invalid(vmxlab):
    """Vol. 3C, 31.3, VMXON: bit 31 of the VMXON region's first word must be clear, shadowing or not."""
    assert fails_invalid(last(vmxlab, Vmxon(), vmxon_region=VmxRegion(revision(vmxlab), shadow=True)))


@pytest.mark.parametrize("offset", [1, 8, 0x800, 0xFFF])
def test_vmxon_of_a_misaligned_address_fails_invalid(vmxlab, offset):
    """Vol. 3C, 31.3, VMXON: VMfailInvalid unless the address is 4-KByte aligned."""
    assert fails_invalid(last(vmxlab, Vmxon(region=VMXON_REGION + offset)))


def test_vmxon_beyond_the_physical_address_width_fails_invalid(vmxlab):
    """Vol. 3C, 31.3, VMXON: VMfailInvalid where the address sets bits beyond the physical-address width."""
    assert fails_invalid(last(vmxlab, Vmxon(region=too_wide(vmxlab, VMXON_REGION))))
    assert fails_invalid(last(vmxlab, Vmxon(region=VMXON_REGION | 1 << 63)))


def test_a_failed_vmxon_does_not_enter_vmx_operation(vmxlab):
    """Vol. 3C, 31.3, VMXON: only its success enters VMX operation; VMPTRST outside is #UD."""
    run = steps(vmxlab, Vmxon(region=VMXON_REGION + 8, go_on=True), Vmptrst())
    assert fails_invalid(run.outcome("vmxon"))
    assert faults(run.outcome("vmptrst"), Vector.UD)


def test_a_second_vmxon_fails_by_whether_there_is_a_current_vmcs(vmxlab):
    """Vol. 3C, 31.3, VMXON: in VMX root operation VMfail(15); 31.2: VMfailInvalid without a current VMCS."""
    assert fails_invalid(last(vmxlab, Vmxon(), Vmxon()))
    assert fails_valid(last(vmxlab, *WITH_VMCS, Vmxon()), Error.VMXON_IN_VMX_ROOT_OPERATION)


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_vmxon_without_cr4_vmxe_is_undefined(vmxlab):
    """Vol. 3C, 24.7 and 31.3, VMXON: #UD while CR4.VMXE is 0."""
    assert faults(last(vmxlab, SetCr4(CR4.PAE), Vmxon()), Vector.UD)


def test_vmxon_with_an_unsupported_cr0_value_is_a_general_protection_fault(vmxlab):
    """Vol. 3C, 24.8 and 31.3, VMXON: #GP(0) where CR0 has a bit 0 that IA32_VMX_CR0_FIXED0 wants to be 1."""
    fixed = vmxlab.capabilities.cr0_fixed0
    if not fixed & CR0.NE:
        pytest.skip("IA32_VMX_CR0_FIXED0.NE[5] is 0: VMX operation does not want CR0.NE")
    without_ne = CR0.PG | CR0.WP | CR0.ET | CR0.PE
    assert faults(last(vmxlab, SetCr0(without_ne), Vmxon()), Vector.GP)


@pytest.mark.parametrize(
    ("step", "why"),
    [(SetCr4(CR4.PAE), "CR4.VMXE cleared"), (SetCr0(CR0.PG | CR0.WP | CR0.ET | CR0.PE), "CR0.NE cleared")],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_fixed_bits_can_not_be_cleared_in_vmx_operation(vmxlab, step, why):
    """Vol. 3C, 24.8: in VMX operation an attempt to give a fixed bit another value is #GP(0)."""
    if "CR0" in why and not vmxlab.capabilities.cr0_fixed0 & CR0.NE:
        pytest.skip("IA32_VMX_CR0_FIXED0.NE[5] is 0")
    assert faults(last(vmxlab, Vmxon(), step), Vector.GP)


# --- outside VMX operation ---------------------------------------------------------------------------------

VMX_INSTRUCTIONS = {
    "vmclear": Vmclear(),
    "vmptrld": Vmptrld(),
    "vmptrst": Vmptrst(),
    "vmread": Vmread(Field.GUEST_RIP),
    "vmwrite": Vmwrite(Field.GUEST_RIP, 0),
    "vmlaunch": Enter(),
    "vmresume": Enter(resume=True),
    "vmxoff": Vmxoff(),
    "invept": Invept(2, 0),
    "invvpid": Invvpid(2),
}


BEFORE = pytest.mark.parametrize(
    "before", [(), (SetCr4(CR4.PAE),), (Vmxon(), Vmxoff())], ids=["", "no-vmxe", "left"]
)
"""Ways to be outside VMX operation."""


@BEFORE
def test_vmx_instructions_outside_vmx_operation_are_undefined(vmxlab, before):
    """Vol. 3C, 31.3: each VMX instruction but VMXON is #UD outside VMX operation, CR4.VMXE set or not."""
    assert vmxlab.capabilities  # skips where there is no VMX
    cases = [Case(steps=(*before, step)) for step in VMX_INSTRUCTIONS.values()]
    for name, run in zip(VMX_INSTRUCTIONS, vmxlab.run_all(cases), strict=True):
        (outcome,) = (outcome for outcome in run.outcomes if not outcome.ok)
        assert outcome.operation == name
        assert faults(outcome, Vector.UD), outcome


@pytest.mark.vmx_known_difference("kvm-vmcall-of-l1-is-a-hypercall")
@BEFORE
def test_vmcall_outside_vmx_operation_is_undefined(vmxlab, before):
    """Vol. 3C, 31.3, VMCALL: #UD outside VMX operation."""
    assert vmxlab.capabilities
    assert faults(last(vmxlab, *before, Vmcall()), Vector.UD)


# --- VMPTRLD, VMCLEAR, VMPTRST -----------------------------------------------------------------------------


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_vmptrst_gives_back_what_vmptrld_loaded(vmxlab):
    """Vol. 3C, 31.3, VMPTRST: the current-VMCS pointer is stored; VMCLEAR of that VMCS makes it all ones."""
    other = FREE_PAGES
    run = steps(
        vmxlab,
        *WITH_VMCS,
        Vmptrst(),
        Vmclear(region=other),
        Vmptrst(),
        Vmptrld(region=other),
        Vmptrst(),
        Vmclear(region=VMCS_REGION),
        Vmptrst(),
        Vmclear(region=other),
        Vmptrst(),
        memory={other: VmxRegion(revision(vmxlab)).to_bytes()},
    )
    pointers = [outcome.value for outcome in run.outcomes if outcome.operation == "vmptrst"]
    assert pointers == [VMCS_REGION, VMCS_REGION, other, other, NO_VMCS]
    assert run.end is End.DONE


def failing_region_steps(vmxlab, kind: type[Vmptrld] | type[Vmclear]) -> dict[str, Step]:
    return {
        "misaligned": kind(region=VMCS_REGION + 8, go_on=True),
        "bit 0": kind(region=VMCS_REGION + 1, go_on=True),
        "too wide": kind(region=too_wide(vmxlab, VMCS_REGION), go_on=True),
        "bit 63": kind(region=VMCS_REGION | 1 << 63, go_on=True),
        "vmxon pointer": kind(region=VMXON_REGION, go_on=True),
    }


@pytest.mark.parametrize(
    ("kind", "bad_address", "vmxon_pointer"),
    [
        (Vmptrld, Error.VMPTRLD_INVALID_PHYSICAL_ADDRESS, Error.VMPTRLD_VMXON_POINTER),
        (Vmclear, Error.VMCLEAR_INVALID_PHYSICAL_ADDRESS, Error.VMCLEAR_VMXON_POINTER),
    ],
    ids=["vmptrld", "vmclear"],
)
def test_bad_addresses_of_vmptrld_and_vmclear(vmxlab, kind, bad_address, vmxon_pointer):
    """Vol. 3C, 31.3: VMfail 9 (address) and 10 (VMXON pointer) for VMPTRLD, 2 and 3 for VMCLEAR."""
    failing = failing_region_steps(vmxlab, kind)
    run = steps(vmxlab, *WITH_VMCS, *failing.values(), Vmptrst())
    outcomes = run.outcomes[len(WITH_VMCS) : -1]
    expected = [bad_address] * (len(failing) - 1) + [vmxon_pointer]
    assert [(outcome.kind, outcome.error) for outcome in outcomes] == [
        (OutcomeKind.FAIL_VALID, error) for error in expected
    ]
    assert run.outcomes[-1].value == VMCS_REGION


@pytest.mark.parametrize("kind", [Vmptrld, Vmclear])
def test_bad_addresses_fail_invalid_without_a_current_vmcs(vmxlab, kind):
    """Vol. 3C, 31.2: VMfail(number) is VMfailInvalid where no VMCS is current to hold the number."""
    failing = failing_region_steps(vmxlab, kind)
    run = steps(vmxlab, Vmxon(), *failing.values(), Vmptrst())
    assert all(fails_invalid(outcome) for outcome in run.outcomes[1:-1])
    assert run.outcomes[-1].value == NO_VMCS


def test_vmptrld_with_a_wrong_revision_identifier_fails(vmxlab):
    """Vol. 3C, 31.3, VMPTRLD: VMfail(11) unless bits 30:0 of the region are the processor's identifier."""
    for bit in (0, 15, 30):
        region = VmxRegion(revision(vmxlab) ^ 1 << bit)
        assert fails_invalid(last(vmxlab, Vmxon(), Vmptrld(), vmcs_region=region)), bit
        run = steps(
            vmxlab,
            *WITH_VMCS,
            Vmptrld(region=FREE_PAGES, go_on=True),
            Vmread(Field.VM_INSTRUCTION_ERROR),
            Vmptrst(),
            memory={FREE_PAGES: region.to_bytes()},
        )
        failed, error, pointer = run.outcomes[-3:]
        assert fails_valid(failed, Error.VMPTRLD_INCORRECT_REVISION_ID)
        assert error.value == Error.VMPTRLD_INCORRECT_REVISION_ID
        assert pointer.value == VMCS_REGION


def test_vmclear_does_not_look_at_the_revision_identifier(vmxlab):
    """Vol. 3C, 31.3, VMCLEAR: the operation checks the address alone, not what lies there."""
    region = VmxRegion(revision(vmxlab) ^ 1, shadow=True)
    assert succeeds(last(vmxlab, Vmxon(), Vmclear(), vmcs_region=region))


# --- VMREAD and VMWRITE ------------------------------------------------------------------------------------


def test_vmread_and_vmwrite_fail_invalid_without_a_current_vmcs(vmxlab):
    """Vol. 3C, 31.3, VMREAD and VMWRITE: VMfailInvalid where the current-VMCS pointer is not valid."""
    assert fails_invalid(last(vmxlab, Vmxon(), Vmread(Field.GUEST_RIP)))
    assert fails_invalid(last(vmxlab, Vmxon(), Vmread(UNSUPPORTED_FIELD)))
    run = steps(vmxlab, Vmxon(), Vmwrite(Field.GUEST_RIP, 0))
    assert fails_invalid(run.outcome("vmwrite"))


UNSUPPORTED = {
    "reserved bits": UNSUPPORTED_FIELD,
    "bit 12": Field.GUEST_RIP | 1 << 12,
    "bit 15": Field.GUEST_RIP | 1 << 15,
    "bit 31": Field.GUEST_RIP | 1 << 31,
    "high half of a 32-bit field": Field.EXCEPTION_BITMAP | 1,
    "high half of a natural-width field": Field.GUEST_RIP | 1,
    "index beyond VMCS_ENUM": encode(False, FieldType.HOST_STATE, FieldWidth.NATURAL, 0x1FF),
}


@pytest.mark.vmx_also_on("kvm-in-bochs")
@pytest.mark.parametrize(
    "encoding", UNSUPPORTED.values(), ids=[name.replace(" ", "-") for name in UNSUPPORTED]
)
def test_unsupported_components_fail(vmxlab, encoding):
    """Vol. 3C, 31.3, VMREAD and VMWRITE: VMfail(12) for what corresponds to no field; VMPTRST is unmoved."""
    run = steps(vmxlab, *WITH_VMCS, Vmread(encoding, go_on=True), Vmwrite(encoding, 0, go_on=True), Vmptrst())
    for operation in ("vmread", "vmwrite"):
        assert fails_valid(run.outcome(operation), Error.UNSUPPORTED_COMPONENT), encoding
    assert run.outcomes[-1].value == VMCS_REGION


READ_ONLY = [field for field in Field if field.type is FieldType.EXIT_INFORMATION]
ALWAYS_THERE = [
    Field.VM_INSTRUCTION_ERROR,
    Field.EXIT_REASON,
    Field.EXIT_INTERRUPTION_INFORMATION,
    Field.EXIT_INTERRUPTION_ERROR_CODE,
    Field.IDT_VECTORING_INFORMATION,
    Field.IDT_VECTORING_ERROR_CODE,
    Field.EXIT_INSTRUCTION_LENGTH,
    Field.EXIT_INSTRUCTION_INFORMATION,
    Field.EXIT_QUALIFICATION,
    Field.GUEST_LINEAR_ADDRESS,
]


def test_vmwrite_to_exit_information_fields(vmxlab):
    """Vol. 3C, 31.3, VMWRITE: to an exit-information field VMfail(13), unless IA32_VMX_MISC[29] allows it."""
    assert set(ALWAYS_THERE) < set(READ_ONLY)
    sequence = [step for field in ALWAYS_THERE for step in (Vmwrite(field, 0x5A, go_on=True), Vmread(field))]
    run = steps(vmxlab, *WITH_VMCS, *sequence)
    if vmxlab.capabilities.misc.vmwrite_any_field:
        read = {outcome.field: outcome.value for outcome in run.outcomes if outcome.operation == "vmread"}
        assert read == dict.fromkeys(ALWAYS_THERE, 0x5A)
    else:
        failed = [outcome for outcome in run.outcomes if not outcome.ok]
        assert [outcome.field for outcome in failed] == ALWAYS_THERE
        assert all(fails_valid(outcome, Error.VMWRITE_READ_ONLY_COMPONENT) for outcome in failed)


def test_the_high_half_of_a_64_bit_field_can_be_accessed_alone(vmxlab):
    """Vol. 3C, 25.11.2: an encoding with access type "high" reaches bits 63:32 of a 64-bit field."""
    field = Field.TSC_OFFSET
    run = steps(
        vmxlab,
        *WITH_VMCS,
        Vmwrite(field, 0x1122_3344_5566_7788),
        Vmread(field | 1),
        Vmwrite(field | 1, 0xAABB_CCDD),
        Vmread(field),
    )
    high, whole = (outcome for outcome in run.outcomes if outcome.operation == "vmread")
    assert high.value == 0x1122_3344
    assert whole.value == 0xAABB_CCDD_5566_7788


def test_vmwrite_ignores_bits_that_the_field_is_too_short_for(vmxlab):
    """Vol. 3C, 31.3, VMWRITE: bits of the source beyond the field's length are ignored; VMREAD gives 0."""
    value = 0xFEDC_BA98_7654_3210
    fields = {
        Field.GUEST_ES_SELECTOR: 0x3210,
        Field.EXCEPTION_BITMAP: 0x7654_3210,
        Field.TSC_OFFSET: value,
        Field.GUEST_RSP: value,
    }
    sequence = [step for field in fields for step in (Vmwrite(field, value), Vmread(field))]
    run = steps(vmxlab, *WITH_VMCS, *sequence)
    read = {outcome.field: outcome.value for outcome in run.outcomes if outcome.operation == "vmread"}
    assert read == fields


WRITABLE = [field for field in Field if field.type is not FieldType.EXIT_INFORMATION]
ACCESS_RIGHTS_RESERVED = 0xFFFE_0F00


@pytest.mark.parametrize("pattern", [0x5AA5_3CC3_9669_F00F, 0xA55A_C33C_6996_0FF0], ids=["5a", "a5"])
def test_every_field_keeps_what_is_written_to_it(vmxlab, pattern):
    """Vol. 3C, 25.11.2 and 31.3: VMREAD gives what VMWRITE wrote, to each field that the processor has.

    Of access rights the reserved bits 11:8 and 31:17 may read as 0 (25.4.1 says what the defined ones are).
    """
    sequence = [
        step
        for field in WRITABLE
        for step in (Vmwrite(field, pattern & field.max, go_on=True), Vmread(field, go_on=True))
    ]
    wrong = {}
    for half in range(0, len(sequence), 100):
        run = steps(vmxlab, *WITH_VMCS, *sequence[half : half + 100])
        for outcome in run.outcomes:
            if outcome.operation != "vmread" or fails_valid(outcome, Error.UNSUPPORTED_COMPONENT):
                continue
            field = Field(outcome.field)
            ignored = ACCESS_RIGHTS_RESERVED if field.name.endswith("ACCESS_RIGHTS") else 0
            if (outcome.value ^ pattern) & field.max & ~ignored:
                wrong[field.name] = f"{outcome.value:#x} instead of {pattern & field.max:#x}"
    assert wrong == {}


# --- VMXOFF and VMCALL -------------------------------------------------------------------------------------


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_vmxoff_leaves_vmx_operation_and_vmxon_enters_it_again(vmxlab):
    """Vol. 3C, 31.3, VMXOFF: VMsucceed; what follows is #UD until the next VMXON."""
    run = steps(vmxlab, Vmxon(), Vmxoff(), Vmxoff(go_on=True), Vmxon(), Vmptrst(), Vmxoff())
    first, undefined, second = (outcome for outcome in run.outcomes if outcome.operation == "vmxoff")
    assert succeeds(first)
    assert faults(undefined, Vector.UD)
    assert succeeds(second)
    assert run.end is End.DONE


def test_vmxoff_lets_cr4_vmxe_be_cleared(vmxlab):
    """Vol. 3C, 24.7: after VMXOFF software may clear CR4.VMXE."""
    assert succeeds(last(vmxlab, Vmxon(), Vmxoff(), SetCr4(CR4.PAE)))


@pytest.mark.vmx_known_difference("kvm-vmcall-of-l1-is-a-hypercall")
def test_vmcall_in_root_operation_fails_invalid_without_a_current_vmcs(vmxlab):
    """Vol. 3C, 31.3, VMCALL: without an SMM monitor VMfail(1); with no current VMCS that is VMfailInvalid."""
    assert fails_invalid(last(vmxlab, Vmxon(), Vmcall()))


@pytest.mark.vmx_known_difference("vmcall-in-root-operation")
@pytest.mark.vmx_known_difference("kvm-vmcall-of-l1-is-a-hypercall")
def test_vmcall_in_root_operation_fails(vmxlab):
    """Vol. 3C, 31.3, VMCALL: where IA32_SMM_MONITOR_CTL is not valid, VMCALL in L1 is VMfail(1)."""
    assert fails_valid(last(vmxlab, *WITH_VMCS, Vmcall()), Error.VMCALL_IN_VMX_ROOT_OPERATION)
