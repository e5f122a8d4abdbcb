"""Machines in a carrier that really runs, and what may break it. Most tests share one carrier."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from vmxlab import Case, ExitReason, Limits, errors
from vmxlab.console.lab import Lab
from vmxlab.console.run import End, Verdict
from vmxlab.engines import MachineEnd, kvm_in_bochs
from vmxlab.engines.carrier.running import InnerQemu
from vmxlab.engines.kvm_in_bochs import KvmInBochsEngine
from vmxlab.sdm.controls import PinControls, SecondaryControls
from vmxlab.sdm.fields import Field

from .conftest import (
    READY,
    UART,
    is_gone,
    open_descriptors,
    processor_ticks,
    read_exactly,
    read_to_end,
    read_until,
)

pytestmark = pytest.mark.slow

PATIENCE_S = 90
STREAM = Case(
    name="stream", program="again: cpuid; jmp again", limits=Limits(exits=10_000_000, seconds=PATIENCE_S)
)
HANGS = Case(
    name="hangs",
    program="cpuid; again: jmp again",
    disable=PinControls.ACTIVATE_PREEMPTION_TIMER,
    limits=Limits(seconds=2),
)
# L1 has no page tables after the exit: its first instruction is a #PF, which is a #DF, which is the end.
KILLS_L1 = Case(name="kills-l1", fields={Field.HOST_CR3: 0x3F00000})
# Fills the UART's FIFO whenever it is empty.
FLOODS = """
2:  wait_for 0x20
    mov dx, 0x3f8
    mov cx, 14
    mov al, 0x2e
3:  out dx, al
    loop 3b
    jmp 2b"""


def skip_where_there_is_none() -> None:
    state = KvmInBochsEngine().availability()
    if not state.ok:
        pytest.skip(f"kvm-in-bochs: {state.problem}")


class Shared:
    """The carrier of all the tests here, booted by the first one and again after one that killed it.

    One machine at a time: `up` and `lab` end the one before, if it is another one.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.descriptors = open_descriptors()
        self.engine = KvmInBochsEngine()
        self._lab: Lab | None = None

    @property
    def pid(self) -> int:
        assert self.engine._carrier is not None
        return self.engine._carrier.child.pid

    @property
    def qemu(self) -> InnerQemu | None:
        assert self.engine._carrier is not None
        return self.engine._carrier.qemu

    def lab(self, model: str = "host") -> Lab:
        """A lab with this model, the one of the test before if it was such a one."""
        if self._lab is None or self._lab._model != model:
            self.down()
            with pytest.MonkeyPatch.context() as patch:
                choose = importlib.import_module("vmxlab.engines.choose")
                patch.setattr(choose, "choose", lambda *_: (self.engine, "for a test"))
                self._lab = Lab("kvm-in-bochs", model=model, log_dir=self.logs)
        return self._lab

    def down(self) -> None:
        """End the lab's machine. `Lab.close` would end the carrier, too."""
        if self._lab is not None:
            self._lab._down()
            self._lab = None


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    skip_where_there_is_none()
    made = Shared(tmp_path_factory.mktemp("carrier"))
    made.engine.prepare()
    yield made
    made.down()
    made.engine.close()


@pytest.fixture
def up(shared, rom, monkeypatch):
    """up(body, ...) -> a machine that runs a ROM with the UART as its line; stopped in the end."""
    monkeypatch.setattr(kvm_in_bochs, "VIRTIO_SERIAL", UART)
    machines = []

    def start(body, **options):
        shared.down()
        machine = shared.engine.open(rom(body), log_dir=shared.logs, **options)
        machine.serial.settimeout(PATIENCE_S)
        machines.append(machine)
        return machine

    yield start
    for machine in machines:
        machine.stop()


@pytest.fixture
def lab(shared):
    """A lab on the shared carrier."""
    return shared.lab()


GOOD = Case(name="good", program="cpuid; hlt")


def assert_good(run):
    assert run.verdict is Verdict.PASS, run.error
    assert run.reasons == [ExitReason.CPUID, ExitReason.HLT]


def is_held(pid):
    """Whether a process is stopped, or is in a moment: else it takes a whole core."""
    limit = time.monotonic() + 2
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        if time.monotonic() > limit:
            return False
        time.sleep(0.01)
    return True


def entries(lab, case):
    """Run a case; how many VM entries KVM counted meanwhile."""
    before = lab.nested_entries() or 0
    lab.run(case)
    return lab.nested_entries() - before


def exits_in(log, *, after):
    """Whether a whole record of an exit has come behind that many bytes."""
    return lambda: re.search(rb"@exit [^\n]*\n", log.read_bytes()[after:])


@contextlib.contextmanager
def as_soon_as(condition, act):
    """Do something from another thread once a condition holds."""
    over = threading.Event()
    done = []

    def wait():
        while not over.wait(0.01):
            if condition():
                done.append(act())
                return

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert done


# --- one machine after the other ---------------------------------------------------------------------------


