"""What a case becomes: the order of things, and the VMCS. Read back by an independent reader."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vmxlab import (
    Case,
    ControlSet,
    Ept,
    ExitReason,
    Field,
    IOBitmap,
    Limits,
    Mode,
    PinControls,
    PrimaryControls,
    VmxRegion,
)
from vmxlab.cases import memory
from vmxlab.errors import OutOfRange
from vmxlab.image import layout
from vmxlab.image.compiler import compile_case, compile_cases
from vmxlab.sdm.registers import GENERAL_REGISTERS

HLT = b"\xf4"
L2 = memory.L2_MEMORY


# --- the whole ----------------------------------------------------------------------------------------------


def test_a_script_starts_with_the_case_and_ends_with_its_end(script_of):
    script = script_of(name="first", number=7)
    assert (script.operations[0].name, script.operations[-1].name) == ("CASE", "END")
    assert (script.operations[0]["number"], script.operations[0].rest) == (7, "first")


def test_the_standard_steps_in_their_order(script_of):
    names = script_of().names
    assert names == [
        *("CASE", "REGISTERS", "DEFAULTS", "WATCH"),
        *("VMXON", "VMCLEAR", "VMPTRLD", "VMWRITES", "ENTER", "END"),
    ]


def test_all_memory_is_laid_out_before_the_first_step(script_of):
    script = script_of(io_bitmap=IOBitmap(), data={0x10000: b"x"}, memory={layout.FREE_PAGES: b"y"})
    first_step = [op.name for op in script.operations].index("VMXON")
    after = {op.name for op in script.operations[first_step:]}
    assert not after & {"FILL", "DATA", "SEQUENCE", "REVISION"}


def test_the_regions_hold_the_processors_own_revision_identifier(script_of):
    script = script_of()
    read = script.read(revision=0x1234_5678)
    for step in ("VMXON", "VMCLEAR", "VMPTRLD"):
        assert script.one(step)["region"] % 4096 == 0
        assert read(script.one(step)["region"]) == (0x1234_5678).to_bytes(4, "little") + bytes(4092)
    assert script.one("VMXON")["region"] != script.one("VMPTRLD")["region"]
    assert script.one("VMCLEAR")["region"] == script.one("VMPTRLD")["region"]


@pytest.mark.parametrize(("name", "step"), [("vmxon_region", "VMXON"), ("vmcs_region", "VMPTRLD")])
def test_a_region_of_its_own_is_taken_as_it_is(script_of, name, step):
    region = VmxRegion(0x7FFF_FFFF, shadow=True)
    script = script_of(**{name: region})
    assert script.read()(script.one(step)["region"]) == region.to_bytes()
    assert script.one(step)["region"] not in [op["address"] for op in script.all("REVISION")]
    assert len(script.all("REVISION")) == 1


def test_a_shadow_vmcs_has_the_processors_revision_and_the_shadow_bit(script_of):
    script = script_of(shadow_vmcs=True)
    link = script.fields[Field.VMCS_LINK_POINTER]
    assert script.read(revision=5)(link, 4) == (0x8000_0005).to_bytes(4, "little")


def test_registers_are_set_by_their_number(script_of):
    """SDM order: rax, rcx, rdx, rbx, rsp, ...; RSP is a field of the VMCS."""
    values = {name: 0x100 + i for i, name in enumerate(GENERAL_REGISTERS)}
    script = script_of(registers=values)
    assert script.one("REGISTERS").rest == {i: 0x100 + i for i in range(16) if i != 4}
    assert script.fields[Field.GUEST_RSP] == 0x104


def test_limits_and_watched_fields_reach_the_monitor(script_of):
    script = script_of(limits=Limits(exits=3), watch=[Field.GUEST_CR0, "guest cr3"])
    assert script.one("ENTER").operands == {"resume": 0, "max_exits": 3}
    assert script.one("WATCH").rest == [0x6800, 0x6802]


def test_default_actions_stand_at_their_exit_reason(script_of):
    table = script_of().one("DEFAULTS")["actions"]
    stop, skip = 0, 1
    assert len(table) == 128
    assert table[ExitReason.CPUID] == table[ExitReason.IO_INSTRUCTION] == skip
    assert table[ExitReason.HLT] == table[ExitReason.EPT_VIOLATION] == table[127] == stop


# --- the VMCS -----------------------------------------------------------------------------------------------

MODES = pytest.mark.parametrize("mode", [Mode.LONG, Mode.PROTECTED], ids=lambda mode: mode.name)


@MODES
def test_each_field_is_written_once(compiled, read_script, target_for, processors, mode):
    for name in processors:
        done = compiled(name, mode=mode)
        pairs = read_script(b"".join(done.units)).one("VMWRITES").rest
        assert len(pairs) == len({field for field, _ in pairs})
        assert dict(pairs) == done.fields == {int(f): v for f, v in done.fields.items()}


@MODES
def test_every_value_fits_its_field(compiled, processors, mode):
    for name in processors:
        for field, value in compiled(name, mode=mode, shadow_vmcs=True).fields.items():
            assert 0 <= value <= field.max


def test_controls_are_those_of_the_capabilities(compiled):
    done = compiled("haswell", enable=PrimaryControls.RDTSC_EXITING)
    for controls, value in done.controls.items():
        assert done.fields[controls.field] == value
    assert done.controls[ControlSet.PRIMARY] & PrimaryControls.RDTSC_EXITING


def test_the_host_state_leads_back_into_the_monitor(compiled, paper_monitor):
    fields = compiled().fields
    assert fields[Field.HOST_RIP] == paper_monitor.exit_entry
    assert fields[Field.HOST_RSP] == paper_monitor.exit_stack_top
    assert fields[Field.HOST_CR3] == paper_monitor.page_table_root
    assert fields[Field.HOST_GDTR_BASE] == paper_monitor.gdt
    assert fields[Field.HOST_IDTR_BASE] == paper_monitor.idt
    assert fields[Field.HOST_TR_BASE] == paper_monitor.tss


def test_the_host_state_passes_the_checks_of_vm_entry(processor, target_for, processors):
    """SDM Vol. 3C, 27.2.2 and 27.2.3: CR0 and CR4 by the fixed bits; selectors with RPL and TI 0."""
    name = next(name for name, value in processors.items() if value is processor)
    fields = compile_case(Case(program=HLT), target_for(name)).fields
    for field, fixed0 in ((Field.HOST_CR0, 0x486), (Field.HOST_CR4, 0x488)):
        assert fields[field] & processor.raw[fixed0] == processor.raw[fixed0]
        assert not fields[field] & ~processor.raw[fixed0 + 1]
    assert fields[Field.HOST_CR4] & 1 << 5, "CR4.PAE, as a 64-bit host needs"
    for register in ("ES", "CS", "SS", "DS", "FS", "GS", "TR"):
        assert fields[Field[f"HOST_{register}_SELECTOR"]] & 7 == 0
    assert fields[Field.HOST_CS_SELECTOR] and fields[Field.HOST_TR_SELECTOR]


@pytest.mark.parametrize(
    "field", [Field.GUEST_RIP, Field.HOST_RIP, Field.EPT_POINTER, Field.EXCEPTION_BITMAP]
)
def test_a_field_of_the_case_replaces_the_baselines(compiled, field):
    baseline, changed = compiled().fields, compiled(fields={field: 0x1234}).fields
    assert changed == {**baseline, field: 0x1234}
    assert list(changed) == list(baseline), "in its place, as the order matters to nobody but a reader"


def test_a_field_the_baseline_has_not_comes_last(compiled):
    fields = compiled(fields={"VPID": 5}).fields
    assert list(fields)[-1] is Field.VPID
    assert fields[Field.VPID] == 5


def test_a_field_wins_over_the_register_of_the_same_name(compiled):
    assert compiled(registers={"rsp": 1}, fields={Field.GUEST_RSP: 2}).fields[Field.GUEST_RSP] == 2


def test_raw_controls_are_written_even_where_they_are_zero(compiled):
    done = compiled(raw_controls={ControlSet.PIN: 0, ControlSet.SECONDARY: 0})
    assert done.fields[Field.PIN_BASED_CONTROLS] == 0
    assert done.fields[Field.SECONDARY_PROCESSOR_BASED_CONTROLS] == 0


@pytest.mark.parametrize("name", ["penryn", "skylake"])
def test_fields_of_efer_exist_only_with_their_controls(compiled, name):
    """IA32_EFER is loaded and saved by controls that the first processors lack."""
    fields = compiled(name).fields
    assert (Field.GUEST_IA32_EFER in fields) == (Field.HOST_IA32_EFER in fields) == (name == "skylake")


# --- the preemption timer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "l2_tsc", "value"),
    [(0, 1000, 1000), (5, 1000, 31), (5, 1, 1), (31, 1 << 40, 1 << 9), (0, 0xFFFF_FFFF, 0xFFFF_FFFF)],
)
def test_the_preemption_timer_counts_in_its_own_rate(compiled, target_for, processors, rate, l2_tsc, value):
    """SDM Vol. 3C, 26.5.1: it counts down by 1 whenever bit X of the TSC changes, X in IA32_VMX_MISC[4:0]."""
    raw = dict(processors["skylake"].raw)
    raw[0x485] = raw[0x485] & ~0x1F | rate
    target = type(target_for("skylake"))(
        type(processors["skylake"])(raw), target_for("skylake").monitor, l2_tsc=1_000_000
    )
    fields = compiled(target=target, limits=Limits(l2_tsc=l2_tsc)).fields
    assert fields[Field.VMX_PREEMPTION_TIMER_VALUE] == value


def test_without_a_limit_the_engines_is_taken(compiled):
    assert compiled().fields[Field.VMX_PREEMPTION_TIMER_VALUE] == 1_000_000


def test_a_limit_that_the_timer_can_not_hold_is_refused(refused):
    error = refused(OutOfRange, limits=Limits(l2_tsc=1 << 32))
    assert (error.what, error.value) == ("Limits.l2_tsc", 1 << 32)


@pytest.mark.parametrize("case", [{}, {"limits": Limits(l2_tsc=1000)}])
def test_no_timer_no_field(compiled, case):
    assert Field.VMX_PREEMPTION_TIMER_VALUE not in compiled("penryn", **case).fields
    off = compiled(disable=PinControls.ACTIVATE_PREEMPTION_TIMER, **case)
    assert Field.VMX_PREEMPTION_TIMER_VALUE not in off.fields


# --- many, and again ----------------------------------------------------------------------------------------


def test_cases_are_numbered_in_order_and_keep_their_programs(target_for, read_script):
    cases = [Case(program=f"mov eax, {i}; hlt") for i in range(3)]
    scripts = [
        read_script(b"".join(done.units))
        for done in compile_cases(cases, target_for("skylake"), first_number=5)
    ]
    assert [script.operations[0]["number"] for script in scripts] == [5, 6, 7]
    codes = [script.read()(L2 + memory.PROGRAM, 6) for script in scripts]
    assert codes == [b"\xb8" + i.to_bytes(4, "little") + HLT for i in range(3)]


RICH = """
from vmxlab import *
from vmxlab.image.frames import pack_payload
from vmxlab.image.rom import pack_elf, pack_rom
from vmxlab.image.compiler import Target, compile_cases
from vmxlab.image.monitor import load_monitor
from vmxlab.structures.processors import named_processor
import hashlib

