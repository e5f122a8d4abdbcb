"""Which comes first, a fault of an I/O or MSR instruction or its VM exit (SDM Vol. 3C, 26.1.1).

Faults by privilege come before the exit: RDMSR and WRMSR with CPL over 0, I/O with CPL over IOPL and without
leave from the I/O permission bits in the TSS (SDM Vol. 1, 19.5). All other faults come after it: those of the
memory operand of INS and OUTS, of an MSR that does not exist, of a value that it can't hold. Each of the
latter is shown twice: the exit where it is intercepted, and the fault itself where it is not.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest

from vmxlab import Case, ExitReason, Field, IOBitmap, Mode, Msr, MsrBitmap, SecondaryControls, on
from vmxlab.cases.memory import L2_MEMORY, L2_MEMORY_BYTES, PROGRAM, UNMAPPED
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import CR0, RFLAGS, Vector

PORT = 0x60
FREE_PORT = 0x9ABC
UNUSABLE = 0x1_0000

# L2's own page tables are for the supervisor; these are for the user, and lie where a case has room.
TABLES = 0x14000
TSS = 0x18000
TSS_BYTES = 0x68
PERMISSION_BYTES = 0x40
"""I/O permission bits for ports 0 to 1FFH, behind the TSS."""
PRESENT_WRITE_USER = 0x7


def user_tables(vmxlab) -> tuple[int, bytes]:
    """CR3, and four levels of tables at TABLES: L2's memory in 4 KiB pages for the user."""
    base = 0 if vmxlab.capabilities.supports(SecondaryControls.ENABLE_EPT) else L2_MEMORY
    root = base + TABLES
    upper = [root + level * 0x1000 | PRESENT_WRITE_USER for level in (1, 2, 3)]
    pages = [entry.to_bytes(8, "little").ljust(0x1000, b"\0") for entry in upper]
    entries = range(base | PRESENT_WRITE_USER, base + L2_MEMORY_BYTES, 0x1000)
    return root, b"".join(pages) + struct.pack(f"<{len(entries)}Q", *entries)


def task_state(permitted: range) -> bytes:
    """A TSS whose I/O permission bits are 0 for the ports `permitted`, 1 for the others."""
    bits = (1 << PERMISSION_BYTES * 8) - 1
    for port in permitted:
        bits &= ~(1 << port)
    tss = bytes(TSS_BYTES - 2) + TSS_BYTES.to_bytes(2, "little")  # offset 66H: where the bits are
    return tss + bits.to_bytes(PERMISSION_BYTES, "little") + b"\xff"


def user_case(vmxlab, program: str, *, iopl: int, permitted: range | None = None, **case) -> Case:
    """A program that runs in 64-bit mode with CPL 3; VMCALL ends it, which needs no privilege."""
    root, tables = user_tables(vmxlab)
    tss = task_state(permitted or range(0))
    fields = {
        Field.GUEST_CR3: root,
        Field.GUEST_RFLAGS: 0x2 | iopl << 12,
        Field.GUEST_CS_SELECTOR: 0x0B,
        Field.GUEST_CS_ACCESS_RIGHTS: 0xA0FB,
        Field.GUEST_SS_SELECTOR: 0x13,
        Field.GUEST_SS_ACCESS_RIGHTS: 0xC0F3,
        Field.GUEST_TR_BASE: TSS,
        Field.GUEST_TR_LIMIT: TSS_BYTES - 1 if permitted is None else len(tss) - 1,
    }
    return Case(
        program=f"{program}; vmcall",
        fields=fields | case.pop("fields", {}),
        data={TABLES: tables, TSS: tss} | case.pop("data", {}),
        reactions=[on(ExitReason.VMCALL).stop()],
        **case,
    )


def assert_fault(exit_, vector: Vector, error_code: int | None = 0) -> None:
    """An exit for a hardware exception, at the program's first instruction (28.2.2)."""
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI
    event = exit_.interruption
    assert (event.valid, event.vector, event.type) == (True, vector, InterruptionType.HARDWARE_EXCEPTION)
    assert event.error_code_valid
    if error_code is not None:
        assert exit_.interruption_error_code == error_code
    assert exit_.rip == PROGRAM


# --- privilege comes first ---------------------------------------------------------------------------------

INSTRUCTIONS = pytest.mark.parametrize(
    "instruction", ["in al, 0x60", "out 0x60, al", "in eax, dx", "insb", "rep outsw"]
)
CONTROL = pytest.mark.parametrize("bitmap", [IOBitmap.intercept_all(), None], ids=["bitmap", "unconditional"])
OPERANDS = {"rdx": PORT, "rcx": 1, "rsi": 0x10000, "rdi": 0x10000}


@CONTROL
@INSTRUCTIONS
@pytest.mark.parametrize("iopl", [0, 1, 2])
def test_without_privilege_the_fault_comes_before_the_exit(vmxlab, instruction, iopl, bitmap):
    """26.1.1: the #GP of CPL over IOPL, without permission bits in the TSS, has priority over the VM exit."""
    run = vmxlab.run(user_case(vmxlab, instruction, iopl=iopl, io_bitmap=bitmap, registers=OPERANDS))
    assert len(run.exits) == 1
    assert_fault(run.exits[0], Vector.GP)


