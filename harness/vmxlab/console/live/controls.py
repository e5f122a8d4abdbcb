"""Controls by name on a live machine: which fields to write, and what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmxlab.sdm.controls import ControlSet
from vmxlab.sdm.fields import Field
from vmxlab.sdm.flags import BitFlags

if TYPE_CHECKING:
    from vmxlab.console.live.machine import LiveMachine


def control_values(vm: LiveMachine, controls: Sequence[BitFlags], *, on: bool) -> dict[Field, int]:
    """The control fields with these controls set, and what activates their sets; or cleared."""
    values: dict[ControlSet, int] = {}

    def value_of(which: ControlSet) -> int:
        if which not in values:
            activator = which.activated_by
            active = activator is None or value_of(ControlSet.of(activator)) & activator
            # A set that was not active may never have been written.
            values[which] = int(vm.vmread(which.field)) if active else vm.capabilities.adjust(which, 0)
        return values[which]

    for flag in controls:
        which = ControlSet.of(flag)
        value = value_of(which)
        values[which] = value | int(flag) if on else value & ~int(flag)
        if on and which.activated_by is not None:
            parent = ControlSet.of(which.activated_by)
            values[parent] = value_of(parent) | int(which.activated_by)
    return {which.field: value for which, value in values.items()}
