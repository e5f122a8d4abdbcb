"""The monitor's serial line on QEMU: a virtio port, and the UART where a machine has no such port."""

import random
import struct
import subprocess
import threading

import pytest

from vmxlab.console.records import parse_log
from vmxlab.engines import MachineEnd, qemu
from vmxlab.engines.rom import RomImage
from vmxlab.image.frames import encode_frame
from vmxlab.image.layout import FRAME_BUFFER_BYTES, VMXON_REGION
from vmxlab.image.monitor import load_monitor
from vmxlab.image.protocol import CONSOLE_FRAME, CONSOLE_PROMPT, Op
from vmxlab.image.rom import pack_rom

from .conftest import UART, read_to_end, read_until

PROMPT = CONSOLE_PROMPT.encode()
NO_CASES = b"this image holds no cases\r\n"
HEADER = struct.Struct("<4I")

# The device without a port, and another port on it.
NO_PORT = qemu.VIRTIO_SERIAL[:-2]
OTHER = ("-chardev", "null,id=other", "-device")

DEVICES = {
    "virtio": qemu.VIRTIO_SERIAL,
    "uart": UART,
    # A port that is someone else's is left alone: the UART serves.
    "uart-beside-another-port": (
        *UART,
        *NO_PORT,
        *(*OTHER, "virtserialport,chardev=other,nr=1,name=org.example.agent"),
    ),
    "uart-beside-a-port-without-a-name": (*UART, *NO_PORT, *OTHER, "virtserialport,chardev=other,nr=1"),
    "uart-beside-no-port": (*UART, *NO_PORT),
    "uart-beside-a-console": (*UART, *NO_PORT, *OTHER, "virtconsole,chardev=other"),
    # Notifications are handled in another thread: answers come a little later.
    "virtio-with-ioeventfd": tuple(
        word.replace("ioeventfd=off", "ioeventfd=on") for word in qemu.VIRTIO_SERIAL
    ),
    "virtio-beside-other-ports": (
        *qemu.VIRTIO_SERIAL,
        *(word for n in range(2, 31) for word in ("-device", f"virtserialport,nr={n},name=agent.{n}")),
    ),
}
both = pytest.mark.parametrize("device", ["virtio", "uart"])


@pytest.fixture
def image(tmp_path):
    """A ROM with the monitor and no cases."""
    path = tmp_path / "monitor.rom"
    path.write_bytes(pack_rom(load_monitor(), b""))
    return path


@pytest.fixture
def booted(boot, image, monkeypatch):
    """booted(device) -> the monitor at its prompt, under QEMU without VMX."""

    def start(device, **options):
        monkeypatch.setattr(qemu, "VIRTIO_SERIAL", DEVICES[device])
        machine = boot("tcg", image, **options)
        assert b"@boot " in read_until(machine.serial, PROMPT)
        return machine

    return start


def send_behind(machine, data):
    """Send from another thread: a monitor that waits for its reader takes no input meanwhile."""
    sender = threading.Thread(target=machine.serial.sendall, args=(data,))
    sender.start()
    return sender


def read_prompts(machine, count):
    got = read_until(machine.serial, PROMPT)
    while got.count(PROMPT) < count:
        got += read_until(machine.serial, b" ")
    return got


@pytest.mark.parametrize("device", DEVICES)
def test_monitor_echoes_and_answers(booted, device):
    machine = booted(device)
    machine.serial.sendall(b"run\r")
    assert read_until(machine.serial, PROMPT) == b"run\r\n" + NO_CASES + PROMPT
    for key in b"rux\bn":
        machine.serial.sendall(bytes([key]))
        read_until(machine.serial, bytes([key]))
    machine.serial.sendall(b"\r")
    assert NO_CASES in read_until(machine.serial, PROMPT)


@both
def test_lines_typed_fast_are_all_answered_in_order(booted, device):
    machine = booted(device)
    count = 10_000 if device == "virtio" else 1000
    sender = send_behind(machine, b"".join(b"x%d\r" % number for number in range(count)))
    got = read_prompts(machine, count)
    sender.join()
    lines = [line for line in got.split(PROMPT) if line]
    assert [line.split(b"\r\n")[0] for line in lines] == [b"x%d" % number for number in range(count)]


# QEMU's UART takes some 11 KB a second, as a real one would.
SIZES = [("virtio", size) for size in (0, 1, 1007, 1008, 4096, 100_000, FRAME_BUFFER_BYTES)]
SIZES += [("uart", size) for size in (0, 1, 4096)]


