"""What the end of a log usually means: a sentence for each way to die, with the section of the SDM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum

from vmxlab.engines.base import MachineEnd


class Place(Enum):
    """How far a machine had come when its log ended."""

    BEFORE_BOOT = "before the monitor's first record"
    BOOT = "after the monitor had started, before its first case or prompt"
    IDLE = "at the monitor's prompt"
    SENT = "at the monitor's prompt, with a case on its way"
    BETWEEN = "between two cases"
    DONE = "after the last case"
    SETUP = "while the case's memory was laid out, before its first VMX instruction"
    STEP = "between VMX instructions of L1, or in the next one"
    ENTRY = "at the VM entry, in L2, or in the VM exit that would have been the first"
    EXIT = "while L1 answered the VM exit, in L2 after it, or in the VM exit that would have been the next"
    ENDING = "while the monitor took the case down"

    @property
    def enters(self) -> bool:
        """Whether L2 may have run since the last record."""
        return self in (Place.ENTRY, Place.EXIT)


# Where L2 may have run, the first sentence is not enough: what VM entry and VM exit do is the usual cause.
_DEATHS: Mapping[MachineEnd, str] = {
    MachineEnd.TRIPLE_FAULT: (
        "Shutdown: a fault came while L1 delivered a double fault (SDM Vol. 3A, 6.15, interrupt 8). It was "
        "L1's own; in L2 it would have been a VM exit, reason 2."
    ),
    MachineEnd.VMX_ABORT: (
        "The VM exit itself failed, which puts the processor into shutdown (SDM Vol. 3C, 28.7). Usual "
        "causes: an MSR area of VM exit that can't be stored or loaded, host PDPTEs that are invalid, a VMCS "
        "region that was written over. Bytes 7:4 of the VMCS region hold the VMX-abort indicator, which "
        "says which."
    ),
    MachineEnd.SHUTDOWN: "The image asked its engine to end.",
    MachineEnd.EXITED: (
        "The engine's process ended by itself and names no fault of the processor: its own log says why."
    ),
    MachineEnd.KILLED: (
        "Somebody else ended the engine's process: another user of the host, a CI job's limit, or the kernel "
        "when memory ran out (see dmesg). It says nothing about the case."
    ),
    MachineEnd.STOPPED: "The harness stopped the machine.",
    MachineEnd.PANIC: "The guest reported a panic to its engine (pvpanic).",
    MachineEnd.ENGINE_ERROR: (
        "The engine gave up: an assertion or an error of the emulator or of KVM, not an event of the "
        "architecture. What the case does may well be what it does not support."
    ),
}
_IN_ENTRY: Mapping[MachineEnd, str] = {
    MachineEnd.TRIPLE_FAULT: (
        "Here that is mostly host state that L1 can't run with: the VM exit takes place, and L1's first "
        "instruction or first exception after it faults. Look at HOST_RIP, HOST_RSP, HOST_CR3, and the bases "
        "of IDTR and GDTR (SDM Vol. 3C, 28.5)."
    ),
    MachineEnd.ENGINE_ERROR: (
        "In a VM entry KVM does so where a structure lies outside of the guest's memory, for example an EPTP."
    ),
}

PANIC = (
    "A fault in L1 that nothing could catch: a double fault, or one outside of any case and command. The "
    "monitor has stopped. Usual causes: memory of the monitor that the case wrote over, or host state (GDTR, "
    "TR, HOST_RSP) that a VM exit loaded and that can't deliver an exception (SDM Vol. 3A, 6.15, interrupt "
    "8)."
)
FAULT = (
    "A fault in L1 that no VMX instruction raised. The monitor caught it, ended the case, and lives on. "
    "Usual causes: an address of the case that L1 can't reach, or host state that a VM exit loaded."
)
RESTART = (
    "The monitor starts again: the processor was reset. Without a command to do so that is a triple fault in "
    "L1 on a machine that resets itself then, a watchdog, or somebody at the reset button."
)
DEADLINE = (
    "Nothing more came, and the harness gave up waiting. The machine was alive as far as its engine knew."
)
_DEADLINE_IN_ENTRY = (
    "Here L2 mostly runs without an exit: a loop, or an activity state that nothing ends (HLT without "
    "exiting, shutdown, wait-for-SIPI). Without the VMX-preemption timer nothing takes the processor back "
    "(SDM Vol. 3C, 26.5.1). Else a VM exit went to a HOST_RIP that is not the monitor's."
)
_DEADLINE_ELSEWHERE = (
    "Here it is mostly L1 that hangs, or a slow engine: a case's Limits(seconds=...) gives it more time."
)
CUT = (
    "Nothing in the log says why. The log may have been cut, the machine may still be running, or it was "
    "stopped, or it hangs."
)
_CUT_IN_ENTRY = (
    "If this is all that came, the VM entry or the VM exit after it killed the machine, or L2 runs without "
    "an exit."
)

_ERRORS: Mapping[str, str] = {
    "script-too-long": "the case is larger than the monitor's buffer",
    "frame-crc": "what was sent over the serial line, or lies in the image, was damaged on its way",
    "frame-base": "a frame that is a difference to another case came without that case before it",
    "frame-operations": "a frame does not unpack: the image is damaged, or made for another monitor",
    "frame-stopped": "the sender of a frame stopped in the middle",
    "frame-too-long": "a frame is larger than the monitor's buffer",
    "payload-version": "the cases in the image were made for another version of the monitor",
    "payload-crc": "the cases in the image are damaged: not all of it was loaded, or it was written over",
    "payload-cut": "the image holds fewer cases than it says",
}

OPEN_LIST = (
    "That is a list of VMX instructions that succeeded, and it was still open: the instruction after them "
    "left no outcome."
)
NO_LOG = (
    "A serial log of the monitor has lines that begin with @boot, @case, @exit. Where a machine left none, "
    "it did not get as far as the monitor, or its serial line is not the one that was recorded."
)


def explain_error(what: str) -> str:
    """What an @error record means: the monitor refused what it was given."""
    return _ERRORS.get(what, "the monitor refused what it was given, for a reason not known here")


def explain_end(end: MachineEnd, place: Place) -> list[str]:
    """What became of the machine, and what that usually means at this place."""
    sentences = [_DEATHS.get(end, "")]
    if place.enters:
        sentences.append(_IN_ENTRY.get(end, ""))
    return [text for text in sentences if text]


def explain_deadline(place: Place) -> list[str]:
    """What it usually means that nothing more came."""
    return [DEADLINE, _DEADLINE_IN_ENTRY if place.enters else _DEADLINE_ELSEWHERE]


def explain_cut(place: Place) -> list[str]:
    """What it usually means that a log just ends."""
    return [CUT, _CUT_IN_ENTRY] if place.enters else [CUT]


# --- the engine's last words --------------------------------------------------------------------------------

_POSTMORTEM = re.compile(rf": ({'|'.join(re.escape(end.value) for end in MachineEnd)})$")
_TELLING = re.compile(r">>PANIC<<|VMABORT|VMX.abort|KVM: |kvm run failed|\bRIP=|KVM internal error", re.I)
_DEADLINE = re.compile(r"^deadline: ")

TELLING_LINES = 3


def end_in_remark(remark: str) -> MachineEnd | None:
    """What a remark says that became of the machine: the first line of `Machine.postmortem`."""
    match = _POSTMORTEM.search(remark)
    return MachineEnd(match[1]) if match else None


def is_deadline(remark: str) -> bool:
    """Whether it is the harness's remark that it waited in vain."""
    return _DEADLINE.search(remark) is not None


def is_telling(remark: str) -> bool:
    """Whether a line of an engine's log says more than others about its end."""
    return _TELLING.search(remark) is not None
