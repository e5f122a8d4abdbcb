"""Every error of the project, in one tree.

An error names what is wrong, where, the limit, and what to do. Errors that come out of a run also carry
the engine, the case, the last record that arrived and the path of the serial log, so that a person has the
next thing to look at. A user's mistake is always one of these; anything else is a defect of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from vmxlab.console.run import Exit, Fault, Outcome, Run
    from vmxlab.oracle.entry import Broken


class VmxlabError(Exception):
    """The root of the tree.

    `advice` is what to do next; `engine`, `case`, `last_record` and `log_path` are filled in where known,
    often later than the error was raised (see `locate`).
    """

    def __init__(self, message: str, *, advice: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice
        self.engine: str | None = None
        self.case: str | None = None
        self.last_record: str | None = None
        self.log_path: Path | None = None

    def locate(
        self,
        *,
        engine: str | None = None,
        case: str | None = None,
        last_record: str | None = None,
        log_path: Path | None = None,
    ) -> Self:
        """Add where it happened; what is known already is kept. Returns the error itself."""
        self.engine = self.engine or engine
        self.case = self.case or case
        self.last_record = self.last_record or last_record
        self.log_path = self.log_path or log_path
        return self

    def __str__(self) -> str:
        lines = [self.message]
        for label, value in (
            ("engine", self.engine),
            ("case", self.case),
            ("last record", self.last_record),
            ("log", self.log_path),
            ("what to do", self.advice),
        ):
            if value is not None:
                lines.append(f"  {label}: {value}")
        return "\n".join(lines)


# --- what a user wrote --------------------------------------------------------------------------------------


class OutOfRange(VmxlabError, ValueError):
    """A value outside what the architecture or the layout allows. `what`, `value` and `limit` say which."""

    def __init__(self, what: str, value: int, limit: str, *, advice: str | None = None) -> None:
        super().__init__(f"{what} {value:#x} is out of range: {limit}", advice=advice)
        self.what = what
        self.value = value
        self.limit = limit


class Misaligned(OutOfRange):
    """An address that must be a multiple of something and is not."""


class UnknownField(VmxlabError, KeyError):
    """A VMCS field that the SDM's Appendix B does not list."""

    def __init__(self, name: str, close: Iterable[str] = ()) -> None:
        close = list(close)
        advice = (
            f"did you mean {', '.join(close)}?" if close else "the names are those of SDM Vol. 3D, Appendix B"
        )
        VmxlabError.__init__(self, f"there is no VMCS field {name!r}", advice=advice)
        self.name = name
        self.close = close

    __str__ = VmxlabError.__str__


class CaseError(VmxlabError):
    """A case that contradicts itself or can't be laid out."""


class ProgramError(CaseError):
    """A guest program that does not assemble; `listing` is the assembler's message with the case's lines."""

    def __init__(self, message: str, *, listing: str = "", advice: str | None = None) -> None:
        super().__init__(f"{message}\n{listing}".rstrip(), advice=advice)
        self.listing = listing


class OverlappingPages(CaseError):
    """Two things were laid out at one place."""


class ImageError(VmxlabError):
    """An image that can't be made, is cut short, or was made for another monitor."""


class MissingCapability(VmxlabError):
    """The processor lacks what the case needs. A reason to skip, not to fail.

    `feature` is the SDM's name, `bit` says where the processor tells it, such as
    "IA32_VMX_PROCBASED_CTLS2[33]"; `value` is what stands there.
    """

    def __init__(self, feature: str, bit: str, *, value: int = 0) -> None:
        super().__init__(f"the processor lacks {feature} ({bit} is {value})")
        self.feature = feature
        self.bit = bit
        self.value = value

    def in_no_model(self, default: str, engine: str) -> Self:
        """Add that the engine's other models were asked as well, in vain. Returns the error itself."""
        self.message += f": neither {default} nor another model of {engine} has what is needed"
        return self


class CoverageError(VmxlabError):
    """A coverage file that can't be read or written, or an answer that it can't give."""


class GeneralProtection(VmxlabError):
    """What the processor would answer with #GP(0): a write to a locked MSR, a reserved bit set."""


# --- what a live machine did --------------------------------------------------------------------------------


class LiveError(VmxlabError):
    """What a live machine could not do. It goes on, unless it is `LiveStateLost`."""


class InstructionFailed(LiveError):
    """An instruction of L1 failed, or raised a fault: `outcome`."""

    def __init__(self, outcome: Outcome, *, advice: str | None = None) -> None:
        super().__init__(str(outcome), advice=advice)
        self.outcome = outcome


class EntryFailed(LiveError):
    """A VM entry failed: by its `outcome`, or late, with an `exit` that says so (SDM Vol. 3C, 27.8).

    `broken` are the rules of VM entry that the VMCS breaks; `exits` those of the same call before it.
    """

    def __init__(
        self,
        outcome: Outcome | None,
        exit: Exit | None,
        *,
        broken: tuple[Broken, ...] = (),
        exits: tuple[Exit, ...] = (),
    ) -> None:
        lines = [str(outcome if exit is None else exit), *(f"broken rule {rule}" for rule in broken)]
        super().__init__("\n".join(lines))
        self.outcome = outcome
        self.exit = exit
        self.broken = broken
        self.exits = exits


class ExitLimit(LiveError):
    """A handler went on and on: `exits` are those that it has seen."""

    def __init__(self, exits: tuple[Exit, ...]) -> None:
        super().__init__(
            f"the handler has gone on after {len(exits)} exits",
            advice="limit=... allows so many; 1000 is usual",
        )
        self.exits = exits


class L1Fault(LiveError):
    """A fault in L1 that no VMX instruction raised, such as one of memory that is not there: `fault`."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(
            str(fault),
            advice="L1 maps the first 4 GiB, address for address; the machine has 64 MiB from 0 on",
        )
        self.fault = fault


class LiveStateLost(LiveError):
    """What a live machine had set up is gone: its machine ended, or has run a case since."""


# --- what an engine did -------------------------------------------------------------------------------------


class EngineUnavailable(VmxlabError):
    """An engine that was asked for and can't run here: what is missing, and how to get it."""


class MachineError(VmxlabError):
    """The machine went away or stopped answering. `run` is what had arrived of the case."""

    run: Run | None = None


class MachineDied(MachineError):
    """The engine's process ended, or its processor shut down (triple fault), before the case was done."""


class MachineHung(MachineError):
    """Nothing arrived before the deadline; the machine was ended."""


class ProtocolError(VmxlabError):
    """The serial stream said something that makes no sense: a broken line, or our own fault."""


class LogError(VmxlabError):
    """The serial log can't be written: no space, no permission."""


class QmpError(MachineError):
    """The emulator refused the QMP command `command`; `error_class` is QMP's word for the kind of error."""

    def __init__(self, message: str, *, command: str, error_class: str) -> None:
        super().__init__(message)
        self.command = command
        self.error_class = error_class
