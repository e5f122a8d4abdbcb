"""VMFUNC, and VM function 0, EPTP switching (SDM Vol. 3C, 26.5.6)."""

from __future__ import annotations

import pytest

from vmxlab import (
    Case,
    EPTPointer,
    ExitReason,
    Field,
    InstructionError,
    OutcomeKind,
    PageSize,
    SecondaryControls,
    guest_ept,
)
from vmxlab.cases.memory import DATA, PROGRAM
from vmxlab.image.layout import EPT_TABLES, FREE_PAGES
from vmxlab.sdm.registers import Vector
from vmxlab.structures import EptpList, VmFunc

from .guest_setups import merged, user_mode

S = SecondaryControls
EPTP_SWITCHING = 1 << 0
VMFUNC_LENGTH = 3

LIST = FREE_PAGES
OTHER_PAGE = FREE_PAGES + 0x1000
"""What the second EPT maps in DATA's place."""
OTHER_TABLES = FREE_PAGES + 0x10000
HERE = EPTPointer(address=EPT_TABLES).bits
THERE = EPTPointer(address=OTHER_TABLES).bits

SWITCH = "xor eax, eax; mov ecx, {index}; vmfunc"


def other_ept():
    """As the default EPT, but DATA is another page."""
    ept = guest_ept()
    ept.map(DATA, OTHER_PAGE, PageSize.SIZE_4K, replace=True)
    return ept


def vmfunc_case(vmxlab, program: str, *, eptps=(HERE, THERE), controls: int = EPTP_SWITCHING, **more) -> Case:
    """VM functions are enabled, and L2 has two views of its memory: DATA holds 1111H here, 2222H there."""
    vmxlab.require(S.ENABLE_VM_FUNCTIONS, VmFunc.eptp_switching)
    parts = merged(
        {"data": {DATA: b"\x11\x11\0\0"}},
        {key: more.pop(key) for key in ("data", "fields") if key in more},
        fields={Field.VM_FUNCTION_CONTROLS: controls, Field.EPTP_LIST_ADDRESS: LIST},
    )
    return Case(
        program=program,
        enable=S.ENABLE_VM_FUNCTIONS,
        ept=guest_ept(),
        memory={
            LIST: EptpList(eptps).to_bytes(),
            OTHER_PAGE: b"\x22\x22\0\0",
            **dict(other_ept().tables(OTHER_TABLES)),
        },
        watch=[Field.EPT_POINTER, *index_field(vmxlab)],
        **parts,
        **more,
    )


def index_field(vmxlab) -> list[Field]:
    """EPTP index exists where "EPT-violation #VE" does (25.6.20)."""
    return [Field.EPTP_INDEX] if vmxlab.capabilities.supports(S.EPT_VIOLATION_VE) else []


def check_vmfunc_exit(exit_, rip: int) -> None:
    assert exit_.full_reason == ExitReason.VMFUNC, exit_
    assert (exit_.rip, exit_.instruction_length) == (rip, VMFUNC_LENGTH)
    assert exit_.raw_qualification == 0
    assert not exit_.interruption.valid
    assert not exit_.idt_vectoring.valid


# --- EPTP switching that succeeds --------------------------------------------------------------------------


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_eptp_switching_gives_l2_another_view(vmxlab):
    """Vol. 3C, 26.5.6.3: accesses behind VMFUNC use the new EPTP, which the VMCS holds from then on."""
    program = f"mov ebx, [DATA]; {SWITCH.format(index=1)}; mov edx, [DATA]; mov esi, [DATA]; hlt"
    run = vmxlab.run(vmfunc_case(vmxlab, program))
    assert run.reasons == [ExitReason.HLT]
    (exit_,) = run.exits
    assert (exit_.registers["rbx"], exit_.registers["rdx"]) == (0x1111, 0x2222)
    assert exit_.watched[Field.EPT_POINTER] == THERE