@CONTROL
@INSTRUCTIONS
@pytest.mark.parametrize(
    ("iopl", "permitted"), [(3, None), (0, range(PORT, PORT + 4))], ids=["IOPL=3", "permission bits"]
)
def test_with_privilege_there_is_the_exit(vmxlab, instruction, iopl, permitted, bitmap):
    """26.1.3: at CPL 3, too, once IOPL or the permission bits in the TSS let the instruction pass."""
    case = user_case(
        vmxlab, instruction, iopl=iopl, permitted=permitted, io_bitmap=bitmap, registers=OPERANDS
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.IO_INSTRUCTION, ExitReason.VMCALL]
    assert (run.exits[0].rip, run.exits[0].qualification.port) == (PROGRAM, PORT)


@pytest.mark.parametrize(("register", "size"), [("al", 1), ("ax", 2), ("eax", 4)])
@pytest.mark.parametrize("permitted", [0, 1, 2, 3, 4])
def test_every_port_of_an_access_needs_its_permission_bit(vmxlab, register, size, permitted):
    """SDM Vol. 1, 19.5.2, and 26.1.1: one bit in the TSS that is 1 makes it a #GP and not a VM exit."""
    case = user_case(
        vmxlab,
        f"in {register}, {PORT}",
        iopl=0,
        permitted=range(PORT, PORT + permitted),
        io_bitmap=IOBitmap.intercept_all(),
    )
    exit_ = vmxlab.run(case).exits[0]
    if permitted >= size:
        assert exit_.reason is ExitReason.IO_INSTRUCTION
    else:
        assert_fault(exit_, Vector.GP)


@pytest.mark.parametrize("bitmap", [MsrBitmap.intercept_all(), None], ids=["bitmap", "no bitmap"])
@pytest.mark.parametrize("msr", [Msr.IA32_SYSENTER_CS, 0x1FFF, 0x2000, Msr.IA32_KERNEL_GS_BASE], ids=hex)
@pytest.mark.parametrize("instruction", ["rdmsr", "wrmsr"])
def test_msr_access_without_privilege_faults_before_it_exits(vmxlab, instruction, msr, bitmap):
    """26.1.1 has this very example: RDMSR with CPL 3 is a #GP and not a VM exit."""
    case = user_case(vmxlab, instruction, iopl=3, msr_bitmap=bitmap, registers={"rcx": int(msr)})
    run = vmxlab.run(case)
    assert len(run.exits) == 1
    assert_fault(run.exits[0], Vector.GP)


# --- the memory operand comes last -------------------------------------------------------------------------


def ask_twice(vmxlab, case) -> tuple:
    """The first exit of `case(bitmap)` with all ports intercepted, and with none."""
    intercepted = vmxlab.run(case(IOBitmap.intercept_all()))
    assert intercepted.exits[0].full_reason == ExitReason.IO_INSTRUCTION
    assert intercepted.exits[0].rip == PROGRAM
    assert intercepted.exits[0].qualification.port == FREE_PORT
    assert len(intercepted.exits) == 2
    return vmxlab.run(case(IOBitmap.passthrough_all())).exits[0]


READ_ONLY, SMALL_LIMIT = 0xC091, 0x4093
BAD_SEGMENTS: Mapping[str, tuple[str, dict[Field, int], Vector]] = {
    "INS, ES unusable": ("insb", {Field.GUEST_ES_ACCESS_RIGHTS: UNUSABLE}, Vector.GP),
    "INS, ES read-only": ("insd", {Field.GUEST_ES_ACCESS_RIGHTS: READ_ONLY}, Vector.GP),
    "INS, beyond the limit": (
        "insb",
        {Field.GUEST_ES_LIMIT: 0xFFFF, Field.GUEST_ES_ACCESS_RIGHTS: SMALL_LIMIT},
        Vector.GP,
    ),
    "REP INS, partly beyond the limit": (
        "rep insd",
        {Field.GUEST_ES_LIMIT: 0x10002 - 1, Field.GUEST_ES_ACCESS_RIGHTS: SMALL_LIMIT},
        Vector.GP,
    ),
    "OUTS, DS unusable": ("outsb", {Field.GUEST_DS_ACCESS_RIGHTS: UNUSABLE}, Vector.GP),
    "OUTS, FS unusable": ("outs dx, byte ptr fs:[esi]", {Field.GUEST_FS_ACCESS_RIGHTS: UNUSABLE}, Vector.GP),
    "REP OUTS, beyond the limit": (
        "rep outsw",
        {Field.GUEST_DS_LIMIT: 0xFFFF, Field.GUEST_DS_ACCESS_RIGHTS: SMALL_LIMIT},
        Vector.GP,
    ),
    "OUTS, beyond the stack's limit": (
        "outs dx, byte ptr ss:[esi]",
        {Field.GUEST_SS_LIMIT: 0xFFFF, Field.GUEST_SS_ACCESS_RIGHTS: SMALL_LIMIT},
        Vector.SS,
    ),
}