bitmap = IOBitmap.passthrough_all()
bitmap.set_intercept_of_range(0x60, 9, True)
ept = guest_ept()
ept.map(0x40000000, 0x1400000, length=0x5000, write=False)
cases = [
    Case(program=b"\\xe4\\x60\\xf4", io_bitmap=bitmap, msr_bitmap=MsrBitmap.intercept_all(), ept=ept,
         enable={SecondaryControls.ENABLE_VPID, PrimaryControls.RDTSC_EXITING, PinControls.VIRTUAL_NMIS},
         registers={"rbx": 1, "r9": 2, "rax": 3}, fields={"VPID": 1, Field.TSC_OFFSET: 2},
         data={0x10000: b"a", 0x11000: b"b"}, reactions=[on(ExitReason.CPUID).set("rax", 1).skip()]),
    Case(program=b"\\xf4", mode=Mode.PROTECTED, raw_controls={ControlSet.PIN: 0x16}),
]
monitor = load_monitor()
target = Target(named_processor("corei7_skylake_x").capabilities, monitor, 1000000)
payload = pack_payload([done.units for done in compile_cases(cases, target)])
for packed in (payload, pack_rom(monitor, payload), pack_elf(monitor, payload)):
    print(hashlib.sha256(packed).hexdigest())
"""


def test_the_same_cases_give_the_same_bytes_in_every_process():
    """Images are reproducible: no set's order, no address, no date is in them."""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", RICH],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("0", "1")
    }
    (output,) = outputs
    assert len(output.split()) == 3


def test_compiling_a_case_again_gives_the_same_script(compiled):
    case = {"io_bitmap": IOBitmap.intercept_all(), "registers": {"rax": 1, "rbx": 2}, "number": 3}
    assert compiled(**case).units == compiled(**case).units


def test_more_ept_tables_than_there_is_room_for_are_refused(refused):
    ept = Ept()
    for number in range(layout.EPT_TABLES_MAX - 3):
        ept.map(number << 30, layout.FREE_PAGES)
    assert ept.table_count > layout.EPT_TABLES_MAX
    assert "EPT paging structures" in str(refused(OutOfRange, ept=ept))
