"""Tiny ROMs, made with GNU as and ld, and machines that are stopped whatever the test does."""

import socket
import subprocess
from pathlib import Path

import pytest

from vmxlab.engines import ENGINES, qemu

UART = ("-serial", "chardev:serial")
"""QEMU's serial line as the UART at COM1, which is all that the ROMs here know."""

READY = b"ready\n"

# 16-bit code that runs in place at the top of the address space: the data is reached through CS.
_SOURCE = """
.code16
.intel_syntax noprefix
.macro wait_for bit
9:  mov dx, 0x3fd
    in al, dx
    test al, \\bit
    jz 9b
.endm
.text
start:
    cli
    mov dx, 0x3fb       # LCR: 8 bits
    mov al, 3
    out dx, al
    mov dx, 0x3fa       # FCR: FIFO on
    mov al, 1
    out dx, al
    xor si, si
1:  wait_for 0x20
    mov al, cs:[si + offset text]
    mov dx, 0x3f8
    out dx, al
    inc si
    cmp al, 10
    jne 1b
    wait_for 0x40       # all of it has left the UART
{body}
idle:
    hlt
    jmp idle
text: .ascii "ready\\n"
magic: .ascii "Shutdown"
no_idt: .word 0, 0, 0
    .org {size} - 16
    .byte 0xe9          # jmp start, from the reset vector
    .word (start - . - 2) & 0xffff
    .org {size}
"""

BODIES = {
    "idle": "",
    "spin": "2: jmp 2b",
    "triple fault": "lidt cs:[no_idt]\n int3",
    "triple fault on input": "wait_for 0x01\n lidt cs:[no_idt]\n int3",
    "shutdown port": """
    mov cx, 8
    xor si, si
2:  mov al, cs:[si + offset magic]
    mov dx, 0x8900
    out dx, al
    inc si
    loop 2b""",
    "reset": "mov al, 0xfe\n out 0x64, al",
    "echo": """
2:  wait_for 0x01
    mov dx, 0x3f8
    in al, dx
    mov ah, al
    wait_for 0x20
    mov al, ah
    mov dx, 0x3f8
    out dx, al
    jmp 2b""",
    "vmx bit": """
    mov eax, 1
    cpuid
    shr ecx, 5
    and cl, 1
    add cl, 0x30
    wait_for 0x20
    mov al, cl
    mov dx, 0x3f8
    out dx, al""",
    "panic device": "mov dx, 0x505\n mov al, 1\n out dx, al",
    "exit device": "mov dx, 0xf4\n mov al, 2\n out dx, al",
}


@pytest.fixture(scope="session")
def rom(tmp_path_factory):
    """rom(body) -> path of a 64 KiB ROM that prints "ready" and goes on with that body (a name or code)."""
    made = {}
    directory = tmp_path_factory.mktemp("roms")

    def make(body):
        if body not in made:
            stem = directory / f"rom{len(made)}"
            source, unit, image = (stem.with_suffix(suffix) for suffix in (".s", ".o", ".rom"))
            source.write_text(_SOURCE.format(body=BODIES.get(body, body), size=0x10000))
            subprocess.run(["as", "-o", unit, source], check=True)
            subprocess.run(
                ["ld", "-Ttext=0", "-e", "0", "--oformat", "binary", "-o", image, unit], check=True
            )
            made[body] = image
        return made[body]

    return make


@pytest.fixture
def engine():
    """engine(name) -> the engine; the test is skipped where it can't run."""

    def get(name):
        found = ENGINES[name]()
        state = found.availability()
        if not state.ok:
            pytest.skip(f"{name}: {state.problem}")
        return found

    return get


@pytest.fixture
def uart(monkeypatch):
    """The QEMU engines get a UART in place of their virtio port."""
    monkeypatch.setattr(qemu, "VIRTIO_SERIAL", UART)


@pytest.fixture
def boot(engine, rom, tmp_path, uart):
    """boot(engine name, body, ...) -> a machine, its log directory tmp_path/logs; stopped in the end."""
    machines = []

    def start(name, body, **options):
        image = body if isinstance(body, Path) else rom(body)
        options.setdefault("log_dir", tmp_path / "logs")
        machine = engine(name).open(image, **options)
        machine.serial.settimeout(20)
        machines.append(machine)
        return machine

    yield start
    for machine in machines:
        machine.stop()
    for machine in machines:
        assert is_gone(machine.pid)


def is_gone(pid):
    """Whether a process has ended (a zombie has: nobody may have waited for it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def read_until(sock: socket.socket, wanted: bytes) -> bytes:
    """Read until these bytes came."""
    got = b""
    while wanted not in got:
        news = sock.recv(65536)
        assert news, f"the stream ended after {got!r}"
        got += news
    return got


def read_exactly(sock: socket.socket, count: int) -> bytes:
    """Read so many bytes."""
    got = b""
    while len(got) < count:
        news = sock.recv(count - len(got))
        assert news, f"the stream ended after {got!r}"
        got += news
    return got


def read_to_end(sock: socket.socket) -> bytes:
    """Read until the stream ends. An end that does not come is a TimeoutError."""
    got = b""
    while news := sock.recv(1 << 20):
        got += news
    return got


def processor_ticks(pid):
    """User and system time of a process, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def open_descriptors():
    """How many files this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))
