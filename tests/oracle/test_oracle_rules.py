"""The oracle's rules as tables, without a machine: which exit comes, and what it records."""

from __future__ import annotations

import struct

import pytest

from vmxlab import (
    Case,
    ExitReason,
    Field,
    Mode,
    PinControls,
    PrimaryControls,
    SecondaryControls,
    VirtualApicPage,
    guest_ept,
    on,
)
from vmxlab.cases.memory import DATA, PROGRAM, UNMAPPED
from vmxlab.cases.steps import STANDARD, Enter, ReportMemory, Vmread
from vmxlab.image.layout import FREE_PAGES
from vmxlab.oracle.values import UNDEFINED, Bits, agrees
from vmxlab.sdm.apic import ApicRegister
from vmxlab.sdm.registers import Vector

P, S = PrimaryControls, SecondaryControls
E = ExitReason


APIC_PAGE = {Field.VIRTUAL_APIC_ADDRESS: 0x140_0000}


def reasons(prediction):
    return [exit_.reason for exit_ in prediction.exits]


@pytest.mark.parametrize(
    ("program", "controls", "expected"),
    [
        ("cpuid", (), E.CPUID),
        ("invd", (), E.INVD),
        ("vmcall", (), E.VMCALL),
        ("rdtsc", P.RDTSC_EXITING, E.RDTSC),
        ("rdpmc", P.RDPMC_EXITING, E.RDPMC),
        ("pause", P.PAUSE_EXITING, E.PAUSE),
        ("wbinvd", S.WBINVD_EXITING, E.WBINVD),
        ("invlpg [rax]", P.INVLPG_EXITING, E.INVLPG),
        ("rdrand eax", S.RDRAND_EXITING, E.RDRAND),
        ("rdseed eax", S.RDSEED_EXITING, E.RDSEED),
        ("rdtscp", (S.ENABLE_RDTSCP, P.RDTSC_EXITING), E.RDTSCP),
        ("invpcid rax, [rbx]", (S.ENABLE_INVPCID, P.INVLPG_EXITING), E.INVPCID),
        ("lgdt [DATA]", S.DESCRIPTOR_TABLE_EXITING, E.GDTR_IDTR_ACCESS),
        ("sldt eax", S.DESCRIPTOR_TABLE_EXITING, E.LDTR_TR_ACCESS),
        ("mov rax, dr7", P.MOV_DR_EXITING, E.MOV_DR),
        ("mov rax, cr3", P.CR3_STORE_EXITING, E.CONTROL_REGISTER_ACCESS),
        ("in al, 0x60", (), E.IO_INSTRUCTION),
        ("rdmsr", (), E.RDMSR),
        ("mov rax, [UNMAPPED]", (), E.EPT_VIOLATION),
        ("ud2", (), E.EXCEPTION_OR_NMI),
    ],
)
def test_an_instruction_that_exits(predicted, program, controls, expected):
    """Vol. 3C, 26.1.2 and 26.1.3."""
    prediction = predicted(f"nop; {program}; hlt", enable=controls)
    assert prediction.exits[0].reason is expected
    assert prediction.exits[0].rip == PROGRAM + 1
    assert all(rule.section.startswith("Vol. 3") for rule in prediction.exits[0].rules)


@pytest.mark.parametrize(
    ("program", "controls"),
    [
        ("rdtsc", P.RDTSC_EXITING),
        ("pause", P.PAUSE_EXITING),
        ("wbinvd", S.WBINVD_EXITING),
        ("invlpg [rax]", P.INVLPG_EXITING),
        ("sldt eax", S.DESCRIPTOR_TABLE_EXITING),
        ("mov rax, cr3", P.CR3_STORE_EXITING),
    ],
)
def test_without_its_control_it_is_executed(predicted, program, controls):
    prediction = predicted(f"{program}; hlt", disable=controls)
    assert reasons(prediction) == [E.HLT]
    assert prediction.complete


@pytest.mark.parametrize(
    "program", ["rdtscp", "invpcid rax, [rbx]", "getsec", "rsm", "xsetbv", "vmfunc", "mov rax, cr5"]
)
def test_undefined_opcodes_come_before_exits(predicted, program):
    """Vol. 3C, 26.1.1 and 26.3."""
    code = b"\x0f\x20\xe8" if "cr5" in program else program
    exit_ = predicted(code, enable=(P.RDTSC_EXITING, P.INVLPG_EXITING)).exits[0]
    assert exit_.raw_interruption_information == Bits(0x8000_0306, ~(1 << 12) & (1 << 64) - 1)
    assert exit_.rflags == 0x1_0002