@pytest.mark.parametrize("name", BAD_SEGMENTS)
def test_the_exit_comes_before_faults_of_the_segment(vmxlab, name):
    """26.1.1: VM exits of INS and OUTS have priority over the fault of an unusable segment and of an offset
    beyond its limit."""
    instruction, fields, vector = BAD_SEGMENTS[name]
    registers = {"rcx": 2, "rdx": FREE_PORT, "rsi": 0x10000, "rdi": 0x10000}

    def case(bitmap: IOBitmap) -> Case:
        program = f"{instruction}; hlt"
        return Case(
            mode=Mode.PROTECTED, io_bitmap=bitmap, program=program, fields=fields, registers=registers
        )

    assert_fault(ask_twice(vmxlab, case), vector)


@pytest.mark.parametrize("instruction", ["insb", "rep insd", "outsb", "rep outsw"])
@pytest.mark.parametrize(
    ("address", "vector", "error_code"),
    [(0x8000_0000_0000_0000, Vector.GP, 0), (0x4000_0000, Vector.PF, None)],
    ids=["not canonical", "not mapped"],
)
def test_the_exit_comes_before_faults_of_the_address(vmxlab, instruction, address, vector, error_code):
    """26.1.1: fault-like VM exits have priority over all exceptions not named there as coming first."""
    registers = {"rcx": 2, "rdx": FREE_PORT, "rsi": address, "rdi": address}

    def case(bitmap: IOBitmap) -> Case:
        return Case(io_bitmap=bitmap, program=f"{instruction}; hlt", registers=registers)

    assert_fault(ask_twice(vmxlab, case), vector, error_code)


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
@pytest.mark.parametrize("instruction", ["insb", "rep insd", "outsb", "rep outsw"])
def test_the_exit_comes_before_an_ept_violation(vmxlab, instruction):
    """26.1.1: nothing of the memory operand is accessed before the VM exit, so EPT is not looked at."""
    registers = {"rcx": 2, "rdx": FREE_PORT, "rsi": UNMAPPED, "rdi": UNMAPPED}

    def case(bitmap: IOBitmap) -> Case:
        return Case(io_bitmap=bitmap, program=f"{instruction}; hlt", registers=registers)

    violation = ask_twice(vmxlab, case)
    assert (violation.reason, violation.rip) == (ExitReason.EPT_VIOLATION, PROGRAM)
    assert violation.guest_physical_address == UNMAPPED


@pytest.mark.vmx_known_difference("kvm-io-without-alignment-check")
@pytest.mark.parametrize("instruction", ["insw", "outsd"])
def test_the_exit_comes_before_an_alignment_check(vmxlab, instruction):
    """26.1.1: VM exits of INS and OUTS have priority over #AC, which CPL 3 with CR0.AM and RFLAGS.AC has."""
    registers = {"rdx": FREE_PORT, "rsi": 0x10001, "rdi": 0x10001}
    cr0 = CR0.PE | CR0.PG | CR0.ET | CR0.NE | vmxlab.capabilities.cr0_fixed0
    fields = {Field.GUEST_CR0: int(cr0 | CR0.AM), Field.GUEST_RFLAGS: int(RFLAGS.AC | 0x3002)}

    def case(bitmap: IOBitmap) -> Case:
        return user_case(vmxlab, instruction, iopl=3, io_bitmap=bitmap, registers=registers, fields=fields)

    assert_fault(ask_twice(vmxlab, case), Vector.AC)


# --- so does the MSR ---------------------------------------------------------------------------------------

NO_MSR = (0x1FFF, 0xC0001FFF)
"""Addresses with a bit in the MSR bitmap that no processor has an MSR for."""
NOT_CANONICAL = 0x8000_0000


@pytest.mark.parametrize(
    ("instruction", "msr", "high"),
    [
        *(("rdmsr", msr, 0) for msr in NO_MSR),
        *(("wrmsr", msr, 0) for msr in NO_MSR),
        ("wrmsr", Msr.IA32_KERNEL_GS_BASE, NOT_CANONICAL),
    ],
    ids=lambda value: value if isinstance(value, str) else hex(value),
)
def test_the_exit_comes_before_faults_of_the_msr(vmxlab, instruction, msr, high):
    """26.1.1 has this example, too: RDMSR of an MSR that does not exist exits with CPL 0; without the exit
    (and for a WRMSR of what the MSR can't hold) it is #GP(0) (SDM Vol. 2B, RDMSR; Vol. 2D, WRMSR)."""
    registers = {"rcx": int(msr), "rdx": high}
    reason = ExitReason.RDMSR if instruction == "rdmsr" else ExitReason.WRMSR

    def first_exit(bitmap: MsrBitmap):
        program = f"{instruction}; hlt"
        return vmxlab.run(Case(msr_bitmap=bitmap, program=program, registers=registers)).exits[0]

    exit_ = first_exit(MsrBitmap.intercept_all())
    assert (exit_.full_reason, exit_.rip) == (reason, PROGRAM)
    assert_fault(first_exit(MsrBitmap.passthrough_all()), Vector.GP)
