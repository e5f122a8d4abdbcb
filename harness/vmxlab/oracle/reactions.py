"""What L1 does on an exit: reactions, and defaults, as guest/monitor/exits.c does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vmxlab.cases.reactions import (
    DEFAULT_ACTIONS,
    Act,
    InveptAction,
    Reaction,
    Resume,
    SetField,
    SetMemory,
    SetRegister,
    Skip,
    Stop,
)
from vmxlab.oracle.cached import Cached
from vmxlab.oracle.prediction import PredictedExit, PredictedOutcome
from vmxlab.oracle.root import Root
from vmxlab.oracle.values import Bits, CannotTell
from vmxlab.sdm.exit_reasons import basic_reason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import GENERAL_REGISTERS, InterruptibilityState

_LONG_CODE = 1 << 13
_BLOCKING = int(InterruptibilityState.BLOCKING_BY_STI | InterruptibilityState.BLOCKING_BY_MOV_SS)
_RSP = 4


@dataclass(slots=True)
class Policy:
    """The reactions of a case with how often each has matched, and its own EPTP for INVEPT."""

    reactions: Sequence[Reaction]
    eptp: int | None
    matches: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """No reaction has matched yet."""
        self.matches = [0] * len(self.reactions)

    def choose(self, exit_: PredictedExit) -> Sequence[Act]:
        """The actions for an exit. Raises CannotTell where it depends on what is not known."""
        if not isinstance(exit_.full_reason, int):
            raise CannotTell("what the exit reason is")
        basic = int(basic_reason(exit_.full_reason))
        chosen: Sequence[Act] | None = None
        for i, reaction in enumerate(self.reactions):
            if reaction.reason != basic or not self._matches(reaction, exit_):
                continue
            count = self.matches[i]
            self.matches[i] += 1
            applies = count >= reaction.from_match and (
                reaction.match_count == 0 or count - reaction.from_match < reaction.match_count
            )
            if applies and chosen is None:
                chosen = reaction.actions
        if chosen is not None:
            return chosen
        return (DEFAULT_ACTIONS.get(basic, Stop)(),)

    @staticmethod
    def _matches(reaction: Reaction, exit_: PredictedExit) -> bool:
        qualification = exit_.raw_qualification
        mask = reaction.qualification_mask
        if isinstance(qualification, int):
            return qualification & mask == reaction.qualification_value
        known = qualification.known if isinstance(qualification, Bits) else 0
        if (
            isinstance(qualification, Bits)
            and (qualification.value ^ reaction.qualification_value) & mask & known
        ):
            return False
        if mask & ~known:
            raise CannotTell("a reaction goes by bits of the exit qualification that are not known")
        return True


@dataclass(slots=True)
class Answer:
    """What the reaction to one exit did: outcomes that it reported, and whether the entry ends ("stop")."""

    outcomes: list[PredictedOutcome]
    stopped: bool = False


def answer(
    actions: Sequence[Act], root: Root, registers: list[Bits], cached: Cached, eptp: int | None
) -> Answer:
    """Carry out actions: on the VMCS, L2's registers and memory."""
    result = Answer([])
    for action in actions:
        match action:
            case SetRegister(name, value):
                _set_register(root, registers, GENERAL_REGISTERS.index(name), value, result)
            case SetField(where, value):
                _set_field(root, where, value, result)
            case SetMemory(address, content):
                root.memory.write(address, content)
            case InveptAction(kind, own):
                chosen = eptp if own is None else own
                assert chosen is not None  # the compiler has refused it
                outcome = root.invept(kind, chosen)
                result.outcomes.append(outcome)
                if outcome.kind == "ok":
                    cached.drop(physical=True)
                    root.memory.tables_are_new()
            case Skip():
                _skip(root, result)
            case Resume():
                pass
            case Stop():
                result.stopped = True
                return result
            case _:
                raise CannotTell(f"what the action {type(action).__name__} does")
    return result


def _set_field(root: Root, where: Field, value: int, result: Answer) -> None:
    outcome = root.vmwrite(int(where), value)
    if outcome.kind != "ok":
        result.outcomes.append(outcome)


def _set_register(root: Root, registers: list[Bits], index: int, value: int, result: Answer) -> None:
    if index == _RSP:
        _set_field(root, Field.GUEST_RSP, value, result)
    registers[index] = Bits(value)


def _skip(root: Root, result: Answer) -> None:
    """RIP past the instruction by the length recorded; blocking by STI and MOV SS ends."""
    vmcs = root.current
    assert vmcs is not None
    rip = vmcs.get(Field.GUEST_RIP) + vmcs.get(Field.EXIT_INSTRUCTION_LENGTH)
    rights = vmcs.read(Field.GUEST_CS_ACCESS_RIGHTS).bit(_LONG_CODE)
    if rights is None:
        raise CannotTell("whether L2 is in 64-bit mode")
    _set_field(root, Field.GUEST_RIP, rip if rights else rip & 0xFFFF_FFFF, result)
    blocking = vmcs.get(Field.GUEST_INTERRUPTIBILITY_STATE)
    if blocking & _BLOCKING:
        _set_field(root, Field.GUEST_INTERRUPTIBILITY_STATE, blocking & ~_BLOCKING, result)
