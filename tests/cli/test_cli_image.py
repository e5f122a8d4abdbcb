"""`vmxlab image`: files that boot by themselves, and the command lines it prints for that."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from vmxlab.image.iso import pack_iso
from vmxlab.reports.caps_file import read_caps_file
from vmxlab.reports.story import Kind, Storyteller

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


def places(log: str) -> list[str]:
    """Where the exits of a log were: no harness wrote the code into it, so the monitor must have said it."""
    teller = Storyteller()
    passages = [*teller.feed(log.encode()), *teller.close()]
    return [passage.place for passage in passages if passage.kind is Kind.EXIT]


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
    assert places(said) == ["0x8000  in al, 0x60", "0x8002  hlt", "0x8000  cpuid", "0x8002  hlt"]


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
        (["--format", "cd"], 2, "'cd' is not one of"),
        (["--reproducer", "r", "-o", "vmxlab"], 2, "either --reproducer, or --output and --format"),
        (["--reproducer", "r", "--format", "rom"], 2, "either --reproducer, or --output and --format"),
        (["cases.py::lacking", "--reproducer", "r", "--model", "bx_generic"], 3, "no case is left"),
        (["cases.py::nonsense", "--reproducer", "r"], 3, "does not assemble"),
        (["--reproducer", "/proc/nowhere"], 3, "/proc/nowhere can't be made"),
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


# --- reproducers -------------------------------------------------------------------------------------------

FILES = {"README.md", "boot.sh", "case.bochsrc", "case.elf", "case.rom", "reproduce.py", "serial.log"}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_reproducer_of_any_case_boots_where_it_is_moved_to(vmxlab_cli, cases: Path) -> None:
    result = vmxlab_cli("image", f"{cases}::a", "--reproducer", "r", "--engine", "bochs")
    assert (result.status, result.out) == (0, "a  r\nBegin with README.md.\n")
    assert names_in(Path("r")) == FILES
    readme = Path("r/README.md").read_text()
    assert "# a: PASS on bochs" in readme
    assert str(Path.cwd()) not in "".join(Path("r", name).read_text() for name in ("boot.sh", "case.bochsrc"))
    Path("r").rename("elsewhere")
    said = boot("elsewhere/boot.sh")
    exits = re.findall(r"^@exit \S+.*", Path("elsewhere/serial.log").read_text(), re.M)
    assert len(exits) == 2
    assert re.findall(r"^@exit \S+.*(?=\r)", said, re.M) == exits
    script = Path("elsewhere/boot.sh")
    script.write_text(script.read_text().replace("-accel kvm -cpu host,+vmx,enforce", "-accel tcg -cpu max"))
    assert "loader=rom" in boot("elsewhere/boot.sh qemu")
    assert "loader=multiboot" in boot("elsewhere/boot.sh kernel")


def test_reproducers_of_several_cases_have_a_folder_each_and_none_is_overwritten(
    vmxlab_cli, cases: Path
) -> None:
    command = ("image", f"{cases}::a", f"{cases}::b", "--reproducer", "r", "--engine", "bochs")
    assert vmxlab_cli(*command).status == 0
    assert names_in(Path("r")) == {"case-0", "case-1"}
    again = vmxlab_cli(*command)
    assert again.status == 3
    assert "the folder r/case-0 is not empty" in again.err


def test_reproducer_for_given_capabilities_was_not_run_and_says_so(vmxlab_cli, cases: Path) -> None:
    Path("caps.json").write_text(vmxlab_cli("caps", "--engine", "bochs", "--json").out)
    result = vmxlab_cli("image", f"{cases}::a", "--reproducer", "r", "--caps", "caps.json")
    assert result.status == 0
    assert names_in(Path("r")) == FILES - {"serial.log"}
    assert "# a: an image for given capabilities, not run" in Path("r/README.md").read_text()


# --- ISO ---------------------------------------------------------------------------------------------------

needs_grub = pytest.mark.skipif(
    not (shutil.which("grub-mkimage") and shutil.which("xorriso")),
    reason="GRUB and xorriso make it: make test installs them, or tools/setup.sh run iso",
)

FIRMWARE = """\
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
ata0-master: type=cdrom, path=vmxlab.iso, status=inserted
boot: cdrom
"""


@pytest.mark.slow
@needs_grub
@pytest.mark.skipif(
    not all(Path(line.split("file=")[1]).exists() for line in FIRMWARE.splitlines() if "file=" in line),
    reason="it is booted by Bochs's BIOS, which Debian has in the packages bochsbios and vgabios",
)
def test_image_booted_by_firmware_and_grub_runs_its_cases(vmxlab_cli, cases: Path) -> None:
    """On Bochs, whose processor has VMX. Without a claim to memory: GRUB clears it, for seconds there."""
    vmxlab_cli("image", f"{cases}::a", f"{cases}::b", "--engine", "bochs")
    Path("vmxlab.iso").write_bytes(pack_iso(Path("vmxlab.elf").read_bytes()).data)
    settings = Path("vmxlab.bochsrc").read_text().replace("guest=64, host=64", "guest=128, host=128")
    rest = [line for line in settings.splitlines() if not line.startswith(("romimage:", "vga:", "pci:"))]
    Path("firmware.bochsrc").write_text(FIRMWARE + "\n".join(rest) + "\n")
    said = boot("echo c | bochs-bin -q -f firmware.bochsrc")
    assert "loader=multiboot" in said
    assert re.findall(r"^@exit .*reason=(\w+)", said, re.M) == ["0x1e", "0xc", "0xa", "0xc"]
    assert said.count("why=stop") == 2


@needs_grub
def test_iso_boots_by_firmware_where_there_is_the_memory_for_it(vmxlab_cli, cases: Path) -> None:
    result = vmxlab_cli("image", f"{cases}::a", f"{cases}::b", "--format", "iso", "--engine", "bochs")
    assert result.status == 0
    assert {path.name for path in Path().glob("vmxlab*")} == {"vmxlab.iso"}
    assert "it boots on a PC with BIOS" in result.err
    command = on_tcg(commands(result.out)["QEMU/KVM, as a PC with a CD"])
    assert " -m 128 " in command
    said = boot(command.replace(" -m 128 ", " -m 60 "), until=b"Press any key to continue...")
    assert "The image needs the memory from 1 MiB to 64 MiB; this machine has:" in said
    assert "@boot" not in said
    # As a disk, the way a USB stick is one.
    said = boot(command.replace("-cdrom ", "-hda "))
    assert "loader=multiboot" in said
    assert "@done cases=0x2" in said


def test_iso_without_the_programs_for_it_names_the_packages(
    vmxlab_cli, cases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("caps.json").write_text(vmxlab_cli("caps", "--engine", "bochs", "--json").out)
    which = shutil.which
    monkeypatch.setattr(
        "shutil.which", lambda name, **more: None if name == "xorriso" else which(name, **more)
    )
    result = vmxlab_cli("image", f"{cases}::a", "--format", "iso", "--caps", "caps.json")
    assert result.status == 3
    assert "an ISO image can't be made:" in result.err
    assert "xorriso" in result.err
    assert "apt-get install grub-common grub-pc-bin xorriso" in result.err
    assert not list(Path().glob("vmxlab*"))


def test_serial_log_of_a_machine_gives_the_capabilities_to_make_an_image_for_it(
    vmxlab_cli, cases: Path
) -> None:
    vmxlab_cli("image", f"{cases}::a", "--reproducer", "r", "--engine", "bochs", "--model", "tigerlake")
    written = vmxlab_cli("caps", "--engine", "bochs", "--model", "tigerlake", "--json").json
    found = read_caps_file(Path("r/serial.log"))
    assert found.capabilities.to_dict() == written["msrs"]
    assert found.physical_address_width == written["physical_address_width"]
    result = vmxlab_cli("image", f"{cases}::a", "--caps", "r/serial.log")
    assert result.status == 0
