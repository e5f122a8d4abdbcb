"""Machines on the engines that run anywhere: bytes, ends, stops."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from vmxlab import errors
from vmxlab.engines import MachineEnd, qemu

from .conftest import READY, is_gone, open_descriptors, processor_ticks, read_exactly, read_to_end, read_until

both = pytest.mark.parametrize("name", ["bochs", "tcg"])


@both
def test_bytes_go_both_ways(boot, name):
    machine = boot(name, "echo")
    assert read_until(machine.serial, b"\n") == READY
    for question in (b"a", b"many bytes at once, more than a FIFO holds"):
        machine.serial.sendall(question)
        assert read_exactly(machine.serial, len(question)) == question
    assert machine.end() is MachineEnd.RUNNING


@both
def test_triple_fault_ends_the_stream_at_once(boot, name):
    machine = boot(name, "triple fault")
    before = time.monotonic()
    assert read_to_end(machine.serial) == READY
    assert time.monotonic() - before < 5
    assert machine.end() is MachineEnd.TRIPLE_FAULT
    machine.stop()
    assert machine.end() is MachineEnd.TRIPLE_FAULT


def test_bytes_that_qemu_holds_back_for_a_slow_reader_are_not_lost(boot):
    room = single_bytes_that_fit(qemu._SERIAL_BUFFER_BYTES)
    body = f"""
        mov ebx, {room - len(READY)}
    2:  wait_for 0x20
        mov dx, 0x3f8
        mov al, 0x2e
        out dx, al
        dec ebx
        jnz 2b
        wait_for 0x20
        mov cx, 8               # into the UART's FIFO; the socket is full
        mov dx, 0x3f8
        mov al, 0x21
    3:  out dx, al
        loop 3b
        lidt cs:[no_idt]
        int3"""
    machine = boot("tcg", body)
    machine.qmp().wait_event("SHUTDOWN", timeout_s=20)
    assert read_to_end(machine.serial) == READY + b"." * (room - len(READY)) + b"!" * 8
    assert machine.end() is MachineEnd.TRIPLE_FAULT


def single_bytes_that_fit(buffer_bytes):
    ours, theirs = socket.socketpair()
    count = 0
    with ours, theirs, contextlib.suppress(BlockingIOError):
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        theirs.setblocking(False)
        while True:
            theirs.send(b"x")
            count += 1
    return count


def test_dead_machine_ends_the_stream_even_if_nobody_reads_for_a_while(boot):
    machine = boot("tcg", "triple fault")
    machine.qmp().wait_event("SHUTDOWN", timeout_s=20)
    assert machine.end() is MachineEnd.TRIPLE_FAULT
    assert read_to_end(machine.serial) == READY


@pytest.mark.parametrize(("name", "body"), [("bochs", "shutdown port"), ("tcg", "reset")])
def test_guest_that_asks_for_the_end_is_no_triple_fault(boot, name, body):
    machine = boot(name, body)
    assert read_to_end(machine.serial) == READY
    assert machine.end() is MachineEnd.SHUTDOWN


def test_panic_device_of_qemu_is_a_panic(boot):
    machine = boot("tcg", "panic device", extra=["-device", "pvpanic"])
    assert read_to_end(machine.serial) == READY
    assert machine.end() is MachineEnd.PANIC


def test_exit_device_of_qemu_is_an_exit(boot):
    machine = boot("tcg", "exit device", extra=["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
    assert read_to_end(machine.serial) == READY
    assert machine.end() is MachineEnd.EXITED
    assert "exit status 5" in machine.postmortem()


def test_vmx_abort_in_the_log_of_bochs_ends_the_stream(boot):
    machine = boot("bochs", "spin")
    read_until(machine.serial, b"\n")
    with machine.engine_log.open("a") as log:
        log.write("00000000000e[CPU0  ] VMABORT: Error when loading host MSR number 1\n")
    assert read_to_end(machine.serial) == b""
    assert machine.end() is MachineEnd.VMX_ABORT
    assert "VMABORT: Error when loading host MSR" in machine.postmortem()


@both
def test_hung_machine_is_stopped_and_leaves_only_logs(boot, name, tmp_path):
    machine = boot(name, "spin")
    read_until(machine.serial, b"\n")
    machine.stop()
    machine.stop()
    assert machine.end() is MachineEnd.STOPPED
    assert is_gone(machine.pid)
    files = {file.name for file in (tmp_path / "logs").iterdir()}
    own = {f"{name}-1.log", f"{name}-1.out"}
    assert files == own | ({"bochs-1.bochsrc", "bochs-1.debugger"} if name == "bochs" else set())


@both
def test_context_manager_stops_the_machine(boot, name):
    with boot(name, "idle") as machine:
        assert not is_gone(machine.pid)
    assert is_gone(machine.pid)
    with pytest.raises(errors.MachineError, match="was stopped"):
        machine.start()


@both
def test_stopped_machines_leave_no_descriptor_open(boot, name):
    boot(name, "idle").stop()
    before = open_descriptors()
    boot(name, "idle").stop()
    assert open_descriptors() == before


@both
def test_emulator_killed_by_someone_else_is_told_apart(boot, name):
    machine = boot(name, "spin")
    read_until(machine.serial, b"\n")
    os.kill(machine.pid, signal.SIGKILL)
    assert read_to_end(machine.serial) == b""
    assert machine.end() is MachineEnd.KILLED
    assert "SIGKILL" in machine.postmortem()


@both
def test_emulator_that_crashes_is_the_engines_error(boot, name):
    machine = boot(name, "spin")
    read_until(machine.serial, b"\n")
    os.kill(machine.pid, signal.SIGABRT)
    assert read_to_end(machine.serial) == b""
    assert machine.end() is MachineEnd.ENGINE_ERROR


@both
def test_paused_machine_costs_no_processor_time_and_goes_on(boot, name):
    machine = boot(name, "echo")
    read_until(machine.serial, b"\n")
    machine.pause()
    machine.pause()
    os.waitid(os.P_PID, machine.pid, os.WSTOPPED | os.WNOWAIT)
    before = processor_ticks(machine.pid)
    machine.serial.sendall(b"x")
    time.sleep(0.1)
    assert processor_ticks(machine.pid) == before
    machine.resume()
    machine.resume()
    assert read_until(machine.serial, b"x") == b"x"


@both
def test_paused_machine_can_be_stopped(boot, name):
    machine = boot(name, "idle")
    machine.pause()
    machine.stop()
    assert machine.end() is MachineEnd.STOPPED


@both
def test_two_machines_at_once_do_not_mix(boot, name):
    machines = {text: boot(name, "echo") for text in (b"one|", b"two|")}
    for text, machine in machines.items():
        read_until(machine.serial, b"\n")
        machine.serial.sendall(text)
    for text, machine in machines.items():
        assert read_until(machine.serial, b"|") == text
    assert len({machine.engine_log for machine in machines.values()}) == 2


@both
def test_machine_says_what_runs_it(boot, name):
    machine = boot(name, "idle", why="named by --engine")
    assert machine.info.name == name
    assert machine.info.version[0].isdigit()
    assert machine.info.why == "named by --engine"
    assert machine.info.title() == f"{name} {machine.info.version} ({machine.info.model})"
    assert Path(f"/proc/{machine.pid}/exe").samefile(machine.command_line()[0])


def test_postmortem_of_a_triple_fault_shows_what_bochs_says(boot):
    machine = boot("bochs", "triple fault")
    read_to_end(machine.serial)
    text = machine.postmortem()
    assert "the processor shut down (triple fault)" in text
    assert "3rd (13) exception with no resolution" in text
    assert "exit status 1" in text


def test_postmortem_of_a_triple_fault_shows_the_registers_of_qemu(boot):
    machine = boot("tcg", "triple fault")
    read_to_end(machine.serial)
    text = machine.postmortem()
    assert "the processor shut down (triple fault)" in text
    assert "CS =f000 ffff0000" in text
    assert "guest-reset" in text
    machine.stop()
    assert "the processor shut down (triple fault)" in machine.postmortem()


@pytest.mark.parametrize(
    ("name", "model", "bit"),
    [("tcg", "max", b"0"), ("bochs", "corei7_skylake_x", b"1"), ("bochs", "ryzen", b"0")],
)
def test_cpuid_shows_vmx_where_the_engine_says_so(boot, engine, name, model, bit):
    machine = boot(name, "vmx bit", model=model)
    assert read_exactly(machine.serial, len(READY) + 1) == READY + bit
    assert engine(name).has_vmx(model) is (bit == b"1")
    assert machine.info.model == model


def test_all_models_that_bochs_offers_exist(engine):
    models = engine("bochs").models()
    assert engine("bochs").default_model in models
    assert "ryzen" not in models


@both
def test_roms_of_every_allowed_size_boot(boot, rom, name, tmp_path):
    for size_kib in (128, 2048):
        image = tmp_path / f"{size_kib}.rom"
        image.write_bytes(rom("idle").read_bytes().rjust(size_kib << 10, b"\xff"))
        with boot(name, image) as machine:
            assert read_until(machine.serial, b"\n") == READY


@both
def test_path_with_spaces_and_commas_is_taken_as_it_is(boot, rom, name, tmp_path):
    directory = tmp_path / "a b, size=1 # %s"
    directory.mkdir()
    image = directory / "x y,z.rom"
    image.write_bytes(rom("idle").read_bytes())
    machine = boot(name, image, log_dir=directory / "logs, too")
    assert read_until(machine.serial, b"\n") == READY
    assert machine.engine_log.stat().st_size > 0


@both
def test_earlier_logs_are_kept(boot, name):
    first = boot(name, "idle")
    first.stop()
    text = first.engine_log.read_bytes()
    second = boot(name, "idle")
    assert (first.engine_log.name, second.engine_log.name) == (f"{name}-1.log", f"{name}-2.log")
    assert first.engine_log.read_bytes() == text
