"""What a processor must have for an exit reason to come at all.

For each reason: a control that must be 1 (Vol. 3C, chapter 25 and 26), or the bit of CR4 without which the
instruction is #UD, which comes before its exit (Vol. 3C, 26.1.1). Reasons that any processor with VMX can
produce are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vmxlab.sdm.controls import PinControls, PrimaryControls, SecondaryControls, TertiaryControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.registers import CR4


@dataclass(frozen=True, slots=True)
class Requirement:
    """A control, or a bit of CR4, that must be free to be 1, and the section that says so."""

    flag: BitFlags
    section: str


def _of(section: str, flags: Mapping[ExitReason, BitFlags]) -> dict[ExitReason, Requirement]:
    return {reason: Requirement(flag, section) for reason, flag in flags.items()}


_R, _P, _S, _T = ExitReason, PrimaryControls, SecondaryControls, TertiaryControls

EXIT_REQUIREMENTS: Mapping[ExitReason, Requirement] = MappingProxyType(
    {
        **_of("Vol. 3C, 26.1.2", {_R.GETSEC: CR4.SMXE, _R.XSETBV: CR4.OSXSAVE}),
        **_of(
            "Vol. 3C, 26.1.3",
            {
                _R.GDTR_IDTR_ACCESS: _S.DESCRIPTOR_TABLE_EXITING,
                _R.LDTR_TR_ACCESS: _S.DESCRIPTOR_TABLE_EXITING,
                _R.RDTSCP: _S.ENABLE_RDTSCP,
                _R.WBINVD: _S.WBINVD_EXITING,
                _R.RDRAND: _S.RDRAND_EXITING,
                _R.INVPCID: _S.ENABLE_INVPCID,
                _R.ENCLS: _S.ENABLE_ENCLS_EXITING,
                _R.RDSEED: _S.RDSEED_EXITING,
                _R.XSAVES: _S.ENABLE_XSAVES,
                _R.XRSTORS: _S.ENABLE_XSAVES,
                _R.PCONFIG: _S.ENABLE_PCONFIG,
                _R.UMWAIT: _S.ENABLE_USER_WAIT_AND_PAUSE,
                _R.TPAUSE: _S.ENABLE_USER_WAIT_AND_PAUSE,
                _R.LOADIWKEY: _T.LOADIWKEY_EXITING,
                _R.ENCLV: _S.ENABLE_ENCLV_EXITING,
                _R.ENQCMD_PASID_TRANSLATION_FAILURE: _S.PASID_TRANSLATION,
                _R.ENQCMDS_PASID_TRANSLATION_FAILURE: _S.PASID_TRANSLATION,
                _R.RDMSRLIST: _T.ENABLE_MSR_LIST_INSTRUCTIONS,
                _R.WRMSRLIST: _T.ENABLE_MSR_LIST_INSTRUCTIONS,
            },
        ),
        **_of(
            "Vol. 3C, 26.2",
            {
                _R.NMI_WINDOW: _P.NMI_WINDOW_EXITING,
                _R.PREEMPTION_TIMER: PinControls.ACTIVATE_PREEMPTION_TIMER,
                _R.BUS_LOCK: _S.VMM_BUS_LOCK_DETECTION,
                _R.INSTRUCTION_TIMEOUT: _S.INSTRUCTION_TIMEOUT,
            },
        ),
        **_of("Vol. 3C, 26.5.2", {_R.MONITOR_TRAP_FLAG: _P.MONITOR_TRAP_FLAG}),
        **_of("Vol. 3C, 26.5.6", {_R.VMFUNC: _S.ENABLE_VM_FUNCTIONS}),
        **_of(
            "Vol. 3C, 29.3",
            {
                _R.EPT_VIOLATION: _S.ENABLE_EPT,
                _R.EPT_MISCONFIGURATION: _S.ENABLE_EPT,
                _R.PML_FULL: _S.ENABLE_PML,
                _R.SPP: _S.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT,
            },
        ),
        **_of(
            "Vol. 3C, 30.1",
            {
                _R.TPR_BELOW_THRESHOLD: _P.USE_TPR_SHADOW,
                _R.VIRTUALIZED_EOI: _S.VIRTUAL_INTERRUPT_DELIVERY,
            },
        ),
        **_of(
            "Vol. 3C, 30.4",
            {
                _R.APIC_ACCESS: _S.VIRTUALIZE_APIC_ACCESSES,
                _R.APIC_WRITE: _S.APIC_REGISTER_VIRTUALIZATION,
            },
        ),
        **_of("Vol. 3C, 31.3", {_R.INVEPT: _S.ENABLE_EPT, _R.INVVPID: _S.ENABLE_VPID}),
    }
)