@pytest.mark.parametrize("program", ["hlt", "invd", "clts", "rdmsr", "mov rax, cr3", "lgdt [rax]"])
def test_privilege_faults_come_before_exits(predicted, program):
    """Vol. 3C, 26.1.1: #GP(0) at CPL 3."""
    fields = {Field.GUEST_CR3: 0x14000, Field.GUEST_CS_SELECTOR: 0x0B, Field.GUEST_CS_ACCESS_RIGHTS: 0xA0FB}
    for name in ("SS", "DS", "ES", "FS", "GS"):
        fields |= {Field[f"GUEST_{name}_SELECTOR"]: 0x13, Field[f"GUEST_{name}_ACCESS_RIGHTS"]: 0xC0F3}
    tables = {0x14000: 0x15007, 0x15000: 0x16007, 0x16000: 0x87}
    data = {at: entry.to_bytes(8, "little") for at, entry in tables.items()}
    exit_ = predicted(program, fields=fields, data=data).exits[0]
    assert exit_.reason is E.EXCEPTION_OR_NMI
    assert agrees(exit_.raw_interruption_information, 0x8000_0B00 | Vector.GP)
    assert exit_.interruption_error_code == 0


@pytest.mark.parametrize(
    ("mask", "shadow", "value", "exits"),
    [(0, 0x80, 8, False), (8, 8, 8, False), (8, 0, 8, True), (8, 8, 0, True), (2, 2, 10, False)],
)
def test_mov_to_cr0_exits_by_mask_and_shadow(predicted, mask, shadow, value, exits):
    """Vol. 3C, 26.1.3, MOV to CR0, with bits that the fixed ones leave free."""
    fixed = 0x8000_0031
    prediction = predicted(
        f"mov eax, {value | fixed:#x}; mov cr0, rax; hlt",
        fields={Field.CR0_GUEST_HOST_MASK: mask, Field.CR0_READ_SHADOW: shadow},
    )
    assert (E.CONTROL_REGISTER_ACCESS in reasons(prediction)) == exits


def test_arithmetic_of_l2_is_followed(predicted):
    prediction = predicted("mov ecx, 3; xor eax, eax; 1: add eax, ecx; loop 1b; push rax; pop rbx; hlt")
    assert prediction.exits[0].registers["rax"] == 6
    assert prediction.exits[0].registers["rbx"] == 6
    assert prediction.exits[0].registers["rcx"] == 0


@pytest.mark.parametrize(
    ("bitmap", "expected"),
    [
        (0, [E.TRIPLE_FAULT]),
        (1 << Vector.DF, [E.EXCEPTION_OR_NMI]),
        (1 << Vector.GP, [E.EXCEPTION_OR_NMI]),
    ],
)
def test_an_exception_that_can_not_be_delivered(predicted, bitmap, expected):
    """Vol. 3A, 6.15, and Vol. 3C, 28.2.4: IDT-vectoring for #GP, and none for the double fault."""
    prediction = predicted("ud2", fields={Field.EXCEPTION_BITMAP: bitmap})
    assert reasons(prediction) == expected
    vectoring = prediction.exits[0].raw_idt_vectoring_information
    if bitmap == 1 << Vector.GP:
        assert agrees(vectoring, 0x8000_0306)
        assert not agrees(vectoring, 0)
        assert prediction.exits[0].interruption_error_code == Vector.UD * 8 + 3
    else:
        assert vectoring == Bits(0, 1 << 31)


def test_reactions_change_what_follows(predicted):
    reactions = [
        on(E.CPUID, first=1, times=1).set("rax", 7).skip(),
        on(E.CPUID, times=1).vmwrite("GUEST_RFLAGS", 3).skip(),
        on(E.HLT).stop(),
    ]
    prediction = predicted("cpuid; cpuid; cpuid; hlt", reactions=reactions)
    assert [exit_.rflags for exit_ in prediction.exits] == [2, 3, 3, 3]
    assert [exit_.registers["rax"] for exit_ in prediction.exits] == [0, 0, 7, 7]
    assert prediction.end == "stop"


def test_an_entry_that_fails_is_predicted(predicted):
    """Vol. 3C, 27.2 and 27.8."""
    bad_controls = predicted(fields={Field.CR3_TARGET_COUNT: 5})
    assert (bad_controls.outcomes[-1].kind, bad_controls.outcomes[-1].error) == ("valid", 7)
    assert bad_controls.end == "vmfail"
    bad_guest = predicted(fields={Field.GUEST_RFLAGS: 0})
    assert bad_guest.exits[0].full_reason == 0x8000_0021
    assert bad_guest.exits[0].raw_qualification == 0


@pytest.mark.parametrize("mode", [Mode.PROTECTED, Mode.REAL])
def test_other_modes(predicted, mode):
    prediction = predicted("mov eax, 5; cpuid; hlt", mode=mode)
    assert reasons(prediction) == [E.CPUID, E.HLT]
    assert agrees(prediction.exits[0].registers["rax"], 5)


