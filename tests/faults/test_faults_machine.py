"""A machine that dies or hangs, at each stage of its life: a typed error, and the next case runs."""

import os
import random
import signal
import struct

import pytest

from vmxlab import Case, ExitReason, Limits
from vmxlab.console.records import parse_log
from vmxlab.console.run import End, Verdict
from vmxlab.errors import MachineDied, MachineError, MachineHung
from vmxlab.sdm.fields import Field
from vmxlab.sdm.msrs import Msr

from .conftest import (
    HANGS,
    KILLS_L1,
    STREAM,
    assert_crash,
    assert_goes_on,
    assert_good,
    caught,
    exits_in,
    good,
    is_gone,
    meddling,
    tap,
    wait_until,
)

both = pytest.mark.parametrize("engine", ["bochs", "tcg"])

ROM_BYTES = 64 << 10
RESET_VECTOR = ROM_BYTES - 16


def rom_with(code):
    """A ROM with 16 bytes at the reset vector, and zeros."""
    return bytes(RESET_VECTOR) + code.ljust(16, b"\0")


# lidt cs:[0xfff8]; int3: no interrupt table, so the breakpoint is a triple fault.
TRIPLE_FAULT = rom_with(b"\x2e\x0f\x01\x1e\xf8\xff\xcc")
# cli; hlt
HALTED = rom_with(b"\xfa\xf4")
# jmp .
SPINS = rom_with(b"\xeb\xfe")
# Zeros are add [bx+si], al: the processor runs through them, round and round.
ZEROS = bytes(ROM_BYTES)
GARBAGE = random.Random(1).randbytes(ROM_BYTES)


def boot_error(lab, rom, monkeypatch):
    """What the lab says of a machine that boots this."""
    with monkeypatch.context() as patch:
        patch.setattr("vmxlab.console.lab.pack_rom", lambda *_: rom)
        return caught(lab, Case())


# --- before the monitor runs -------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("rom", "kind"),
    [
        pytest.param(TRIPLE_FAULT, MachineDied, id="triple-fault"),
        pytest.param(HALTED, MachineHung, id="halted"),
        pytest.param(SPINS, MachineHung, id="spins"),
        pytest.param(ZEROS, MachineHung, id="zeros"),
    ],
)
def test_rom_that_is_no_monitor_dies_or_hangs_with_a_typed_error(open_lab, monkeypatch, engine, rom, kind):
    lab = open_lab(engine, boot_deadline_s=0.5 if kind is MachineHung else 30)
    error = boot_error(lab, rom, monkeypatch)
    assert_crash(lab, error, kind, exits=0)
    assert error.last_record is None
    assert error.run.end is (End.HUNG if kind is MachineHung else End.DIED)
    if kind is MachineDied:
        assert "triple fault" in error.message


def test_rom_of_garbage_is_a_machine_error_and_the_next_machine_boots(open_lab, monkeypatch):
    lab = open_lab(boot_deadline_s=0.5)
    error = boot_error(lab, GARBAGE, monkeypatch)
    assert isinstance(error, MachineError)
    assert_crash(lab, error, type(error), exits=0)
    lab._boot_deadline_s = 30
    assert_goes_on(lab)


