"""The monitor's prompt on a machine of the file's own, and what types at it."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmxlab import Case, IOBitmap, Lab, MsrBitmap
from vmxlab.cases.steps import Enter, Vmxon
from vmxlab.console.session import Session
from vmxlab.demo import prompt_case
from vmxlab.image.compiler import CompiledCase, compile_cases
from vmxlab.image.frames import pack_payload
from vmxlab.image.protocol import CONSOLE_PROMPT
from vmxlab.sdm.controls import PrimaryControls

DEADLINE_S = 60.0
PROMPT = CONSOLE_PROMPT.encode()
SYNC = b"in-sync"
SYNC_ANSWER = b"there is no command 'in-sync'"


def all_intercepted() -> Case:
    """Exits of many kinds, of which a person sees each."""
    io_bitmap, msr_bitmap = IOBitmap(), MsrBitmap()
    io_bitmap.set_intercept(0x60, True)
    io_bitmap.set_intercept(0x3F8, True)
    for msr in (0xC000_0080, 0x174):
        msr_bitmap.set_read_intercept(msr, True)
        msr_bitmap.set_write_intercept(msr, True)
    return Case(
        name="all-intercepted",
        program="""
            in al, 0x60; mov dx, 0x3f8; mov al, 0x41; out dx, al; cpuid; mov ecx, 0xc0000080; rdmsr
            mov ecx, 0x174; mov eax, 5; mov edx, 0; wrmsr; mov rax, cr3; mov cr3, rax; mov rbx, dr7; rdtsc
            vmcall; ud2; int3; mov rax, [0x200]; mov [UNMAPPED], rax; hlt
        """,
        io_bitmap=io_bitmap,
        msr_bitmap=msr_bitmap,
        enable=(
            PrimaryControls.RDTSC_EXITING,
            PrimaryControls.MOV_DR_EXITING,
            PrimaryControls.CR3_LOAD_EXITING,
            PrimaryControls.CR3_STORE_EXITING,
        ),
    )


class Prompt:
    """What a person does at the prompt, and what they see of it."""

    def __init__(self, session: Session, cases: list[CompiledCase]) -> None:
        self.session = session
        self.cases = cases

    def __call__(self, *lines: str) -> str:
        """Type these lines, each at a prompt; the answer to the last."""
        answer = ""
        for line in lines:
            answer = self.session.command(line, DEADLINE_S)
        return answer.replace("\r", "")

    def value(self, line: str) -> int:
        """What stands behind the "=" of the first line of the answer."""
        return int(self(line).splitlines()[0].rpartition(" = ")[2], 16)

    def type(self, data: bytes) -> str:
        """Send bytes as they are, then Enter and a word that is no command: what is said until its answer.

        Reads while it sends, as a terminal does.
        """
        stream = self.session.machine.serial
        left = memoryview(data + b"\r" + SYNC + b"\r")
        said = b""
        limit = time.monotonic() + DEADLINE_S
        stream.setblocking(False)
        try:
            while not (SYNC_ANSWER in said[-4096:] and said.endswith(PROMPT)):
                ready, room, _ = select.select([stream], [stream] if left else [], [], DEADLINE_S)
                assert (ready or room) and time.monotonic() < limit, said[-300:]
                if room:
                    left = left[stream.send(left[:4096]) :]
                if ready:
                    piece = stream.recv(65536)
                    assert piece, f"the machine ended: {said[-300:]!r}"
                    said += piece
        finally:
            stream.setblocking(True)
        return said.decode("latin-1")


@pytest.fixture(scope="package")
def open_prompt(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Iterator[Prompt]]:
    """open_prompt(engine): a generator for a fixture; an image with cases where the engine has VMX."""

    def open_(engine: str) -> Iterator[Prompt]:
        folder: Path = tmp_path_factory.mktemp("prompt")
        with Lab(engine, log_dir=folder) as lab:
            if not lab.session().has_vmx:
                yield Prompt(lab.session(), [])
                return
            never_enters = Case(name="never-enters", steps=(Vmxon(region=0x123), Enter()))
            compiled = compile_cases([prompt_case(), all_intercepted(), never_enters], lab.target)
            payload = pack_payload([case.units for case in compiled], wait=True)
            yield Prompt(lab.image_session(payload), compiled)

    return open_


@pytest.fixture(scope="module")
def prompt(open_prompt: Callable[[str], Iterator[Prompt]]) -> Iterator[Prompt]:
    """On bochs."""
    yield from open_prompt("bochs")
