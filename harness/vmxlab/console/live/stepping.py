"""Single steps of L2 on a live machine (SDM Vol. 3C, 26.5.2; Vol. 3B, 18.3.1.4).

With the monitor trap flag an exit follows the instruction. Without it RFLAGS.TF makes a #DB behind it, which
the exception bitmap turns into an exit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from vmxlab.engines.differences import KNOWN_DIFFERENCES
from vmxlab.errors import OutOfRange
from vmxlab.image import script
from vmxlab.sdm.controls import PrimaryControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import DR6, RFLAGS, InterruptibilityState, PendingDebugExceptions, Vector

if TYPE_CHECKING:
    from vmxlab.console.live.machine import LiveMachine
    from vmxlab.console.live.snapshot import Snapshot
    from vmxlab.console.run import Exit

_CONTROLS = Field.PRIMARY_PROCESSOR_BASED_CONTROLS
_MTF = PrimaryControls.MONITOR_TRAP_FLAG
_BLOCKING = Field.GUEST_INTERRUPTIBILITY_STATE
_PENDING = Field.GUEST_PENDING_DEBUG_EXCEPTIONS
_SHADOW = InterruptibilityState.BLOCKING_BY_STI | InterruptibilityState.BLOCKING_BY_MOV_SS

# Known differences: the exit by the flag that never comes, and the #DB that comes too early.
_NO_MTF = "mtf-single-step"
_TOO_EARLY = "single-step-before-the-instruction"
_TRIES = 8
"""The pages of a walk, and then some."""


class StepBy(Enum):
    """What makes a step end."""

    MONITOR_TRAP_FLAG = "monitor trap flag"
    TRAP_FLAG = "RFLAGS.TF"


@dataclass(frozen=True, slots=True)
class Stepped:
    """What came of steps: an exit each. Where the last instruction exited by itself, `complete` is False."""

    exits: tuple[Exit, ...]
    by: StepBy
    complete: bool

    @property
    def exit(self) -> Exit:
        """The last exit."""
        return self.exits[-1]

    def __str__(self) -> str:
        count = len(self.exits) - (not self.complete)
        text = f"{count} step{'' if count == 1 else 's'} by {self.by.value}, RIP {self.exit.rip:#x}"
        return text if self.complete else f"{text}; then {self.exit}"


def step(vm: LiveMachine, n: int, by: StepBy | None) -> Stepped:
    """See `LiveMachine.step`."""
    if n < 1:
        raise OutOfRange("number of steps", n, "at least 1")
    if by is StepBy.MONITOR_TRAP_FLAG:
        vm.capabilities.require(_MTF)
    way = by or _way(vm)
    one = _by_monitor_trap_flag if way is StepBy.MONITOR_TRAP_FLAG else _by_trap_flag
    exits: list[Exit] = []
    complete = True
    while complete and len(exits) < n:
        exit, complete = one(vm)
        exits.append(exit)
    return Stepped(tuple(exits), way, complete)


def _way(vm: LiveMachine) -> StepBy:
    """The monitor trap flag, where the processor has it and it is not known to do nothing."""
    trusted = vm.capabilities.supports(_MTF) and not _differs(vm, _NO_MTF)
    return StepBy.MONITOR_TRAP_FLAG if trusted else StepBy.TRAP_FLAG


def _differs(vm: LiveMachine, key: str) -> bool:
    known = KNOWN_DIFFERENCES.get(key)
    return known is not None and known.applies(vm.info.name, vm.info.version)


def _by_monitor_trap_flag(vm: LiveMachine) -> tuple[Exit, bool]:
    since = vm.snapshot()
    controls = since[_CONTROLS]
    before, after = _vmwrites({_CONTROLS: controls | _MTF}), _vmwrites({_CONTROLS: controls})
    exit, _ = vm.enter_once(before, after=after, since=since)
    return exit, exit.reason is ExitReason.MONITOR_TRAP_FLAG


def _by_trap_flag(vm: LiveMachine) -> tuple[Exit, bool]:
    """With TF set, blocking by STI or MOV SS would need a pending single-step trap (SDM Vol. 3C, 27.3.1.5),
    which would come before the instruction: it is taken away, as it would be gone behind it."""
    before = vm.snapshot()
    for _ in range(_TRIES):
        exit, taken = vm.enter_once(
            _vmwrites(
                {
                    Field.GUEST_RFLAGS: before[Field.GUEST_RFLAGS] | RFLAGS.TF,
                    Field.EXCEPTION_BITMAP: before[Field.EXCEPTION_BITMAP] | 1 << Vector.DB,
                    _BLOCKING: before[_BLOCKING] & ~_SHADOW,
                }
            ),
            after=[
                *_vmwrites({Field.EXCEPTION_BITMAP: before[Field.EXCEPTION_BITMAP]}),
                script.snapshot(all_=False),
            ],
            since=before,
        )
        assert taken is not None
        after = taken
        complete = _is_single_step(exit)
        if not (complete and _differs(vm, _TOO_EARLY) and _stands_still(before, after)):
            break
    vm.vmwrite_all(_put_back(before, after, complete=complete))
    return exit, complete


def _put_back(before: Snapshot, after: Snapshot, *, complete: bool) -> dict[Field, int]:
    """What a step changed besides what the instruction did."""
    back: dict[Field, int] = {}
    if not before[Field.GUEST_RFLAGS] & RFLAGS.TF:
        back[Field.GUEST_RFLAGS] = after[Field.GUEST_RFLAGS] & ~RFLAGS.TF
        back[_PENDING] = after[_PENDING] & ~PendingDebugExceptions.BS
    if not complete and after[Field.GUEST_RIP] == before[Field.GUEST_RIP]:
        back[_BLOCKING] = after[_BLOCKING] | before[_BLOCKING] & _SHADOW  # the instruction is still to come
    return {field: value for field, value in back.items() if after[field] != value}


def _stands_still(before: Snapshot, after: Snapshot) -> bool:
    """Whether L2 is where it was. A branch to itself, which is so too, may be executed again."""
    same = all(before[field] == after[field] for field in (Field.GUEST_RIP, Field.GUEST_RSP))
    return same and before.registers == after.registers


def _is_single_step(exit: Exit) -> bool:
    """A #DB whose qualification has BS, bit 14 (SDM Vol. 3C, table 28-1)."""
    return (
        exit.reason is ExitReason.EXCEPTION_OR_NMI
        and exit.interruption.vector == Vector.DB
        and bool(exit.raw_qualification & DR6.BS)
    )


def _vmwrites(values: dict[Field, int]) -> Sequence[bytes]:
    return script.vmwrites([(int(field), int(value)) for field, value in values.items()])