def hurt_in_the_boot_record(machine, number):
    """Send the emulator a signal when half of the first record has come."""
    sent = []

    def down(line):
        if sent:
            return b""
        sent.append(line)
        os.kill(machine.pid, number)
        return line[: len(line) // 2]

    tap(machine, down=down)


@both
def test_emulator_killed_while_it_boots_is_told_apart_from_a_dead_processor(open_lab, engine):
    lab = open_lab(engine)
    lab.on_open = lambda machine: hurt_in_the_boot_record(machine, signal.SIGKILL)
    error = caught(lab, Case())
    assert_crash(lab, error, MachineDied, exits=0)
    assert "ended by a signal that is not ours" in error.message
    assert "SIGKILL" in error.log_path.read_text()
    assert "\n@boot " in error.log_path.read_text()
    lab.on_open = lambda machine: None
    lab.session()
    assert len(lab.machines) == 2


@pytest.mark.slow
@both
def test_emulator_stopped_while_it_boots_is_a_hang(open_lab, engine):
    lab = open_lab(engine, boot_deadline_s=0.5)
    lab.on_open = lambda machine: hurt_in_the_boot_record(machine, signal.SIGSTOP)
    error = caught(lab, Case())
    assert_crash(lab, error, MachineHung, exits=0)


def test_cases_of_a_machine_that_never_boots_are_a_crash_each(open_lab, monkeypatch):
    lab = open_lab()
    monkeypatch.setattr("vmxlab.console.lab.pack_rom", lambda *_: TRIPLE_FAULT)
    runs = lab.run_all([good(1), good(2)])
    assert [run.verdict for run in runs] == [Verdict.CRASH] * 2
    assert [run.name for run in runs] == ["good-1", "good-2"]
    assert runs[0].number != runs[1].number
    assert all(isinstance(run.error, MachineDied) for run in runs)


# --- in the middle of a case -------------------------------------------------------------------------------


def test_emulator_killed_while_records_stream_leaves_all_that_came(lab):
    lab.session()
    with meddling(lambda: exits_in(lab.log_text()) >= 20, lambda: os.kill(lab.machine.pid, signal.SIGKILL)):
        error = caught(lab, STREAM)
    assert_crash(lab, error, MachineDied)
    assert len(error.run.exits) >= 20
    assert error.run.reasons == [ExitReason.CPUID] * len(error.run.exits)
    assert error.run.end is End.DIED
    assert "ended by a signal that is not ours" in error.message
    assert error.case == "stream"
    assert_goes_on(lab)


@pytest.mark.parametrize(
    "keep",
    [
        pytest.param(lambda line: line[:1], id="after-its-first-byte"),
        pytest.param(lambda line: line[: len(line) // 2], id="in-its-middle"),
        pytest.param(lambda line: line[: line.index(b"*")], id="before-its-checksum"),
        pytest.param(lambda line: line.rstrip()[:-1], id="in-its-checksum"),
    ],
)
def test_record_that_the_death_cut_short_is_no_data_and_stays_in_the_log(lab, keep):
    """To the byte: record 20 is cut there, and the emulator killed at that moment."""
    cut = []

    def down(line):
        if cut:
            return b""
        if not line.startswith(b"@exit n=0x14 "):
            return line
        cut.append(keep(line))
        os.kill(lab.machine.pid, signal.SIGKILL)
        return cut[0]

    lab.on_open = lambda machine: tap(machine, down=down)
    error = caught(lab, STREAM)
    assert_crash(lab, error, MachineDied, exits=20)
    log = error.log_path.read_bytes()
    assert b"\n" + cut[0] + b"\n# " in log  # what the harness remarks is not glued to it
    assert any(line.startswith(b"# ") and b"SIGKILL" in line for line in log.splitlines())
    records, broken = parse_log(log)
    assert records[-1].line == error.last_record
    assert [line.text.encode() for line in broken] == cut
    lab.on_open = lambda machine: None
    assert_goes_on(lab)


@pytest.mark.slow
def test_emulator_stopped_in_the_middle_of_a_case_is_a_hang_within_the_deadline(lab):
    lab.session()
    case = Case(name="stopped", program=STREAM.program, limits=Limits(exits=10_000_000, seconds=2))
    with meddling(lambda: exits_in(lab.log_text()) >= 5, lambda: os.kill(lab.machine.pid, signal.SIGSTOP)):
        error = caught(lab, case)
    assert_crash(lab, error, MachineHung)
    assert len(error.run.exits) >= 5
    assert error.run.end is End.HUNG
    assert "Limits(seconds=...)" in error.advice
    assert_goes_on(lab)


def test_guest_that_never_exits_is_a_hang_with_the_exits_before_it(lab):
    error = caught(lab, HANGS)
    assert_crash(lab, error, MachineHung, exits=1)
    assert error.run.reasons == [ExitReason.CPUID]
    assert error.last_record.startswith("@exit n=0x0 ")
    assert_goes_on(lab)


def test_case_that_destroys_l1_is_a_triple_fault_with_what_bochs_saw(lab):
    error = caught(lab, KILLS_L1)
    assert_crash(lab, error, MachineDied, exits=0)
    assert "the processor shut down (triple fault)" in error.message
    assert "exception with no resolution" in error.log_path.read_text()
    assert_goes_on(lab)


def test_vmx_abort_is_no_hang(lab):
    """SDM Vol. 3C, 28.7: a VM exit that can't load an MSR aborts; the logical processor shuts down."""
    page = 0x3F00000
    entry = struct.pack("<IIQ", Msr.IA32_FS_BASE, 0, 0)  # not allowed in the area (28.6)
    case = Case(
        name="abort",
        memory={page: entry},
        fields={Field.EXIT_MSR_LOAD_ADDRESS: page, Field.EXIT_MSR_LOAD_COUNT: 1},
    )
    error = caught(lab, case)
    assert_crash(lab, error, MachineDied, exits=0)
    assert "VMX abort" in error.message
    assert "VMABORT" in error.log_path.read_text()
    assert_goes_on(lab)


# --- at the prompt -----------------------------------------------------------------------------------------


def test_emulator_killed_between_two_cases_costs_no_case(lab):
    assert_good(lab.run(good(1)), 1)
    first = lab.machine.pid
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: is_gone(first))
    assert_good(lab.run(good(2)), 2)
    assert len(lab.machines) == 2
    assert lab.machine.pid != first


def test_emulator_stopped_between_two_cases_runs_on(lab):
    assert_good(lab.run(good(1)), 1)
    os.kill(lab.machine.pid, signal.SIGSTOP)
    assert_good(lab.run(good(2)), 2)
    assert len(lab.machines) == 1


def test_emulator_that_takes_no_input_is_a_hang(lab):
    lab.session()
    lab._machine.resume = lambda: None
    os.kill(lab.machine.pid, signal.SIGSTOP)
    error = caught(lab, Case(limits=Limits(seconds=1)))
    assert_crash(lab, error, MachineHung, exits=0)
    assert_goes_on(lab)


@both
def test_emulator_that_dies_at_a_typed_command_is_a_typed_error(open_lab, engine):
    lab = open_lab(engine)
    session = lab.session()
    os.kill(lab.machine.pid, signal.SIGKILL)
    with pytest.raises(MachineDied) as info:
        session.command("help", 30)
    assert info.value.engine == lab.machine.info.title()
    assert info.value.log_path.read_bytes()
    assert info.value.last_record
    assert lab.session() is not session


# --- many --------------------------------------------------------------------------------------------------


def test_each_case_of_a_list_has_its_own_verdict_whatever_the_others_do(lab):
    runs = lab.run_all([good(1), KILLS_L1, good(2), HANGS, good(3)])
    assert [run.verdict.name for run in runs] == ["PASS", "CRASH", "PASS", "CRASH", "PASS"]
    assert [run.name for run in runs] == ["good-1", "kills-l1", "good-2", "hangs", "good-3"]
    assert [run.end for run in runs] == [End.STOP, End.DIED, End.STOP, End.HUNG, End.STOP]
    assert len({run.number for run in runs}) == 5
    assert_good(runs[0], 1)
    assert_good(runs[4], 3)
    assert len(lab.machines) == 3
    assert all(is_gone(machine.pid) for machine in lab.machines[:2])
