"""VM-instruction error numbers: why a VMX instruction ended in VMfailValid.

SDM Vol. 3C, 31.4, Table 31-1.
"""

from __future__ import annotations

from enum import IntEnum


class InstructionError(IntEnum):
    """Contents of the VM-instruction error field. 14, 21 and 27 are not assigned."""

    VMCALL_IN_VMX_ROOT_OPERATION = 1
    VMCLEAR_INVALID_PHYSICAL_ADDRESS = 2
    VMCLEAR_VMXON_POINTER = 3
    VMLAUNCH_NON_CLEAR_VMCS = 4
    VMRESUME_NON_LAUNCHED_VMCS = 5
    VMRESUME_AFTER_VMXOFF = 6
    ENTRY_INVALID_CONTROL_FIELDS = 7
    ENTRY_INVALID_HOST_STATE = 8
    VMPTRLD_INVALID_PHYSICAL_ADDRESS = 9
    VMPTRLD_VMXON_POINTER = 10
    VMPTRLD_INCORRECT_REVISION_ID = 11
    UNSUPPORTED_COMPONENT = 12
    VMWRITE_READ_ONLY_COMPONENT = 13
    VMXON_IN_VMX_ROOT_OPERATION = 15
    ENTRY_INVALID_EXECUTIVE_VMCS_POINTER = 16
    ENTRY_NON_LAUNCHED_EXECUTIVE_VMCS = 17
    ENTRY_EXECUTIVE_VMCS_POINTER_NOT_VMXON_POINTER = 18
    VMCALL_NON_CLEAR_VMCS = 19
    VMCALL_INVALID_EXIT_CONTROL_FIELDS = 20
    VMCALL_INCORRECT_MSEG_REVISION_ID = 22
    VMXOFF_UNDER_DUAL_MONITOR = 23
    VMCALL_INVALID_SMM_MONITOR_FEATURES = 24
    ENTRY_INVALID_EXECUTION_CONTROLS_IN_EXECUTIVE_VMCS = 25
    ENTRY_BLOCKED_BY_MOV_SS = 26
    INVALID_OPERAND_TO_INVEPT_INVVPID = 28

    @property
    def description(self) -> str:
        """What the number means, in words."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS = {
    InstructionError.VMCALL_IN_VMX_ROOT_OPERATION: "VMCALL executed in VMX root operation",
    InstructionError.VMCLEAR_INVALID_PHYSICAL_ADDRESS: "VMCLEAR with an invalid physical address",
    InstructionError.VMCLEAR_VMXON_POINTER: "VMCLEAR with the VMXON pointer",
    InstructionError.VMLAUNCH_NON_CLEAR_VMCS: "VMLAUNCH with a VMCS that is not clear",
    InstructionError.VMRESUME_NON_LAUNCHED_VMCS: "VMRESUME with a VMCS that is not launched",
    InstructionError.VMRESUME_AFTER_VMXOFF: "VMRESUME after VMXOFF and VMXON",
    InstructionError.ENTRY_INVALID_CONTROL_FIELDS: "VM entry with invalid control fields",
    InstructionError.ENTRY_INVALID_HOST_STATE: "VM entry with invalid host-state fields",
    InstructionError.VMPTRLD_INVALID_PHYSICAL_ADDRESS: "VMPTRLD with an invalid physical address",
    InstructionError.VMPTRLD_VMXON_POINTER: "VMPTRLD with the VMXON pointer",
    InstructionError.VMPTRLD_INCORRECT_REVISION_ID: "VMPTRLD with an incorrect VMCS revision identifier",
    InstructionError.UNSUPPORTED_COMPONENT: "VMREAD or VMWRITE of a VMCS component that is not supported",
    InstructionError.VMWRITE_READ_ONLY_COMPONENT: "VMWRITE to a read-only VMCS component",
    InstructionError.VMXON_IN_VMX_ROOT_OPERATION: "VMXON executed in VMX root operation",
    InstructionError.ENTRY_INVALID_EXECUTIVE_VMCS_POINTER: "VM entry with an invalid executive-VMCS pointer",
    InstructionError.ENTRY_NON_LAUNCHED_EXECUTIVE_VMCS: "VM entry with a non-launched executive VMCS",
    InstructionError.ENTRY_EXECUTIVE_VMCS_POINTER_NOT_VMXON_POINTER: (
        "VM entry that would end dual-monitor treatment, with an executive-VMCS pointer that is not the"
        " VMXON pointer"
    ),
    InstructionError.VMCALL_NON_CLEAR_VMCS: (
        "VMCALL that would start dual-monitor treatment, with a VMCS that is not clear"
    ),
    InstructionError.VMCALL_INVALID_EXIT_CONTROL_FIELDS: "VMCALL with invalid VM-exit control fields",
    InstructionError.VMCALL_INCORRECT_MSEG_REVISION_ID: "VMCALL with an incorrect MSEG revision identifier",
    InstructionError.VMXOFF_UNDER_DUAL_MONITOR: "VMXOFF under dual-monitor treatment of SMIs and SMM",
    InstructionError.VMCALL_INVALID_SMM_MONITOR_FEATURES: "VMCALL with invalid SMM-monitor features",
    InstructionError.ENTRY_INVALID_EXECUTION_CONTROLS_IN_EXECUTIVE_VMCS: (
        "VM entry that returns from SMM, with invalid VM-execution control fields in the executive VMCS"
    ),
    InstructionError.ENTRY_BLOCKED_BY_MOV_SS: "VM entry with events blocked by MOV SS",
    InstructionError.INVALID_OPERAND_TO_INVEPT_INVVPID: "invalid operand to INVEPT or INVVPID",
}


def describe_error(number: int) -> str:
    """Any error number in words, such as "7: VM entry with invalid control fields"."""
    try:
        return f"{number}: {InstructionError(number).description}"
    except ValueError:
        return f"{number}: not assigned"