def test_option_that_qemu_refuses_is_told_in_its_own_words(shared, rom, up):
    shared.down()
    with pytest.raises(errors.EngineUnavailable) as caught:
        shared.engine.open(rom("idle"), log_dir=shared.logs, model="host,no-such-switch=on")
    assert "Property 'host-x86_64-cpu.no-such-switch' not found" in caught.value.message
    assert "ACPI" not in caught.value.message, "what Linux said at its boot has nothing to do with it"
    assert caught.value.log_path.parent == shared.logs
    assert "no-such-switch" in caught.value.log_path.read_text()
    pid = shared.pid
    assert is_held(pid)
    # The carrier serves the next machine, and that one too.
    with up("triple fault on input") as machine:
        assert read_until(machine.serial, b"\n") == READY
    assert shared.pid == pid


def test_triple_fault_ends_the_stream_at_once_and_the_next_machine_is_a_reset(shared, up):
    machine = up("triple fault on input")
    assert read_until(machine.serial, b"\n") == READY
    qemu = shared.qemu
    before = time.monotonic()
    machine.serial.sendall(b"x")
    assert read_to_end(machine.serial) == b""
    assert time.monotonic() - before < 10
    assert machine.end() is MachineEnd.TRIPLE_FAULT
    assert "guest-reset" in machine.postmortem()
    machine.stop()
    assert machine.end() is MachineEnd.TRIPLE_FAULT
    again = up("triple fault on input")
    assert read_until(again.serial, b"\n") == READY
    assert shared.qemu is qemu
    assert again.end() is MachineEnd.RUNNING
    again.serial.sendall(b"x")
    assert read_to_end(again.serial) == b""
    assert again.end() is MachineEnd.TRIPLE_FAULT


def test_bytes_of_one_machine_do_not_reach_another_image(shared, up):
    flood = up(FLOODS)
    # Faster than the line is: after a second much of it waits in Linux.
    limit = time.monotonic() + 1
    while time.monotonic() < limit:
        assert flood.serial.recv(4096)
    qemu = shared.qemu
    flood.serial.sendall(b"never read" * 100)
    flood.stop()
    machine = up("echo")
    assert shared.qemu is not qemu
    assert read_until(machine.serial, b"\n") == READY
    machine.serial.sendall(b"echo")
    assert read_exactly(machine.serial, 4) == b"echo"
    # Reset with input on its way.
    machine.serial.sendall(b"old" * 50)
    machine.stop()
    machine = up("echo")
    assert read_until(machine.serial, b"\n") == READY
    machine.serial.sendall(b"new")
    assert read_exactly(machine.serial, 3) == b"new"
    assert machine.end() is MachineEnd.RUNNING


def test_paused_machine_costs_no_processor_time_and_another_one_follows(shared, up):
    machine = up("echo")
    read_until(machine.serial, b"\n")
    machine.pause()
    os.waitid(os.P_PID, machine.pid, os.WSTOPPED | os.WNOWAIT)
    before = processor_ticks(machine.pid)
    machine.serial.sendall(b"x")
    time.sleep(0.1)
    assert processor_ticks(machine.pid) == before
    with pytest.raises(errors.MachineError, match="paused"):
        machine.registers()
    machine.resume()
    assert read_exactly(machine.serial, 1) == b"x"
    machine.pause()
    machine.stop()
    before = processor_ticks(machine.pid)
    time.sleep(0.1)
    assert processor_ticks(machine.pid) == before
    assert read_until(up("echo").serial, b"\n") == READY


def test_registers_and_memory_can_be_had(shared, up, rom):
    machine = up("echo")
    read_until(machine.serial, b"\n")
    assert "CS =f000 ffff0000" in machine.registers()
    image = rom("echo").read_bytes()
    path = machine.save_memory((1 << 32) - 5000, 5000)
    assert path.parent == shared.logs
    assert path.read_bytes() == image[-5000:]
    # More than one piece, and less than was saved before.
    assert machine.save_memory((1 << 32) - len(image), len(image)).read_bytes() == image
    assert machine.save_memory((1 << 32) - 16, 16).read_bytes() == image[-16:]
    machine.serial.sendall(b"x")
    assert read_exactly(machine.serial, 1) == b"x"


def test_qemu_that_does_not_come_up_in_time_does_not_take_the_carrier_with_it(shared, up, monkeypatch):
    machine = up("echo")
    pid = machine.pid
    machine.stop()
    with monkeypatch.context() as patch:
        patch.setattr(kvm_in_bochs, "_QMP_DEADLINE_S", 0.01)
        with pytest.raises(errors.EngineUnavailable, match="did not come up"):
            up("spin")
    assert read_until(up("echo").serial, b"\n") == READY
    assert shared.pid == pid


def test_vm_entries_are_counted_exactly_also_after_an_end_of_l1(shared, lab):
    """KVM's own counter is the witness that L2 ran: one entry for each exit."""
    assert entries(lab, GOOD) == 2
    assert lab.capabilities.supports(SecondaryControls.ENABLE_EPT)
    qemu = shared.qemu
    assert entries(lab, Case(program="cpuid; cpuid; cpuid; hlt")) == 4
    before, started = lab.nested_entries(), time.monotonic()
    with pytest.raises(errors.MachineDied, match="triple fault") as caught:
        lab.run(KILLS_L1)
    assert time.monotonic() - started < 10
    assert caught.value.run.verdict is Verdict.CRASH
    assert lab.nested_entries() - before == 1
    assert entries(lab, GOOD) == 2
    assert shared.qemu is qemu, "the machine was reset"
    (count,) = lab.session().machine.query_stats("nested_run").values()
    assert count >= lab.nested_entries() >= 9
    assert lab.session().machine.query_stats()["nested_run"] == count