@pytest.mark.vmx_needs(S.EPT_VIOLATION_VE)
def test_eptp_switching_updates_the_eptp_index(vmxlab):
    """Vol. 3C, 26.5.6.3: ECX[15:0] is written to the EPTP index where #VE is supported, used or not."""
    program = f"vmcall; {SWITCH.format(index=1)}; vmcall; {SWITCH.format(index=511)}; hlt"
    eptps = [HERE, THERE] + [0] * 509 + [HERE]
    case = vmfunc_case(vmxlab, program, eptps=eptps, fields={Field.EPTP_INDEX: 7})
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.VMCALL, ExitReason.VMCALL, ExitReason.HLT]
    assert [exit_.watched[Field.EPTP_INDEX] for exit_ in run.exits] == [7, 1, 511]
    assert [exit_.watched[Field.EPT_POINTER] for exit_ in run.exits] == [HERE, THERE, HERE]


def test_eptp_switching_forth_and_back(vmxlab):
    """Vol. 3C, 26.5.6.3: each switch is seen at once, however often: nothing of the other view is used."""
    switches = "; ".join(
        f"{SWITCH.format(index=n % 2)}; mov rdx, [DATA]; shl rsi, 4; and edx, 15; or rsi, rdx"
        for n in range(1, 9)
    )
    run = vmxlab.run(vmfunc_case(vmxlab, f"{switches}; hlt"))
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rsi"] == 0x2121_2121


def test_eptp_switching_at_privilege_level_3(vmxlab):
    """Vol. 3C, 26.5.6.3: EPTP switching has no check of the CPL."""
    program = f"{SWITCH.format(index=1)}; mov edx, [DATA]; vmcall"
    run = vmxlab.run(vmfunc_case(vmxlab, program, **user_mode()))
    assert run.exits[0].reason is ExitReason.VMCALL
    assert run.exits[0].registers["rdx"] == 0x2222


def test_vmfunc_looks_at_eax_and_ecx_alone(vmxlab):
    """Vol. 3C, 26.5.6.2 and .3: EAX and ECX are the operands, not RAX and RCX; no register is changed."""
    program = "vmfunc; mov rbx, [DATA]; hlt"
    registers = {"rax": 0xFFFF_FFFF_0000_0000, "rcx": 0xFFFF_FFFF_0000_0001, "rdx": 5, "rbx": 3}
    run = vmxlab.run(vmfunc_case(vmxlab, program, registers=registers))
    assert run.reasons == [ExitReason.HLT]
    seen = run.exits[0].registers
    assert {name: seen[name] for name in registers} == registers | {"rbx": 0x2222}


# --- what exits --------------------------------------------------------------------------------------------


def test_a_vm_function_that_is_off_exits(vmxlab):
    """Vol. 3C, 26.5.6.2: for EAX up to 63 VMFUNC exits where bit EAX of the VM-function controls is 0."""
    functions = [0, 1, 31, 32, 63]
    for controls, exiting in ((0, functions), (EPTP_SWITCHING, functions[1:])):
        program = "; ".join(f"mov eax, {n}; vmfunc" for n in functions) + "; hlt"
        run = vmxlab.run(vmfunc_case(vmxlab, program, controls=controls))
        assert run.reasons == [ExitReason.VMFUNC] * len(exiting) + [ExitReason.HLT], controls
        for exit_ in run.exits[:-1]:
            check_vmfunc_exit(exit_, PROGRAM + functions.index(exit_.registers["rax"]) * 8 + 5)
        assert [exit_.registers["rax"] for exit_ in run.exits[:-1]] == exiting


def test_eptp_switching_fails_beyond_the_list(vmxlab):
    """Vol. 3C, 26.5.6.3: with ECX of 512 or more VMFUNC exits, and the EPTP stays."""
    indices = [512, 513, 0x1_0001, 0x8000_0000, 0xFFFF_FFFF]
    program = "; ".join(SWITCH.format(index=hex(index)) for index in indices) + "; mov ebx, [DATA]; hlt"
    run = vmxlab.run(vmfunc_case(vmxlab, program))
    assert run.reasons == [ExitReason.VMFUNC] * len(indices) + [ExitReason.HLT]
    for number, exit_ in enumerate(run.exits[:-1]):
        check_vmfunc_exit(exit_, PROGRAM + 10 * number + 7)
        assert exit_.registers["rcx"] == indices[number]
        assert exit_.watched[Field.EPT_POINTER] == HERE
    assert run.exits[-1].registers["rbx"] == 0x1111


