"""VM entries from the prompt: each exit as a record and in words, the step, and entries that fail."""

from __future__ import annotations

import random
import re

import pytest

from vmxlab.cli import main
from vmxlab.console.rebuild import runs_from_records
from vmxlab.console.records import RecordReader, encode_record
from vmxlab.reports.runs import describe_exit
from vmxlab.sdm.exit_reasons import ExitReason, describe_reason
from vmxlab.sdm.interruption import InterruptionInformation
from vmxlab.sdm.qualifications import decode_qualification

SEED = 20_241


@pytest.fixture
def loaded(prompt):
    """The baseline, set up anew."""
    prompt("load")
    return prompt


def exits_of(text):
    """The exits of the records in an answer, as a run of a case would have them."""
    reader = RecordReader()
    lines = [line for line in text.splitlines() if line.startswith("@exit")]
    start, end = (
        encode_record("case", {"id": 0}),
        encode_record("end", {"id": 0, "why": "stop", "exits": len(lines)}),
    )
    (run,) = runs_from_records(reader.feed("".join(f"{line}\r\n" for line in (start, *lines, end)).encode()))
    return run.exits


# --- words --------------------------------------------------------------------------------------------------


def test_each_exit_is_told_in_the_words_of_vmxlab(prompt):
    """Reason, event, qualification, addresses and operands as `vmxlab run` shows them."""
    text = prompt("load 1", "launch")
    while "exit: HLT" not in text:
        answer = prompt("go")
        if "no instruction" in answer:  # an exception, an EPT violation: L2 goes on behind the instruction
            rip = prompt.value("reg rip")
            prompt(f"reg rip {rip + LENGTHS[shown_code(prompt, rip)]:#x}")
            answer = prompt("resume")
        text += answer
    exits = exits_of(text)
    told = re.findall(r"^exit: (\w+) \((\d+)\): (.*)$", text, re.M)
    assert len(exits) == len(told) > 13
    for exit, (name, number, words) in zip(exits, told, strict=True):
        assert (name, int(number)) == (exit.reason.name, exit.reason)
        expected = describe_exit(exit)
        assert words == expected, name


LENGTHS = {"0f0b": 2, "488b": 8, "4889": 8}
"""Of the instructions that exit without telling their length, by their first two bytes."""


def shown_code(prompt, rip):
    return prompt(f"mem gla:{rip:#x} 2").partition(": ")[2].replace(" ", "").strip()


def decoded(prompt, line):
    return [text[15:] for text in prompt(line).splitlines()]


def test_decode_says_what_python_says_of_every_reason(prompt):
    """With random qualifications, and with each bit of them alone: one seed, one answer."""
    source = random.Random(SEED)
    for number in range(90):
        flags = source.choice((0, 1 << 31, 1 << 26 | 1 << 29, 1 << 20))
        raws = [source.choice((0, 1)), source.getrandbits(64), source.getrandbits(17)]
        raws += [1 << bit for bit in range(17)] if number in (28, 30, 44, 48) else []
        for raw in raws:
            expected = [describe_reason(number | flags), decode_qualification(number, raw).describe()]
            assert decoded(prompt, f"decode {number | flags:#x} {raw:#x}") == expected, (number, raw)


def test_decode_says_what_python_says_of_events(prompt):
    source = random.Random(SEED)
    for _ in range(80):
        info = source.getrandbits(32) | source.choice((0, 1 << 31, 1 << 31))
        raw = source.getrandbits(64) if source.random() < 0.5 else source.getrandbits(17)
        event = InterruptionInformation.from_bits(info)
        vector = event.vector if event.valid else None
        expected = ["EXCEPTION_OR_NMI", decode_qualification(0, raw, vector).describe(), event.describe()]
        assert decoded(prompt, f"decode EXCEPTION_OR_NMI {raw:#x} {info:#x}") == expected, (info, raw)


def test_the_last_exit_is_shown_again_as_it_was(loaded):
    answer = loaded("launch")
    told = answer[answer.index("exit: ") :]
    loaded("reg rip 5", "reg rax 7")
    assert loaded("exit") == told


