"""Checks on VM-exit control fields (SDM Vol. 3C, 27.2.1.2)."""

from __future__ import annotations

from vmxlab.oracle.entry.addresses import msr_area
from vmxlab.oracle.entry.reserved import reserved_controls
from vmxlab.oracle.entry.rule import Area, RuleTable
from vmxlab.oracle.entry.vmcs import Vmcs
from vmxlab.sdm.controls import ControlSet, ExitControls, PinControls
from vmxlab.sdm.fields import Field

TABLE = RuleTable(Area.CONTROLS, "27.2.1.2")
rule = TABLE.rule

reserved_controls(TABLE, ControlSet.EXIT)
reserved_controls(TABLE, ControlSet.SECONDARY_EXIT)


@rule(when=[ExitControls.SAVE_PREEMPTION_TIMER_VALUE])
def save_preemption_timer_needs_timer(vmcs: Vmcs) -> bool:
    """ "Save VMX-preemption timer value" needs "activate VMX-preemption timer"."""
    return vmcs.on(PinControls.ACTIVATE_PREEMPTION_TIMER)


msr_area(TABLE, Field.EXIT_MSR_STORE_ADDRESS, Field.EXIT_MSR_STORE_COUNT, "VM-exit MSR-store")
msr_area(TABLE, Field.EXIT_MSR_LOAD_ADDRESS, Field.EXIT_MSR_LOAD_COUNT, "VM-exit MSR-load")
