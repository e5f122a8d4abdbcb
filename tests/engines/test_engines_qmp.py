"""QMP, on a machine that runs, one that died, and one that does not answer."""

import os
import signal
import time

import pytest

from vmxlab import errors
from vmxlab.engines import MachineEnd
from vmxlab.engines.qemu import QemuEngine

from .conftest import READY, read_to_end, read_until


@pytest.fixture
def machine(boot):
    machine = boot("tcg", "echo")
    read_until(machine.serial, READY)
    return machine


def test_command_returns_what_qemu_answers(machine):
    assert machine.qmp().execute("query-status")["status"] == "running"


def test_bochs_has_none(boot):
    assert boot("bochs", "idle").qmp() is None


def test_refused_command_carries_qemus_words(machine):
    with pytest.raises(errors.QmpError, match="no-such-command has not been found") as caught:
        machine.qmp().execute("no-such-command")
    assert caught.value.command == "no-such-command"
    assert caught.value.error_class == "CommandNotFound"
    assert caught.value.engine == machine.info.title()


def test_events_are_recorded(machine):
    machine.qmp().execute("stop")
    event = machine.qmp().wait_event("STOP", timeout_s=20)
    assert event.data["status"] == "paused"
    assert abs(event.time_s - time.time()) < 60
    assert [event.name for event in machine.qmp().events] == ["RESUME", "STOP"]
    # A pause that someone asked for is no end.
    assert machine.end() is MachineEnd.RUNNING


def test_event_that_does_not_come_is_waited_for_no_longer_than_said(machine):
    with pytest.raises(errors.MachineHung, match="no event POWERDOWN"):
        machine.qmp().wait_event("POWERDOWN", timeout_s=0.05)


def test_no_answer_in_time_is_a_hang(machine):
    os.kill(machine.pid, signal.SIGSTOP)
    with pytest.raises(errors.MachineHung, match=r"query-status: no answer within 0\.1 s"):
        machine.qmp().execute("query-status", timeout_s=0.1)


def test_paused_machine_refuses_at_once(machine):
    machine.pause()
    with pytest.raises(errors.MachineError, match="paused"):
        machine.qmp().execute("query-status")
    assert "CS =" in machine.postmortem()
    assert machine.paused
    machine.resume()
    assert machine.qmp().execute("query-status")["status"] == "running"


def test_connection_that_is_gone_is_a_death(machine):
    os.kill(machine.pid, signal.SIGKILL)
    read_to_end(machine.serial)
    with pytest.raises(errors.MachineDied):
        machine.qmp().execute("query-status")


def test_closing_neither_raises_nor_hangs(machine):
    os.kill(machine.pid, signal.SIGSTOP)
    before = time.monotonic()
    machine.qmp().close()
    machine.qmp().close()
    assert time.monotonic() - before < 5
    with pytest.raises(errors.MachineDied, match="closed"):
        machine.qmp().execute("query-status")


def test_host_that_quits_the_machine_is_a_stop(machine):
    machine.qmp().execute("quit")
    assert read_to_end(machine.serial) == b""
    assert machine.end() in {MachineEnd.STOPPED, MachineEnd.EXITED}


def test_registers_and_memory_can_be_looked_at(machine, boot, rom):
    assert "CR0=60000010" in machine.registers()
    path = machine.save_memory(0xFFFF0000, 0x10000)
    assert path.parent == machine.log_dir
    assert path.read_bytes() == rom("echo").read_bytes()
    assert machine.save_memory(0xFFFF0000, 16) != path


def test_tcg_has_no_counters(machine):
    assert machine.query_stats() == {}


class PlainKvm(QemuEngine):
    """KVM without any wish for VMX: it runs on more hosts than the engine does."""

    name = "plain-kvm"
    accelerator = "kvm"
    default_model = "qemu64"

    def models(self):
        return (self.default_model,)

    def has_vmx(self, model=None):
        return False

    def cpu_argument(self, base, features):
        return base


def test_kvm_counts_what_the_guest_did(rom, uart, tmp_path):
    try:
        machine = PlainKvm().open(rom("echo"), log_dir=tmp_path)
    except errors.EngineUnavailable as error:
        pytest.skip(f"no KVM here: {error.message}")
    with machine:
        machine.serial.settimeout(20)
        read_until(machine.serial, READY)
        counters = machine.query_stats()
        assert counters["exits"] > 0
        assert counters["nested_run"] == 0


def test_reset_boots_the_image_again_in_the_same_process(machine):
    for _ in range(2):
        machine.reset()
        assert read_until(machine.serial, READY) == READY
        assert machine.end() is MachineEnd.RUNNING


def test_triple_fault_after_a_reset_is_noticed(boot):
    machine = boot("tcg", "triple fault on input")
    read_until(machine.serial, READY)
    machine.reset()
    read_until(machine.serial, READY)
    machine.serial.sendall(b"x")
    assert read_to_end(machine.serial) == b""
    assert machine.end() is MachineEnd.TRIPLE_FAULT


def test_dead_machine_can_not_be_reset(boot):
    machine = boot("tcg", "triple fault")
    read_to_end(machine.serial)
    with pytest.raises(errors.MachineDied, match="can't be reset"):
        machine.reset()