def test_registers_that_changed_are_told(loaded):
    loaded("code 48 ff c0 48 89 c3 f9 f4", "reg rax 0xfff")  # inc rax; mov rbx, rax; stc; hlt
    assert loaded("launch").endswith(
        "  changed: rax 0xfff -> 0x1000, rbx 0x0 -> 0x1000, rflags 0x2 -> 0x17\n"
    )


def test_a_register_is_what_l2_gets(loaded):
    assert loaded("reg r15 0x1234") == "r15 = 0x1234\n"
    loaded("code 4c 01 fc f4", "reg rsp 0x7000")  # add rsp, r15; hlt
    loaded("launch")
    assert loaded("reg rsp") == "rsp = 0x8234\n"
    registers = dict(re.findall(r"(\w+) +([0-9a-f]{16})", loaded("reg")))
    assert (int(registers["r15"], 16), int(registers["rip"], 16)) == (0x1234, 0x8003)
    assert len(registers) == 22


# --- going on -----------------------------------------------------------------------------------------------


def test_skip_goes_past_the_instruction_and_resume_goes_on(loaded):
    loaded("port 0x60 on", "launch")
    assert loaded("skip") == "rip = 0x8003\n"
    assert "exit: HLT" in loaded("resume")


def test_go_skips_and_resumes_so_many_times(loaded):
    loaded("code e460 e460 e460 f4", "port 0x60 on", "launch")
    answer = loaded("go 3")
    assert re.findall(r"^exit: (\w+)", answer, re.M) == ["IO_INSTRUCTION", "IO_INSTRUCTION", "HLT"]


def test_an_exit_that_is_about_no_instruction_is_not_skipped(loaded):
    loaded("reg rip 0x20000", "launch")
    assert "is about no instruction" in loaded("skip")
    assert loaded.value("reg rip") == 0x20000


def test_an_endless_loop_ends_by_the_preemption_timer(loaded):
    loaded("code eb fe", "vmwrite VMX_PREEMPTION_TIMER_VALUE 1000")
    assert "exit: PREEMPTION_TIMER (52): -\n" in loaded("launch")


def test_an_entry_without_the_timer_or_the_monitors_host_rip_is_warned_of(loaded):
    controls = loaded.value("vmread PIN_BASED_CONTROLS")
    loaded("code f4", f"vmwrite PIN_BASED_CONTROLS {controls & ~(1 << 6):#x}")
    assert "note: the preemption timer is not active" in loaded("launch")


# --- step ---------------------------------------------------------------------------------------------------


def steps_to(prompt, count, way=""):
    """Where RIP is after each step."""
    places = []
    for _ in range(count):
        prompt(f"step {way}")
        places.append(prompt.value("reg rip"))
    return places


def test_a_step_is_one_instruction(loaded):
    """nop; in al, 0x60; mov ecx, imm32; rdmsr: and HLT exits by itself."""
    assert "step by RFLAGS.TF; the #DB exits" in loaded("step")
    assert steps_to(loaded, 3) == [0x8003, 0x8008, 0x800A]
    assert "exit: HLT" in loaded("step")


def test_a_step_puts_back_what_it_changed(loaded):
    def state():
        return {
            name: loaded.value(f"vmread {name}")
            for name in (
                *("EXCEPTION_BITMAP", "PIN_BASED_CONTROLS", "PRIMARY_PROCESSOR_BASED_CONTROLS"),
                *("GUEST_RFLAGS", "GUEST_PENDING_DEBUG_EXCEPTIONS", "VMX_PREEMPTION_TIMER_VALUE"),
            )
        }

    loaded("vmwrite EXCEPTION_BITMAP 0x4000", "port 0x60 on")
    pin = loaded.value("vmread PIN_BASED_CONTROLS")
    loaded(f"vmwrite PIN_BASED_CONTROLS {pin & ~(1 << 6):#x}")
    before = state()
    assert "exit: IO_INSTRUCTION" in loaded("step", "step")  # an exit that is no #DB
    assert state() == before
    loaded("skip", "step")
    assert state() == before


