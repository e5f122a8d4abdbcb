"""Two logs beside each other: which case is which, what differs, and what may."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmxlab import ExitReason, Field, Msr
from vmxlab.console.records import encode_record
from vmxlab.console.run import Exit
from vmxlab.image import layout
from vmxlab.oracle.prediction import EXIT_ATTRIBUTES
from vmxlab.reports.log_diff import LogDiff, compare_logs, may_differ
from vmxlab.reports.story import Storyteller
from vmxlab.sdm.apic import ApicRegister

LOG = Path(__file__).with_name("serial.log").read_bytes()
BOOT = LOG[: LOG.index(b"\n# @code")] + b"\n"


def line(kind: str, **values: str | int) -> bytes:
    return encode_record(kind, values).encode() + b"\n"


def read(log: bytes) -> Storyteller:
    teller = Storyteller(keep=True)
    for _ in [*teller.feed(log), *teller.close()]:
        pass
    return teller


def diff(one: bytes, other: bytes) -> LogDiff:
    return compare_logs(read(one), read(other))


def a_case(*records: bytes, number: int = 0, name: str = "x", why: str = "stop") -> bytes:
    count = sum(record.startswith(b"@exit") for record in records)
    named = {"name": name} if name else {}
    return line("case", id=number, **named) + b"".join(records) + line("end", id=number, why=why, exits=count)


def an_exit(n: int = 0, reason: int = ExitReason.HLT, rip: int = 0x8000, **values: int) -> bytes:
    return line("exit", n=n, reason=int(reason), rip=rip, **values)


def differences(one: bytes, other: bytes) -> list[tuple[str, str]]:
    """(where, what) of what differs in one case."""
    (case,) = diff(BOOT + one, BOOT + other).cases
    return [(d.where, d.what) for d in case.differences]


def left_out(one: bytes, other: bytes) -> list[may_differ.MayDiffer]:
    """Why what differs in one case may; nothing else may differ in it."""
    (case,) = diff(BOOT + one, BOOT + other).cases
    assert case.differences == ()
    return [d.left_out for d in case.left_out]


# --- which case is which ------------------------------------------------------------------------------------


def test_log_is_the_same_as_itself():
    found = diff(LOG, LOG)
    assert found.same
    assert len(found.cases) == 7
    assert all(case.everything == () for case in found.cases)


def test_cases_are_matched_by_name_wherever_they_stand():
    one = a_case(name="a", number=0) + a_case(name="b", number=1)
    other = a_case(name="b", number=0) + a_case(name="c", number=1) + a_case(name="a", number=2)
    found = diff(BOOT + one, BOOT + other)
    assert [(case.one.run.name, case.other.run.name) for case in found.cases] == [("a", "a"), ("b", "b")]
    assert [told.run.name for told in found.only_other] == ["c"]
    assert not found.same


def test_cases_of_one_name_are_matched_in_their_order():
    one = a_case(an_exit(rip=1)) + a_case(an_exit(rip=2))
    found = diff(BOOT + one, BOOT + one)
    assert found.same
    found = diff(BOOT + one, BOOT + a_case(an_exit(rip=1)))
    assert (len(found.cases), len(found.only_one)) == (1, 1)


def test_cases_without_a_name_are_matched_by_number_and_else_by_position():
    one = a_case(name="", number=3) + a_case(name="", number=4)
    found = diff(BOOT + one, BOOT + a_case(name="", number=4) + a_case(name="", number=9))
    assert [(case.one.run.number, case.other.run.number) for case in found.cases] == [(3, 9), (4, 4)]
    assert found.same


def test_live_command_is_no_case():
    live = line("live", id=0) + line("end", id=0, why="stop", exits=0)
    found = diff(BOOT + live, BOOT + a_case(name="", number=0))
    assert (len(found.cases), len(found.only_one), len(found.only_other)) == (0, 1, 1)


# --- what differs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (a_case(an_exit(qual=1)), a_case(an_exit(qual=2)), [("exit 0 HLT", "qualification")]),
        (a_case(an_exit(len=1)), a_case(an_exit(len=2)), [("exit 0 HLT", "instruction length")]),
        (a_case(an_exit(rip=1)), a_case(an_exit(rip=2)), [("exit 0 HLT", "rip")]),
        (a_case(an_exit(rflags=2)), a_case(an_exit(rflags=3)), [("exit 0 HLT", "rflags")]),
        (a_case(an_exit(r9=2)), a_case(an_exit()), [("exit 0 HLT", "r9")]),
        (a_case(an_exit(f6800=1)), a_case(an_exit(f6800=3)), [("exit 0 HLT", "GUEST_CR0")]),
        (a_case(an_exit(f6800=1)), a_case(an_exit()), [("exit 0 HLT", "GUEST_CR0")]),
        (a_case(), a_case(why="limit"), [("end", "why")]),
        (a_case(line("memory", at=8, data="00" * 16)), a_case(line("memory", at=8, data="00" * 15 + "01")), [
            ("memory at 0x8", "at +0x8")
        ]),
        (a_case(line("memory", at=8, data="00")), a_case(), [("memory at 0x8", "length")]),
        (a_case(line("vmx", op="vmxon", rc="ok")), a_case(line("vmx", op="vmxon", rc="invalid")), [
            ("outcome 0 VMXON", "outcome")
        ]),
        (a_case(line("vmx", ok="vmxon,vmclear")), a_case(line("vmx", ok="vmxon,vmptrld")), [
            ("outcome 1", "instruction")
        ]),
        (a_case(line("vmx", ok="vmwrite:0x2")), a_case(line("vmx", ok="vmwrite:0x3")), [
            ("outcome 0 VMWRITE", "fields written")
        ]),
        (
            a_case(line("fault", vector=14, code=0, rip=1, cr2=1)),
            a_case(line("fault", vector=13, code=0, rip=1, cr2=1)),
            [("fault 0", "in L1")],
        ),
        (
            a_case(line("exit", n=0, reason=0x8000_0021, rip=1), line("vmcs", f681e=1)),
            a_case(line("exit", n=0, reason=0x8000_0021, rip=1), line("vmcs", f681e=2)),
            [("failed VM entry", "GUEST_RIP")],
        ),
    ],
    ids=range(15),
)  # fmt: skip
def test_each_field_is_compared(one, other, expected):
    assert differences(one, one) == []
    assert differences(one, other) == expected


def test_behind_a_reason_that_differs_only_reasons_are_compared():
    one = a_case(an_exit(0), an_exit(1, 10, rax=1), an_exit(2, 12, rax=1), an_exit(3, 12))
    other = a_case(an_exit(0), an_exit(1, 18, rax=2), an_exit(2, 12, rax=2))
    assert differences(one, other) == [("exit 1", "reason"), ("exits", "number")]


def test_case_that_the_log_ends_in_differs_from_one_that_ended():
    (case,) = diff(BOOT + a_case(an_exit()), BOOT + line("case", id=0, name="x") + an_exit()).cases
    assert [(d.what, d.other) for d in case.differences] == [("why", "none: the log ends in it")]


def test_broken_rules_are_named():
    index = LOG.index(b"# @code id=0x3")
    whole = LOG[index : LOG.index(b"# @code id=0x4")]
    fixed = BOOT + whole.replace(b"f6820=0x0", b"f6820=0x2")
    vmcs = next(part for part in fixed.splitlines() if b"f6820=0x2" in part)
    body = dict(word.split("=") for word in vmcs[:-5].decode().split(" ")[1:])
    fixed = fixed.replace(vmcs, line("vmcs", **body).strip())
    (case,) = diff(BOOT + whole, fixed).cases
    assert [(d.what, d.one, d.other) for d in case.differences] == [
        ("broken rules", "guest-rflags-reserved", "-"),
        ("GUEST_RFLAGS", "0x0", "0x2"),
    ]


# --- what may differ ----------------------------------------------------------------------------------------

EPT, CR, IO = ExitReason.EPT_VIOLATION, ExitReason.CONTROL_REGISTER_ACCESS, ExitReason.IO_INSTRUCTION
IN, INS, LINEAR, PAGE_FAULT = 0x60_0008, 0x60_0018, 0x182, 0x8000_0B0E


@pytest.mark.parametrize(
    ("reason", "both", "key", "may"),
    [
        (ExitReason.HLT, {}, "gla", True),
        (ExitReason.HLT, {}, "gpa", True),
        (ExitReason.HLT, {}, "info", True),
        (ExitReason.HLT, {}, "ierr", True),
        (ExitReason.HLT, {}, "iderr", True),
        (ExitReason.HLT, {}, "intr", True),
        (ExitReason.HLT, {}, "idtv", True),
        (ExitReason.HLT, {}, "len", False),
        (ExitReason.HLT, {}, "qual", False),
        (EPT, {"qual": LINEAR}, "gla", False),
        (EPT, {"qual": 2}, "gla", True),
        (EPT, {"qual": LINEAR}, "gpa", False),
        (EPT, {"qual": LINEAR}, "len", True),
        (EPT, {"qual": LINEAR, "idtv": 0x8000_0421}, "len", False),
        (ExitReason.EPT_MISCONFIGURATION, {}, "gpa", False),
        (ExitReason.EPT_MISCONFIGURATION, {}, "gla", True),
        (IO, {"qual": IN}, "info", True),
        (IO, {"qual": IN}, "gla", True),
        (IO, {"qual": INS}, "gla", False),
        (CR, {"qual": 0x70}, "gla", False),
        (CR, {"qual": 0x10}, "gla", True),
        (ExitReason.EXCEPTION_OR_NMI, {"intr": 0x8000_0306}, "len", True),
        (ExitReason.EXCEPTION_OR_NMI, {"intr": 0x8000_0603}, "len", False),
        (ExitReason.EXCEPTION_OR_NMI, {"intr": PAGE_FAULT}, "ierr", False),
        (ExitReason.EXCEPTION_OR_NMI, {"intr": 0x8000_0306}, "ierr", True),
        (ExitReason.TASK_SWITCH, {"qual": 0x8000_0028}, "len", False),
        (ExitReason.TASK_SWITCH, {"qual": 0xC000_0028}, "len", True),
        (ExitReason.MONITOR_TRAP_FLAG, {}, "len", True),
        (ExitReason.EXTERNAL_INTERRUPT, {"intr": 0x8000_0020}, "rax", True),
        (ExitReason.PREEMPTION_TIMER, {}, "rflags", True),
        (ExitReason.HLT, {}, "f482e", True),
        (ExitReason.HLT, {}, "f640a", True),
        (0x8000_0021, {}, "len", True),
        (0x8000_0021, {}, "qual", False),
        (0x8000_0021, {}, "rflags", False),
    ],
)
def test_field_may_differ_where_the_sdm_leaves_it_undefined(reason, both, key, may):
    one, other = (a_case(an_exit(reason=reason, **{**both, key: value})) for value in (1, 3))
    if may:
        assert len(left_out(one, other)) == 1
    else:
        assert len(differences(one, other)) == 1


@pytest.mark.parametrize(
    ("reason", "key", "one", "other", "may"),
    [
        (EPT, "qual", 0x02, 0x102, True),  # bit 8 needs bit 7
        (EPT, "qual", 0x82, 0x182, False),
        (EPT, "qual", 0x82, 0xE82, True),  # bits 11:9 need bits 7 and 8
        (EPT, "qual", 0x182, 0x382, False),
        (ExitReason.HLT, "idtv", 0x8000_0303, 0x8000_1303, True),  # bit 12 is undefined
        (ExitReason.HLT, "idtv", 0x8000_0303, 0x8000_0304, False),
        (ExitReason.HLT, "idtv", 0x8000_0303, 0x303, False),
        (ExitReason.EXCEPTION_OR_NMI, "intr", 0x8000_030E, 0x8000_130E, False),
        (ExitReason.EXCEPTION_OR_NMI, "intr", 0x8000_0308, 0x8000_1308, True),  # of a double fault
        (ExitReason.TRIPLE_FAULT, "rflags", 2, 0x1_0002, True),  # RF
        (ExitReason.TRIPLE_FAULT, "rflags", 2, 0x1_0003, False),
        (ExitReason.RDRAND, "info", 0x18, 0x1_0018, True),  # bit 16 is none of its format
        (ExitReason.RDRAND, "info", 0x18, 0x20, False),
    ],
)
def test_single_bits_may_differ(reason, key, one, other, may):
    cases = [a_case(an_exit(reason=reason, **{key: value})) for value in (one, other)]
    assert len(left_out(*cases) if may else differences(*cases)) == 1


def code(data: str) -> bytes:
    return b"# " + line("code", id=0, mode="long", at=0x8000, data=data)


def test_what_a_clock_gave_may_differ_as_long_as_the_register_holds_it():
    """rdtsc; cpuid; mov ebx, eax; hlt; hlt: EBX is a copy."""
    program = code("0f310fa289c3f4f4")
    one, other = (
        program
        + a_case(
            an_exit(0, 10, 0x8002, rax=value, rdx=value + 1),
            an_exit(1, 12, 0x8006, rbx=value),
            an_exit(2, 12, 0x8007, rax=5 if value == 1 else 6),
        )
        for value in (1, 100)
    )
    (case,) = diff(BOOT + one, BOOT + other).cases
    assert {(d.where[:6], d.what) for d in case.left_out} == {
        *(("exit 0", name) for name in ("rax", "rdx")),
        *(("exit 1", name) for name in ("rax", "rdx", "rbx")),
        *(("exit 2", name) for name in ("rdx", "rbx")),
    }
    assert [(d.where, d.what) for d in case.differences] == [("exit 2 HLT", "rax")]


def test_clock_that_l2_has_not_come_to_explains_nothing():
    program = code("0fa20f31f4")  # cpuid; rdtsc; hlt
    one, other = (program + a_case(an_exit(0, 10, 0x8000, rax=value)) for value in (1, 2))
    assert differences(one, other) == [("exit 0 CPUID", "rax")]


def test_clock_that_exits_is_none():
    program = code("0f31f4")  # rdtsc; hlt
    one, other = (
        program + a_case(an_exit(0, ExitReason.RDTSC, 0x8000), an_exit(1, 12, 0x8002, rax=value))
        for value in (1, 2)
    )
    assert differences(one, other) == [("exit 1 HLT", "rax")]


@pytest.mark.parametrize(
    ("data", "register"),
    [("0fc7f1", "rcx"), ("490fc7f1", "r9"), ("0fc7fa", "rdx"), ("ec", "rax"), ("0f33", "rdx")],
)
def test_random_numbers_counters_and_devices_are_clocks_too(data, register):
    rip = 0x8000 + len(data) // 2
    one, other = (code(data + "f4") + a_case(an_exit(rip=rip, **{register: value})) for value in (1, 2))
    assert len(left_out(one, other)) == 1


@pytest.mark.parametrize(
    "values",
    [
        {"op": "rdmsr", "msr": int(Msr.IA32_TSC)},
        {"op": "vmread", "field": int(Field.VMX_PREEMPTION_TIMER_VALUE)},
        {"op": "apic-read", "register": int(ApicRegister.CURRENT_COUNT)},
    ],
    ids=lambda values: values["op"],
)
def test_what_l1_reads_of_time_may_differ(values):
    one, other = (a_case(line("vmx", **values, value=value, rc="ok")) for value in (1, 2))
    assert len(left_out(one, other)) == 1


def test_timer_in_the_vmcs_of_a_failed_entry_may_differ():
    failed = line("exit", n=0, reason=0x8000_0021, rip=1)
    one, other = (a_case(failed, line("vmcs", f482e=value)) for value in (1, 2))
    assert left_out(one, other) == [may_differ.TIMER]


def test_time_stamp_counter_in_the_area_of_stored_msrs_may_differ():
    def stored(msr: int, value: int) -> bytes:
        entry = msr.to_bytes(8, "little") + value.to_bytes(8, "little")
        return a_case(line("memory", at=layout.EXIT_MSR_STORE_AREA, data=entry.hex()))

    assert left_out(stored(Msr.IA32_TSC, 1), stored(Msr.IA32_TSC, 2)) == [may_differ.TSC]
    assert len(differences(stored(Msr.IA32_EFER, 1), stored(Msr.IA32_EFER, 2))) == 1


def test_addresses_of_the_monitor_may_differ_between_two_builds_only():
    one, other = (a_case(an_exit(f6c16=value)) for value in (0x1000, 0x2000))
    assert differences(one, other) == [("exit 0 HLT", "HOST_RIP")]
    rebuilt = line("boot", protocol=1, build=0x1234, vmx=1)
    assert diff(BOOT + one, rebuilt + other).same


def test_each_thing_that_may_differ_has_its_reason_and_its_section():
    assert all(item.why and item.section for item in may_differ.TABLE)
    constants = {value for value in vars(may_differ).values() if isinstance(value, may_differ.MayDiffer)}
    assert constants == set(may_differ.TABLE)


def test_what_the_oracle_calls_undefined_is_left_out_too():
    """A field of which an exit's record says nothing is undefined in the oracle's eyes as well."""
    exit_ = Exit(0, int(ExitReason.HLT))
    undefined = {name for name in EXIT_ATTRIBUTES if may_differ.of_exit(name, exit_, exit_) is not None}
    assert undefined == {
        "raw_instruction_information",
        "guest_linear_address",
        "guest_physical_address",
        "raw_interruption_information",
        "interruption_error_code",
        "raw_idt_vectoring_information",
        "idt_vectoring_error_code",
    }