@pytest.mark.parametrize(("device", "size"), SIZES)
def test_frame_of_junk_is_taken_whole_and_refused(booted, device, size):
    machine = booted(device)
    junk = random.Random(size).randbytes(size)
    frame = HEADER.pack(size, 1, 0xBAD, 0) + junk
    sender = send_behind(machine, bytes([CONSOLE_FRAME]) + frame + b"run\r")
    got = read_prompts(machine, 2)
    sender.join()
    assert b"@error what=frame-crc*" in got
    assert got.count(b"@") == 1, "no byte of the frame was taken for a line"
    assert got.endswith(b"run\r\n" + NO_CASES + PROMPT)


@both
def test_frame_that_says_what_it_holds_is_opened(booted, device):
    """Its checksum is right, so not one byte of it was lost or changed."""
    machine = booted(device)
    script = random.Random(1).randbytes(200_000 if device == "virtio" else 5000)
    frame = encode_frame([b"\xee" + script]).data
    sender = send_behind(machine, bytes([CONSOLE_FRAME]) + frame)
    got = read_until(machine.serial, PROMPT)
    sender.join()
    assert b"@end " in got
    assert b"why=script" in got


@pytest.mark.slow
def test_frame_that_stops_is_given_up_after_some_seconds(booted):
    """On both devices at once: the seconds are waited out."""
    machines = {device: booted(device) for device in ("virtio", "uart")}
    for machine in machines.values():
        machine.serial.settimeout(60)
        machine.serial.sendall(bytes([CONSOLE_FRAME]) + HEADER.pack(100, 1, 0, 0) + b"x" * 50)
    for device, machine in machines.items():
        got = read_until(machine.serial, PROMPT)
        assert b"@error what=frame-stopped*" in got, device
        machine.serial.sendall(b"run\r")
        assert NO_CASES in read_until(machine.serial, PROMPT)


@both
def test_output_that_nobody_reads_for_a_while_is_not_lost(booted, device):
    """More than the socket takes: QEMU holds it back, and the monitor waits."""
    machine = booted(device)
    machine.serial.sendall(b"help\r")
    answer = read_until(machine.serial, PROMPT)
    count = 2_000_000 // len(answer) if device == "virtio" else 200
    sender = send_behind(machine, b"help\r" * count)
    sender.join(timeout=1.0)  # it can't end before someone reads, if the socket is as small as usual
    got = read_prompts(machine, count)
    sender.join()
    assert got == answer * count


@both
def test_triple_fault_loses_no_byte_before_it(booted, device):
    """A script writes fifty records and takes the IDT away; its VMXON is a #UD, as there is no VMX here."""
    machine = booted(device)
    monitor = load_monitor()
    records = b"".join(struct.pack("<BIB", Op.CASE, number, 4) + b"name" for number in range(50))
    no_idt = struct.pack("<BQIB", Op.FILL, monitor.idt, monitor.idt_bytes, 0)
    script = records + no_idt + struct.pack("<BQ", Op.VMXON, VMXON_REGION)
    machine.serial.sendall(bytes([CONSOLE_FRAME]) + encode_frame([script]).data)
    got = read_to_end(machine.serial)
    parsed, broken = parse_log(got)
    assert broken == []
    assert [record.values["id"] for record in parsed if record.kind == "case"] == [hex(n) for n in range(50)]
    assert got.endswith(b"\r\n")
    assert machine.end() is MachineEnd.TRIPLE_FAULT


@both
def test_reset_loses_no_byte_before_it(booted, device):
    machine = booted(device)
    machine.serial.sendall(b"help\rreset\r")
    got = read_to_end(machine.serial)
    assert got.startswith(b"help\r\n")
    assert got.endswith(PROMPT + b"reset\r\n")
    assert machine.end() is MachineEnd.SHUTDOWN


@both
def test_machine_that_is_reset_speaks_again(booted, device):
    machine = booted(device)
    for _ in range(3):
        machine.serial.sendall(b"help")
        read_until(machine.serial, b"help")
        machine.reset()
        assert b"@boot " in read_until(machine.serial, PROMPT)
        machine.serial.sendall(b"run\r")
        assert NO_CASES in read_until(machine.serial, PROMPT)


@pytest.mark.parametrize("serial", [("-serial", "stdio"), ()])
def test_image_boots_with_a_uart_for_a_terminal_and_with_nothing(engine, image, serial):
    arguments = engine("tcg").arguments(RomImage.check(image), model="max", memory_mb=64)
    with subprocess.Popen(
        [qemu.PROGRAM, *arguments, *serial],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as child:
        try:
            if serial:
                got = b""
                while PROMPT not in got:
                    piece = child.stdout.read1()
                    assert piece, got
                    got += piece
                assert b"@boot " in got
            else:
                with pytest.raises(subprocess.TimeoutExpired):
                    child.wait(0.5)  # it neither resets nor ends
        finally:
            child.kill()