# --- where it does not know --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "case", "why"),
    [
        ("monitor", {}, "CPUID"),
        ("vaddps ymm0, ymm0, ymm0", {}, "vaddps"),
        ("1: inc rax; jmp 1b", {}, "runs long"),
        ("rdmsr", {"registers": {"rcx": 0x1B}, "msr_bitmap": True}, "MSR 0x1b"),
        (
            "hlt",
            {"enable": (P.USE_TPR_SHADOW, S.VIRTUALIZE_X2APIC_MODE), "fields": APIC_PAGE},
            "X2APIC_MODE",
        ),
        ("in al, 0x60; cmp al, 1; je 1f; cpuid; 1: hlt", {"io": True}, "RFLAGS.ZF"),
    ],
)
def test_it_says_where_it_does_not_know(predicted, program, case, why):
    from vmxlab import IOBitmap, MsrBitmap

    case = dict(case)
    if case.pop("msr_bitmap", None):
        case["msr_bitmap"] = MsrBitmap()
    if case.pop("io", None):
        case["io_bitmap"] = IOBitmap()
    prediction = predicted(program, **case)
    assert prediction.unknown is not None
    assert why in prediction.unknown.why
    assert prediction.end is None
    assert not prediction.exits


def test_what_a_device_answers_is_unknown_and_the_rest_is_not(predicted):
    from vmxlab import IOBitmap

    prediction = predicted("in al, 0x60; mov bl, al; xor ecx, ecx; hlt", io_bitmap=IOBitmap())
    exit_ = prediction.exits[0]
    for name in ("rax", "rbx"):
        assert exit_.registers[name] == Bits(0, ~0xFF & (1 << 64) - 1)
    assert exit_.registers["rcx"] == 0
    assert [note.why for note in prediction.notes] == ["IN: what the device at port 0x60 answers"]


def test_fields_that_the_sdm_leaves_open_are_undefined(predicted):
    """Vol. 3C, 28.2."""
    exit_ = predicted("cpuid").exits[0]
    for name in ("raw_instruction_information", "guest_linear_address", "guest_physical_address"):
        assert getattr(exit_, name) is UNDEFINED
    assert exit_.instruction_length == 2
    assert predicted("mov rax, [UNMAPPED]").exits[0].instruction_length is UNDEFINED


def test_a_processor_without_ept_is_predicted_too(predicted):
    prediction = predicted("cpuid; hlt", processor="penryn")
    assert reasons(prediction) == [E.CPUID, E.HLT]
    assert prediction.exits[0].guest_physical_address == 0


def test_a_loop_to_itself_ends_by_the_timer(predicted):
    """Vol. 3C, 26.5.1."""
    assert reasons(predicted("1: jmp 1b")) == [E.PREEMPTION_TIMER]
    unknown = predicted("1: jmp 1b", disable=PinControls.ACTIVATE_PREEMPTION_TIMER)
    assert unknown.unknown is not None


def test_a_prediction_needs_nothing_but_the_case(compile_for):
    from vmxlab.oracle.predict import predict

    compiled = compile_for(Case(program="cpuid; hlt"))
    assert predict(compiled) == predict(compiled, compiled.target)


@pytest.mark.parametrize(
    ("kind", "code"),
    [(4, Vector.DB * 8 + 2), (5, Vector.DB * 8 + 3), (6, Vector.DB * 8 + 2), (3, Vector.DB * 8 + 3)],
)
def test_ext_is_0_in_delivery_of_software_interrupts_but_int1(predicted, kind, code):
    """Vol. 3A, 6.13: it is 0 for INT n, INT3 and INTO; INT1 is none of them. Here: no IDT entry."""
    vector = Vector.BP if kind == 6 else Vector.DB
    fields = {
        Field.ENTRY_INTERRUPTION_INFORMATION: 1 << 31 | kind << 8 | vector,
        Field.ENTRY_INSTRUCTION_LENGTH: 1,
    }
    exit_ = predicted(fields=fields).exits[0]
    assert exit_.interruption_error_code == code + (vector - Vector.DB) * 8


@pytest.mark.parametrize(("value", "expected"), [(7, [E.HLT]), (4, [E.HLT]), (3, [E.TPR_BELOW_THRESHOLD])])
def test_mov_to_cr8_exits_below_the_threshold(predicted, value, expected):
    """Vol. 3C, 30.1.2 and 30.3: behind the instruction, and VTPR is written."""
    page = VirtualApicPage({ApicRegister.TASK_PRIORITY: 0x5F})
    program = f"mov rbx, cr8; mov al, {value}; mov cr8, rax; mov rcx, cr8; hlt"
    prediction = predicted(program, virtual_apic_page=page, fields={Field.TPR_THRESHOLD: 4})
    assert reasons(prediction) == expected
    assert prediction.exits[0].registers["rbx"] == 5
    if expected == [E.HLT]:
        assert prediction.exits[0].registers["rcx"] == value
    else:
        assert prediction.exits[0].rip == PROGRAM + 4 + 2 + 4


