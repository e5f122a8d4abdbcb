"""`vmxlab image`: files that boot by themselves, and the command lines it prints for that."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

CASES = """\
from vmxlab import Case, SecondaryControls
a = Case(program="in al, 0x60; hlt")
b = Case(program="cpuid; hlt")
lacking = Case(needs=SecondaryControls.ENABLE_PCONFIG)
nonsense = Case(program="foo bar")
"""

MULTIBOOT_MAGIC = 0x1BADB002.to_bytes(4, "little")


@pytest.fixture
def cases(folder: Path) -> Path:
    path = Path("cases.py")
    path.write_text(CASES)
    return path


def boot(command: str, until: bytes = b"vmx> ") -> str:
    """What a command line printed up to the prompt; then it is ended as by Ctrl-C."""
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A suite that runs in the background of a shell has it ignored, and would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "TERM": "dumb"},
    )
    assert process.stdout is not None
    text = b""
    try:
        while not text.endswith(until) and (piece := os.read(process.stdout.fileno(), 4096)):
            text += piece
        os.killpg(process.pid, signal.SIGINT)
        process.wait(10)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
    assert text.endswith(until), text
    return text.decode()


def on_tcg(command: str) -> str:
    """The command line for a host whose KVM has no VMX, as no test may depend on it."""
    assert "-accel kvm -cpu host,+vmx" in command
    words = shlex.split(command)
    words[words.index("-accel") + 1] = "tcg"
    words[words.index("-cpu") + 1] = "max"
    return shlex.join(words)


def commands(out: str) -> dict[str, str]:
    """The printed command lines, by the remark above each."""
    lines = out.splitlines()
    return {line[2:]: lines[number + 1] for number, line in enumerate(lines) if line.startswith("# ")}


def test_the_printed_command_lines_boot_the_image(vmxlab_cli, cases: Path) -> None:
    result = vmxlab_cli("image", f"{cases}::a", f"{cases}::b", "-o", "two", "--engine", "bochs")
    assert result.status == 0
    printed = commands(result.out)
    assert set(printed) == {"QEMU/KVM, from the reset vector", "QEMU/KVM, as a kernel", "Bochs"}
    assert "loader=rom" in boot(on_tcg(printed["QEMU/KVM, from the reset vector"]))
    assert "loader=multiboot" in boot(on_tcg(printed["QEMU/KVM, as a kernel"]))
    said = boot(printed["Bochs"])
    assert said.count("@exit") == 4
    assert "@done cases=0x2" in said


def test_a_case_with_a_second_processor_is_given_one_by_hand_too(vmxlab_cli) -> None:
    Path("second.py").write_text(
        "from vmxlab import Case\n"
        "work = Case(program='1: pause; cmp byte ptr [DATA], 1; jne 1b; hlt',\n"
        "            second_program='mov byte ptr [DATA], 1')\n"
    )
    result = vmxlab_cli("image", "second.py", "-o", "second", "--engine", "bochs")
    printed = commands(result.out)
    assert all("-smp 2" in line for what, line in printed.items() if what.startswith("QEMU"))
    said = boot(printed["Bochs"])
    assert "@vmx ok=second-processor," in said
    assert "reason=0xc" in said


def test_without_the_multiboot_header_the_elf_boots_by_pvh(vmxlab_cli, cases: Path) -> None:
    result = vmxlab_cli("image", f"{cases}::a", "-o", "one", "--engine", "bochs", "--format", "elf")
    elf = Path("one.elf").read_bytes()
    Path("one.elf").write_bytes(elf.replace(MULTIBOOT_MAGIC, bytes(4)))
    said = boot(on_tcg(commands(result.out)["QEMU/KVM, as a kernel"]))
    assert "loader=pvh" in said
    assert "@case id=0x0 name=a" in said


def test_the_same_cases_give_the_same_bytes(vmxlab_cli, cases: Path) -> None:
    for out in ("x", "y"):
        vmxlab_cli("image", f"{cases}::a", f"{cases}::b", "-o", out, "--engine", "bochs")
    for suffix in (".rom", ".elf"):
        assert Path(f"x{suffix}").read_bytes() == Path(f"y{suffix}").read_bytes()
    vmxlab_cli("image", f"{cases}::b", f"{cases}::a", "-o", "y", "--engine", "bochs")
    assert Path("x.rom").read_bytes() != Path("y.rom").read_bytes()


@pytest.mark.parametrize(
    ("kind", "suffixes"),
    [("rom", {".rom", ".bochsrc"}), ("elf", {".elf"}), ("both", {".rom", ".elf", ".bochsrc"})],
)
def test_the_format_says_which_files_are_written(vmxlab_cli, kind: str, suffixes: set[str]) -> None:
    result = vmxlab_cli("image", "-o", "out/first.rom", "--format", kind, "--engine", "bochs")
    assert result.status == 3  # there is no folder "out", and none is made
    Path("out").mkdir()
    result = vmxlab_cli("image", "-o", "out/first.rom", "--format", kind, "--engine", "bochs")
    assert result.status == 0
    assert {path.suffix for path in Path("out").iterdir()} == suffixes


def test_several_files_of_capabilities_give_an_image_for_all_of_them(vmxlab_cli, cases: Path) -> None:
    for model in ("corei7_skylake_x", "corei7_icelake_u"):
        text = vmxlab_cli("caps", "--engine", "bochs", "--model", model, "--json").out
        Path(f"{model}.json").write_text(text)
    result = vmxlab_cli(
        "image",
        f"{cases}::a",
        "-o",
        "all",
        "--caps",
        "corei7_skylake_x.json",
        "--caps",
        "corei7_icelake_u.json",
    )
    assert result.status == 0
    assert not Path("logs/image-1").exists()
    command = commands(result.out)["Bochs"]
    settings = Path("all.bochsrc")
    for model in ("corei7_skylake_x", "corei7_icelake_u"):
        settings.write_text(settings.read_text().replace("model=corei7_skylake_x", f"model={model}"))
        said = boot(command)
        assert said.count("@exit") == 2
        assert "why=stop" in said


def test_a_case_that_the_processor_lacks_something_for_is_left_out_with_the_bit(
    vmxlab_cli, cases: Path
) -> None:
    result = vmxlab_cli("image", f"{cases}::lacking", f"{cases}::a", "--engine", "bochs")
    assert result.status == 0
    assert (
        "left out lacking: the processor lacks ENABLE_PCONFIG (IA32_VMX_PROCBASED_CTLS2[59] is 0)"
        in result.err
    )
    assert result.out.startswith("1 case in")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["cases.py::lacking"], 3, "no case is left for the image"),
        (["cases.py::nonsense"], 3, "does not assemble"),
        (["-o", "/proc/nowhere"], 3, "/proc/nowhere.rom can't be written"),
        (["--engine", "tcg"], 3, "lacks VMX"),
        (["--caps", "none.json"], 2, "'none.json' does not exist"),
        (["--caps", "cases.py"], 3, "cases.py: the capabilities are no JSON"),
        (["--caps", "cases.py", "--model", "x"], 2, "either --caps or an engine, not both"),
        (["--format", "iso"], 2, "'iso' is not one of"),
    ],
)
def test_what_goes_wrong_is_said_and_writes_nothing(
    vmxlab_cli, cases: Path, arguments: list[str], status: int, message: str
) -> None:
    engine = [] if {"--caps", "--engine"} & set(arguments) else ["--engine", "bochs"]
    result = vmxlab_cli("image", *arguments, *engine)
    assert result.status == status
    assert message in result.err
    assert not list(Path().glob("vmxlab*"))
