"""What a case may need of a processor, besides the controls that it enables.

A need is a control, a field of a capability MSR, or a bit of CR0 or CR4 that must be free to be 1 in VMX
operation, which is how a processor tells of features that are no VMX controls: `CR4.SMXE` for GETSEC.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmxlab.errors import CaseError
from vmxlab.sdm.controls import ControlSet
from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.registers import CR0, CR4
from vmxlab.structures.capabilities import CAPABILITY_REGISTERS, Need
from vmxlab.structures.register import Bits


def checked_needs(needs: Need | Iterable[Need]) -> tuple[Need, ...]:
    """One need or several, as a tuple. CaseError for what no processor can be asked for."""
    try:
        needs = (needs,) if isinstance(needs, BitFlags | Bits) else tuple(needs)
    except TypeError:
        raise _no_need(needs) from None
    for need in needs:
        if not _is_need(need):
            raise _no_need(need)
    return needs


def _is_need(need: object) -> bool:
    if isinstance(need, Bits):
        return need.owner in CAPABILITY_REGISTERS
    return isinstance(need, CR0 | CR4) or any(isinstance(need, controls.flags) for controls in ControlSet)


def _no_need(what: object) -> CaseError:
    return CaseError(
        f"needs: {what!r} is no control, no field of a capability MSR and no bit of CR0 or CR4",
        advice="write SecondaryControls.ENABLE_EPT, EptVpidCap.page_1g or CR4.SMXE, for example",
    )