def test_l2_that_never_exits_costs_only_its_own_case(shared, lab):
    assert_good(lab.run(GOOD))
    pid, qemu = shared.pid, shared.qemu
    run = lab.run(Case(program="again: jmp again", limits=Limits(l2_tsc=10_000_000)))
    assert (run.reasons, run.verdict) == ([ExitReason.PREEMPTION_TIMER], Verdict.PASS)
    before = time.monotonic()
    with pytest.raises(errors.MachineHung) as caught:
        lab.run(HANGS)
    assert time.monotonic() - before < 15
    run = caught.value.run
    assert (run.end, run.verdict) == (End.HUNG, Verdict.CRASH)
    assert run.reasons == [ExitReason.CPUID]
    assert_good(lab.run(GOOD))
    assert (shared.pid, shared.qemu) == (pid, qemu)


def test_machine_that_was_stopped_while_it_spoke_is_not_heard_by_the_next(shared, lab):
    """What QEMU had sent or had still to send of it does not come out of the machine after the reset."""
    assert_good(lab.run(GOOD))
    qemu = shared.qemu
    with pytest.raises(errors.MachineHung) as caught:
        lab.run(dataclasses.replace(STREAM, limits=Limits(exits=10_000_000, seconds=1.5)))
    assert len(caught.value.run.exits) > 3
    assert_good(lab.run(GOOD))
    assert shared.qemu is qemu
    said = [line for line in lab.log_path.read_bytes().splitlines() if not line.startswith(b"#")]
    assert said[0].startswith(b"@boot ")


def test_ctrl_c_in_a_case_leaves_the_carrier_usable(shared, lab):
    assert_good(lab.run(GOOD))
    pid, log = shared.pid, lab.log_path
    size = log.stat().st_size
    with (
        pytest.raises(KeyboardInterrupt),
        as_soon_as(exits_in(log, after=size), lambda: os.kill(os.getpid(), signal.SIGINT)),
    ):
        lab.run(STREAM)
    assert_good(lab.run(GOOD))
    assert shared.pid == pid


def test_ctrl_c_while_qemu_starts_leaves_the_carrier_usable(shared, lab):
    assert_good(lab.run(GOOD))
    pid, qemu = shared.pid, shared.qemu
    other = shared.lab("host,vmx-ept=off")
    with (
        pytest.raises(KeyboardInterrupt),
        as_soon_as(lambda: shared.qemu not in {qemu, None}, lambda: os.kill(os.getpid(), signal.SIGINT)),
    ):
        other.run(GOOD)
    assert shared.pid == pid
    assert is_held(pid)
    assert_good(other.run(GOOD))
    assert shared.pid == pid


def test_switch_of_the_model_changes_the_processor(shared):
    without = shared.lab("host,vmx-ept=off")
    assert not without.capabilities.supports(SecondaryControls.ENABLE_EPT)
    assert without.info.model == "host,vmx-ept=off"


# --- the carrier is ended ----------------------------------------------------------------------------------


def test_killed_carrier_is_noticed_and_the_next_case_runs_on_another(shared):
    """The other one has another parameter of KVM's besides: that takes a boot, too."""
    lab = shared.lab("host,vmx-ept=off")
    assert_good(lab.run(GOOD))
    pid, log = shared.pid, lab.log_path
    size = log.stat().st_size
    kill = as_soon_as(exits_in(log, after=size), lambda: os.kill(pid, signal.SIGKILL))
    with pytest.raises(errors.MachineDied) as caught, kill:
        lab.run(STREAM)
    assert MachineEnd.KILLED.value in caught.value.message
    assert caught.value.run.verdict is Verdict.CRASH
    assert caught.value.run.exits
    assert caught.value.log_path == log
    assert log.is_file()
    assert is_gone(pid)
    lab._model = "host,kvm_intel.ept=0"
    assert_good(lab.run(GOOD))
    assert shared.pid != pid
    assert not lab.capabilities.supports(SecondaryControls.ENABLE_EPT)
    assert lab.info.model == "host,kvm_intel.ept=0"
    second = shared.pid
    shared.down()
    shared.engine.close()
    assert is_gone(second)
    assert [t.name for t in threading.enumerate() if t.name in {"vmxlab-carrier", "vmxlab-qmp"}] == []
    assert open_descriptors() == shared.descriptors
    suffixes = {path.name.partition(".")[2] for path in shared.logs.iterdir()}
    assert suffixes <= {"log", "out", "bochsrc", "debugger", "bochs.log", "mem"}
    assert len(list(shared.logs.glob("kvm-in-bochs-*.bochs.log"))) >= 2