def test_a_step_over_blocking_by_mov_ss(loaded):
    """SDM Vol. 3A, 6.8.3: no trap between MOV SS and the instruction behind it."""
    loaded("code 8cd0 8ed0 90 90 f4")  # mov eax, ss; mov ss, eax; nop; nop; hlt
    assert steps_to(loaded, 3) == [0x8002, 0x8005, 0x8006]


def test_a_step_with_blocking_by_sti_in_the_vmcs(loaded):
    loaded("code 90 90 f4", "vmwrite GUEST_RFLAGS 0x202", "vmwrite GUEST_INTERRUPTIBILITY_STATE 1")
    answer = loaded("step")
    assert "#DB (1), hardware exception" in answer


def test_l2s_own_trap_flag_stays(loaded):
    loaded("vmwrite GUEST_RFLAGS 0x102", "step")
    assert loaded.value("reg rflags") & 0x100


def test_a_step_that_is_asked_for_by_a_flag_that_the_processor_lacks_is_the_processors_answer(loaded):
    """corei7_skylake_x does not allow the monitor trap flag."""
    answer = loaded("step mtf")
    assert "note: this processor does not allow MONITOR_TRAP_FLAG to be 1" in answer
    assert "VMfailValid(7: VM entry with invalid control fields)" in answer
    assert not loaded.value("vmread PRIMARY_PROCESSOR_BASED_CONTROLS") >> 27 & 1


# --- entries that fail --------------------------------------------------------------------------------------


def test_a_failed_entry_has_its_error_and_all_fields(loaded):
    loaded("vmwrite CR3_TARGET_COUNT 5")
    answer = loaded("launch")
    assert "@vmx op=vmlaunch rc=valid error=0x7*" in answer
    assert answer.count("@vmcs ") > 3
    assert answer.endswith("VMfailValid(7: VM entry with invalid control fields)\n")


def test_an_entry_that_fails_late_has_its_reason_and_all_fields(loaded):
    loaded("vmwrite VMCS_LINK_POINTER 1")
    answer = loaded("launch")
    assert answer.count("@vmcs ") > 3
    assert "exit: ENTRY_FAILURE_GUEST_STATE (VM-entry failure) (33): invalid VMCS link pointer\n" in answer


def test_vmxlab_check_reads_the_log_of_the_prompt(loaded, capsys):
    loaded("vmwrite GUEST_RFLAGS 0", "launch")
    assert main(["check", str(loaded.session.log.path), "--model", "corei7_skylake_x"]) == 1
    assert "RFLAGS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (["launch", "launch"], "VMfailValid(4: VMLAUNCH with a VMCS that is not clear): 'resume' it\n"),
        (["resume"], "VMfailValid(5: VMRESUME with a VMCS that is not launched): 'launch' it\n"),
    ],
)
def test_a_wrong_launch_state_says_what_to_type_and_no_fields(loaded, lines, what):
    answer = loaded(*lines)
    assert answer.endswith(what)
    assert "@vmcs" not in answer


def test_an_entry_without_a_current_vmcs(prompt):
    prompt("load", "vmclear")
    assert "VMfailInvalid: no current VMCS" in prompt("launch")
    prompt("vmxoff")
    for command in ("launch", "resume"):
        assert "fault: #UD (6), error code 0x0: not in VMX operation" in prompt(command)
    for command in ("step", "skip", "go", "reg rip", "code f4", "port show", "ept show"):
        assert "not in VMX operation" in prompt(command)


def test_a_reason_that_is_not_assigned_is_a_number(prompt):
    assert decoded(prompt, "decode 200") == ["reason 200"]
    assert ExitReason.HLT.name in prompt("decode 12")


def test_vmxlab_decode_tells_what_was_done_by_hand(loaded, capsys):
    """Records that no case holds are missing nothing, and a case that runs afterwards is one."""
    loaded("launch", "load 1", "launch", "skip", "resume", "fault ud", "resume", "run 0", "state")
    assert main(["decode", str(loaded.session.log.path)]) == 0
    story = capsys.readouterr().out
    assert "by hand\n" in story
    assert "case 0  baseline\n" in story
    assert story.splitlines()[-1].startswith("whole  1 case, ")
    assert "missing" not in story
