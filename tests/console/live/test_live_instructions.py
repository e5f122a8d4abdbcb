"""Instructions of L1 on a live machine, one by one."""

from __future__ import annotations

import pytest

from vmxlab import ControlSet, Field, Lab, OutcomeKind, PrimaryControls, SecondaryControls
from vmxlab.errors import InstructionFailed, MissingCapability, OutOfRange, UnknownField
from vmxlab.image import layout
from vmxlab.sdm.instruction_errors import InstructionError as Error
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import EFER, Vector

NO_FIELD = 0x6E00
"""A guest-state encoding that no processor has."""


@pytest.mark.parametrize("name", [Field.GUEST_RIP, "GUEST_RIP", "guest rip", int(Field.GUEST_RIP)])
def test_a_field_is_read_by_any_of_its_names(vm, name):
    vm.vmwrite(Field.GUEST_RIP, 0x8123)
    assert vm.vmread(name) == 0x8123
    assert vm.vmread(name).field is Field.GUEST_RIP


def test_a_value_shows_what_it_says(vm):
    assert repr(vm.vmread(Field.GUEST_RIP)) == "0x8000"
    assert repr(vm.vmread(Field.GUEST_RFLAGS)) == "0x2 (FIXED1)"
    assert "HLT_EXITING | USE_IO_BITMAPS" in repr(vm.vmread(Field.PRIMARY_PROCESSOR_BASED_CONTROLS))


def test_a_field_that_the_processor_has_not_is_an_error_with_its_number(vm):
    """SDM Vol. 3C, 31.4: error 12."""
    with pytest.raises(InstructionFailed, match="the processor has no such field") as caught:
        vm.vmread(NO_FIELD)
    assert caught.value.outcome.error is Error.UNSUPPORTED_COMPONENT
    assert caught.value.engine
    assert caught.value.log_path == vm.log_path
    with pytest.raises(InstructionFailed):
        vm.vmwrite(NO_FIELD, 1)
    assert vm.try_vmread(NO_FIELD).kind is OutcomeKind.FAIL_VALID
    assert vm.try_vmwrite(NO_FIELD, 1).error is Error.UNSUPPORTED_COMPONENT
    assert vm.vmread(Field.VM_INSTRUCTION_ERROR) == 12


def test_what_can_not_be_meant_is_refused_before_it_is_sent(vm):
    with pytest.raises(UnknownField, match="GUEST_RIP"):
        vm.vmread("GUEST_RIQ")
    with pytest.raises(OutOfRange, match="16 bits"):
        vm.vmwrite(Field.GUEST_CS_SELECTOR, 0x10000)
    with pytest.raises(OutOfRange):
        vm.vmread(1 << 32)
    with pytest.raises(OutOfRange):
        vm.rdmsr(1 << 32)


def test_the_processor_takes_the_low_bits_of_a_wider_operand(vm):
    """SDM Vol. 3C, 31.3, VMWRITE: bits of the operand that the field has not are ignored."""
    assert vm.try_vmwrite(Field.GUEST_CS_SELECTOR, 0x5_0008).ok
    assert vm.vmread(Field.GUEST_CS_SELECTOR) == 8


def test_every_instruction_has_its_outcome(vm):
    assert vm.vmptrst().value == layout.VMCS_REGION
    assert vm.vmxon().error is Error.VMXON_IN_VMX_ROOT_OPERATION
    assert vm.invept().ok
    assert vm.invvpid(2).ok
    assert vm.vmclear().ok
    assert vm.vmptrst().value == (1 << 64) - 1
    assert vm.try_vmread(Field.GUEST_RIP).kind is OutcomeKind.FAIL_INVALID
    assert vm.vmptrld().ok
    assert vm.vmptrld(layout.VMXON_REGION).error is Error.VMPTRLD_VMXON_POINTER
    assert vm.vmxoff().ok
    outcome = vm.vmptrst()
    assert (outcome.kind, outcome.vector) == (OutcomeKind.FAULT, Vector.UD)
    assert vm.vmxon().ok


def test_msrs_and_cpuid(vm):
    assert vm.rdmsr(Msr.IA32_EFER) & EFER.LMA
    assert vm.cpuid(1).ecx >> 5 & 1
    assert vm.cpuid(4, 0) != vm.cpuid(4, 1)
    before = vm.rdmsr(Msr.IA32_SYSENTER_CS)
    vm.wrmsr(Msr.IA32_SYSENTER_CS, 0x1234)
    assert vm.rdmsr(Msr.IA32_SYSENTER_CS) == 0x1234
    vm.wrmsr(Msr.IA32_SYSENTER_CS, before)
    with pytest.raises(InstructionFailed, match="#GP"):
        vm.rdmsr(0x1234_5678)
    assert vm.try_wrmsr(0x1234_5678, 0).vector is Vector.GP


def test_a_control_is_set_and_cleared_by_name(vm):
    before = vm.vmread(Field.PRIMARY_PROCESSOR_BASED_CONTROLS)
    vm.enable(PrimaryControls.RDTSC_EXITING)
    now = vm.vmread(Field.PRIMARY_PROCESSOR_BASED_CONTROLS)
    assert now == before | PrimaryControls.RDTSC_EXITING
    vm.disable(PrimaryControls.RDTSC_EXITING)
    assert vm.vmread(Field.PRIMARY_PROCESSOR_BASED_CONTROLS) == before


def test_a_control_brings_what_activates_its_set(vm):
    vm.disable(PrimaryControls.ACTIVATE_SECONDARY_CONTROLS)
    vm.enable(SecondaryControls.WBINVD_EXITING)
    assert vm.vmread(Field.PRIMARY_PROCESSOR_BASED_CONTROLS) & PrimaryControls.ACTIVATE_SECONDARY_CONTROLS
    # What stood in the field before the set was active did not count.
    assert vm.vmread(Field.SECONDARY_PROCESSOR_BASED_CONTROLS) == SecondaryControls.WBINVD_EXITING


def test_a_control_that_the_processor_lacks_or_demands_is_named(vm):
    before = {controls.field: vm.try_vmread(controls.field).value for controls in ControlSet}
    with pytest.raises(MissingCapability, match="ENABLE_PCONFIG"):
        vm.enable(PrimaryControls.RDTSC_EXITING, SecondaryControls.ENABLE_PCONFIG)
    forced = PrimaryControls(vm.capabilities.control(ControlSet.PRIMARY).allowed0 & 0x2)
    with pytest.raises(MissingCapability, match="the 0-setting of bit 1"):
        vm.disable(PrimaryControls.RDTSC_EXITING, forced)
    assert before == {controls.field: vm.try_vmread(controls.field).value for controls in ControlSet}


def test_without_vmx_there_are_memory_and_msrs(tmp_path):
    with Lab("tcg", log_dir=tmp_path) as lab:
        vm = lab.live()
        assert not vm.has_vmx
        assert vm.rdmsr(Msr.IA32_EFER) & EFER.LMA
        assert vm.cpuid(1).ecx >> 5 & 1 == 0
        vm.memory[layout.CASE_BASE : layout.CASE_BASE + 4] = b"vmx?"
        assert vm.memory.read_u32(layout.CASE_BASE) == int.from_bytes(b"vmx?", "little")
        for do in (
            lambda: vm.vmread(Field.GUEST_RIP),
            vm.resume,
            vm.snapshot,
            vm.vmxon,
            lambda: vm.ept,
            vm.step,
        ):
            with pytest.raises(MissingCapability, match=r"CPUID\.1:ECX"):
                do()