def test_eptp_switching_to_a_value_that_vm_entry_would_refuse_exits(vmxlab):
    """Vol. 3C, 26.5.6.3 with 27.2.1.1: an invalid EPTP in the list exits; EPTP and EPTP index stay."""
    width = vmxlab.physical_address_width
    pointers = [0, THERE | 0x800, THERE & ~0x38, THERE & ~7 | 3, THERE | 1 << width, THERE | 1 << 63]
    check = vmxlab.capabilities.ept_vpid
    assert all(EPTPointer.from_bits(bits).check(check, width) for bits in pointers)
    program = "; ".join(SWITCH.format(index=n + 1) for n in range(len(pointers))) + "; mov ebx, [DATA]; hlt"
    run = vmxlab.run(vmfunc_case(vmxlab, program, eptps=[HERE, *pointers]))
    assert run.reasons == [ExitReason.VMFUNC] * len(pointers) + [ExitReason.HLT]
    for number, exit_ in enumerate(run.exits[:-1]):
        check_vmfunc_exit(exit_, PROGRAM + 10 * number + 7)
        assert exit_.watched[Field.EPT_POINTER] == HERE
        assert exit_.watched.get(Field.EPTP_INDEX, 0) == 0
    assert run.exits[-1].registers["rbx"] == 0x1111


def test_a_violation_in_the_new_view_is_of_the_new_view(vmxlab):
    """Vol. 3C, 26.5.6.3 and 28.2.1: what the new EPT structures do not map is an EPT violation at once."""
    program = f"{SWITCH.format(index=1)}; mov edx, [DATA + 0x1000]; hlt"
    ept = other_ept()
    ept.unmap(DATA + 0x1000, 0x1000)
    case = vmfunc_case(vmxlab, program)
    run = vmxlab.run(
        Case(
            program=program,
            enable=S.ENABLE_VM_FUNCTIONS,
            fields=case.fields,
            memory={**case.memory, **dict(ept.tables(OTHER_TABLES))},
        )
    )
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    assert run.exits[0].guest_physical_address == DATA + 0x1000
    assert run.exits[0].rip == PROGRAM + 10


# --- #UD, and VM entry -------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [64, 0x100, 0x8000_0000, 0xFFFF_FFFF])
def test_vm_functions_beyond_63_are_undefined(vmxlab, function):
    """Vol. 3C, 26.5.6.2: EAX over 63 is #UD, which is no VMFUNC exit."""
    run = vmxlab.run(vmfunc_case(vmxlab, "nop; vmfunc", registers={"rax": function}))
    assert run.reasons == [ExitReason.EXCEPTION_OR_NMI]
    assert run.exits[0].interruption.vector == Vector.UD
    assert run.exits[0].rip == PROGRAM + 1


@pytest.mark.parametrize(
    "fields",
    [
        {Field.VM_FUNCTION_CONTROLS: 1 << 1},
        {Field.VM_FUNCTION_CONTROLS: 1 << 63 | EPTP_SWITCHING},
        {Field.EPTP_LIST_ADDRESS: LIST + 8},
        {Field.EPTP_LIST_ADDRESS: LIST | 1 << 62},
    ],
    ids=["function-1", "function-63", "misaligned", "too-wide"],
)
def test_vm_entry_checks_the_vm_function_controls(vmxlab, fields):
    """Vol. 3C, 27.2.1.1: functions that are not supported, or a list where it can't lie: VMfail(7)."""
    if fields.get(Field.VM_FUNCTION_CONTROLS) == 2 and vmxlab.capabilities.vmfunc.allows(1):
        pytest.skip("the processor has VM function 1")
    case = vmfunc_case(vmxlab, "hlt")
    failing = Case(enable=case.enable, fields={**case.fields, **fields}, memory=case.memory)
    run = vmxlab.run(failing)
    assert not run.exits
    assert run.entry.kind is OutcomeKind.FAIL_VALID
    assert run.entry.error == InstructionError.ENTRY_INVALID_CONTROL_FIELDS


def test_eptp_switching_needs_ept(vmxlab):
    """Vol. 3C, 27.2.1.1: with EPTP switching on, "enable EPT" must be 1."""
    case = vmfunc_case(vmxlab, "hlt")
    failing = Case(
        enable=case.enable, disable=S.ENABLE_EPT, fields=case.fields, memory={LIST: case.memory[LIST]}
    )
    run = vmxlab.run(failing)
    assert run.entry.error == InstructionError.ENTRY_INVALID_CONTROL_FIELDS