def test_vm_entry_looks_at_vtpr_each_time(predicted):
    """Vol. 3C, 27.2.1.1: what L2 has written there may make the next VM entry fail."""
    prediction = predicted(
        "mov al, 2; mov cr8, rax; hlt",
        virtual_apic_page=VirtualApicPage({ApicRegister.TASK_PRIORITY: 0x50}),
        fields={Field.TPR_THRESHOLD: 3},
        reactions=[on(E.TPR_BELOW_THRESHOLD).resume()],
    )
    assert reasons(prediction) == [E.TPR_BELOW_THRESHOLD]
    assert (prediction.outcomes[-1].operation, prediction.outcomes[-1].error) == ("vmresume", 7)


@pytest.mark.parametrize(
    ("kind", "descriptor", "expected"),
    [
        (0, 0, E.HLT),
        (3, 0, E.HLT),
        (4, 0, E.EXCEPTION_OR_NMI),
        (2, 1 << 12, E.EXCEPTION_OR_NMI),
        (1, 5, E.EXCEPTION_OR_NMI),
        (2, 5, E.HLT),
        (0, 1 << 127, E.EXCEPTION_OR_NMI),
        (2, 1 << 127, E.HLT),
    ],
)
def test_invpcid_checks_its_operands(predicted, kind, descriptor, expected):
    """Vol. 2A, INVPCID, with CR4.PCIDE 0."""
    data = {DATA: descriptor.to_bytes(16, "little")}
    prediction = predicted(
        "invpcid rax, [DATA]; hlt", registers={"rax": kind}, data=data, enable=S.ENABLE_INVPCID
    )
    assert reasons(prediction) == [expected]
    assert prediction.complete


def test_l2_that_enters_into_hlt_is_woken_by_the_windows(predicted):
    """Vol. 3C, 27.7.5: the activity state is saved as HLT."""
    fields = {Field.GUEST_ACTIVITY_STATE: 1, Field.GUEST_RFLAGS: 0x202}
    watch = [Field.GUEST_ACTIVITY_STATE]
    prediction = predicted(fields=fields, watch=watch, enable=P.INTERRUPT_WINDOW_EXITING)
    assert reasons(prediction) == [E.INTERRUPT_WINDOW]
    assert prediction.exits[0].watched[Field.GUEST_ACTIVITY_STATE] == 1


def test_a_violation_of_a_page_that_was_read_is_not_taken_for_an_old_translation(predicted):
    """The accessed flags that the processor sets itself do not make its translations old."""
    ept = guest_ept()
    ept.protect(DATA + 0x1000, 0x1000, write=False)
    prediction = predicted("mov rax, [DATA + 0x1000]; mov [DATA + 0x1000], rax; hlt", ept=ept)
    assert reasons(prediction) == [E.EPT_VIOLATION]
    assert prediction.complete


def test_the_error_of_a_failed_entry_can_be_read(predicted):
    steps = (*STANDARD[:-1], Enter(go_on=True), Vmread(Field.VM_INSTRUCTION_ERROR))
    assert predicted(fields={Field.CR3_TARGET_COUNT: 9}, steps=steps).outcomes[-1].value == 7
    assert predicted(fields={Field.HOST_TR_SELECTOR: 0}, steps=steps).outcomes[-1].value == 8


@pytest.mark.parametrize(("in_use", "expected"), [(0, E.EXCEPTION_OR_NMI), (0xFFFF_FFFF, E.EPT_VIOLATION)])
def test_a_violation_is_converted_where_the_information_area_is_free(predicted, in_use, expected):
    """Vol. 3C, 26.5.7.1 and 26.5.7.2."""
    area = FREE_PAGES
    prediction = predicted(
        "mov rax, [UNMAPPED]; hlt",
        processor="icelake",
        enable=S.EPT_VIOLATION_VE,
        memory={area: struct.pack("<QQ", in_use << 32, 0) + bytes(4080)},
        fields={Field.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS: area, Field.EPTP_INDEX: 0x1234},
        steps=(*STANDARD, ReportMemory(area, 40)),
    )
    (exit_,) = prediction.exits
    assert exit_.reason is expected
    if expected is E.EXCEPTION_OR_NMI:
        assert agrees(exit_.raw_interruption_information, 0x8000_0300 | Vector.VE)
        content = prediction.memory[area]
        assert content[:8] == (48, 0, 0, 0, 255, 255, 255, 255)
        assert content[16:32] == tuple(struct.pack("<QQ", UNMAPPED, UNMAPPED))
        assert content[32:34] == (0x34, 0x12)
