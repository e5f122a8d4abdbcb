"""Reproducers made of paper: the command lines of each engine, the part of the log, what is left out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vmxlab import Case, Run, Verdict
from vmxlab.cases.source import Asserted
from vmxlab.console.records import encode_record
from vmxlab.console.run import End
from vmxlab.engines.base import EngineInfo
from vmxlab.errors import CaseError, LogError, ProtocolError
from vmxlab.image.compiler import Target, compile_case
from vmxlab.image.monitor import load_monitor
from vmxlab.reports.reproducer import Reproducer, excerpt, new_folder


@pytest.fixture
def reproducer(skylake):
    """Makes one of a case that ran on an engine's model."""

    def make(engine, model, case=None, **more):
        case = case or Case(program="cpuid; hlt", name="asks")
        compiled = compile_case(case, Target(skylake, load_monitor(), 1 << 27), number=3)
        run = Run(case, 3, end=End.STOP, name=case.name, compiled=compiled)
        return Reproducer(run, EngineInfo(engine, "1.0", model, "named"), **more)

    return make


def lines_of(files: dict[str, bytes]) -> dict[str, list[str]]:
    """The commands in boot.sh, by their words."""
    found = re.findall(r"^    (\w+) \) ?|^    (\w+)\) #.*\n        (.*)$", files["boot.sh"].decode(), re.M)
    return {word: shlex.split(line) for _, word, line in found}


@pytest.mark.parametrize(
    ("engine", "model", "cpu", "bochs"),
    [
        ("kvm", "host", "host,+vmx,enforce", "corei7_skylake_x"),
        ("kvm", "host,vmx-ept=off", "host,+vmx,enforce,vmx-ept=off", "corei7_skylake_x"),
        (
            "kvm-in-bochs",
            "host,vmx-vpid=off,kvm_intel.ept=0",
            "host,+vmx,enforce,vmx-vpid=off",
            "corei7_skylake_x",
        ),
        ("bochs", "tigerlake", "host,+vmx,enforce", "tigerlake"),
    ],
)
def test_command_lines_have_the_processor_that_it_ran_on(reproducer, engine, model, cpu, bochs):
    files = reproducer(engine, model).files()
    lines = lines_of(files)
    assert next(iter(lines)) == ("bochs" if engine == "bochs" else "qemu")
    for word, image in (("qemu", ("-bios", "case.rom")), ("kernel", ("-kernel", "case.elf"))):
        line = lines[word]
        assert line[line.index("-cpu") + 1] == cpu
        assert line[line.index(image[0]) + 1] == image[1]
    assert f"cpu: model={bochs}, count=1," in files["case.bochsrc"].decode()
    assert 'file="case.rom"' in files["case.bochsrc"].decode()
    readme = files["README.md"].decode()
    for line in lines.values():
        assert shlex.join(line).replace("'|'", "|") in readme
    assert shlex.join(["--vmx-engine", engine, "--vmx-model", model]) in readme
    assert ("modprobe kvm_intel nested=1 ept=0" in readme) == (engine == "kvm-in-bochs")


def test_second_processor_is_on_every_command_line(reproducer):
    files = reproducer("bochs", "corei7_skylake_x", Case(second_program="hlt")).files()
    lines = lines_of(files)
    assert all(line[line.index("-smp") + 1] == "2" for word, line in lines.items() if word != "bochs")
    assert "count=2," in files["case.bochsrc"].decode()


def test_what_can_not_be_written_as_text_is_left_out_and_the_reason_said(reproducer):
    """An assertion about an object of the test's own gives way to the oracle; a case with one to nothing."""
    made = reproducer("bochs", "tigerlake", asserted=Asserted("assert run == mine", {"mine": object()}))
    files = made.files()
    assert b"assert not run.check()" in files["reproduce.py"]
    made = reproducer("bochs", "tigerlake")
    files = Reproducer(Run(None, 3, end=End.STOP, compiled=made.run.compiled)).files()
    assert "reproduce.py" not in files
    assert b"no reproduce.py: a run that was read from a log has no case" in files["README.md"]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (CaseError("two pages at one place"), "no image: two pages at one place"),
        (ProtocolError("the log is damaged\nhere"), "no image: the log is damaged"),
        (None, "no image: the case that was compiled is not known"),
    ],
)
def test_without_an_image_it_is_said_why(error, why):
    run = Run(Case(), 0, error=error, verdict_on_error=Verdict.ERROR)
    files = Reproducer(run).files()
    assert set(files) == {"README.md", "reproduce.py"}
    assert f"- {why}\n".encode() in files["README.md"]


def log_of(*records: str, end: str = "\n") -> bytes:
    return ("\n".join(records) + end).encode()


BOOT = ["# engine: bochs", encode_record("boot", {"build": 1}), "vmx> "]
ONE = [encode_record("case", {"id": 1}), encode_record("end", {"id": 1})]
TWO = [encode_record("case", {"id": 2}), "a word", encode_record("end", {"id": 2}), "vmx> "]
DEAD = [encode_record("case", {"id": 3}), "# the machine died"]


@pytest.mark.parametrize(
    ("number", "expected"),
    [(1, [*BOOT, *ONE]), (2, [*BOOT, *TWO[:-1]]), (3, [*BOOT, *DEAD]), (4, BOOT)],
)
def test_excerpt_of_a_log_is_the_boot_and_the_case(number, expected):
    assert excerpt(log_of(*BOOT, *ONE, *TWO, *DEAD), number) == log_of(*expected)


def test_excerpt_of_a_log_without_cases_is_all_of_it():
    assert excerpt(log_of(*BOOT, end=""), 1) == log_of(*BOOT, end="")


def test_folder_is_a_new_one_and_what_can_not_be_made_is_an_error(tmp_path: Path):
    assert [new_folder(tmp_path / "a", "x").name for _ in range(3)] == ["x", "x.2", "x.3"]
    (tmp_path / "file").write_text("")
    with pytest.raises(LogError, match="file/x can't be written"):
        new_folder(tmp_path / "file", "x")
    with pytest.raises(LogError, match=r"README.md can't be written"):
        Reproducer(Run(Case(), 0)).write(tmp_path / "nowhere")
