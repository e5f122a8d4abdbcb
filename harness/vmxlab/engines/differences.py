"""Known differences: where an engine does something else than the SDM says.

An entry is a finding, not an excuse: it names the section, what the manual says, what the engine does, and
the versions it was seen with. A test marked with its key is expected to fail on that engine, strictly: when
the difference goes away, the test fails until the entry is taken out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownDifference:
    """One difference.

    `seen_with` says on which engines, and for each a regular expression for its version, from its start
    ("2.7", "linux-6.1.192+qemu-7.2.22+bochs-2.7").
    """

    seen_with: Mapping[str, str]
    section: str
    sdm: str
    """What the manual says."""
    engine_does: str

    def applies(self, engine: str, version: str) -> bool:
        """Whether this is about that engine in that version."""
        return engine in self.seen_with and re.match(self.seen_with[engine], version) is not None

    def __str__(self) -> str:
        engines = ", ".join(self.seen_with)
        return f"{engines}: {self.engine_does}; SDM {self.section}: {self.sdm}"


_IN_KVM = r".*\+bochs-2\.7\b"
# KVM shows what Bochs under it does, except where it looks for itself.
_BOCHS = {"bochs": r"2\.7\b", "kvm-in-bochs": _IN_KVM}
_BOCHS_DIRECTLY = {"bochs": r"2\.7\b"}
_KVM = {"kvm": r"linux-6\.1\.", "kvm-in-bochs": r"linux-6\.1\."}

KNOWN_DIFFERENCES: Mapping[str, KnownDifference] = {
    "displacement-of-a-register-operand": KnownDifference(
        # It is about what Bochs has decoded before, which is little where it does not run Linux.
        seen_with={"kvm-in-bochs": _IN_KVM},
        section="Vol. 3C, 28.2.1",
        sdm="the exit qualification is 0 for VMREAD, VMWRITE, SLDT, ... without a memory operand",
        engine_does="it is the displacement of some instruction that was decoded earlier",
    ),
    "ept-ad-walk-without-read-bit": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, Table 28-7, note 1",
        sdm="with EPTP bit 6 a violation by a walk of L2's paging structures sets both bits 0 and 1",
        engine_does="it sets bit 1 only",
    ),
    "ept-exit-rf-clear": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 28.3.3",
        sdm="an EPT violation or misconfiguration outside event delivery saves RFLAGS.RF as 1",
        engine_does="RF is saved as it was, 0",
    ),
    "ept-guest-flag-update-not-checked": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 29.3.3.2",
        sdm="setting a flag in L2's paging structures is a data write, for which EPT must allow writes",
        engine_does="the flag is written to a page that EPT makes read-only, without an EPT violation",
    ),
    "ept-large-page-bit-12-not-reserved": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, Tables 29-2 and 29-4",
        sdm="bit 12 of an EPT entry that maps a page of 2 MiB or 1 GiB is reserved: EPT misconfiguration",
        engine_does="bit 12 is ignored, as if it were the PAT bit of ordinary paging; the page is accessed",
    ),
    "exception-exit-rf-clear": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 28.3.3",
        sdm="an exit for a fault saves RFLAGS.RF as delivery of the fault would have pushed it: 1",
        engine_does="RF is saved as it was, 0",
    ),
    "guest-rip-upper-bits": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 27.3.1.4",
        sdm=(
            "VM entry to 64-bit code fails unless bits 63:N of RIP are identical, N being the linear-"
            "address width"
        ),
        engine_does="the entry succeeds, and fetching the first instruction is #GP(0)",
    ),
    "invept-invvpid-type-upper-half": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 31.3, INVEPT and INVVPID",
        sdm="in 64-bit mode the type is a 64-bit operand, and one that is not supported is VMfail(28)",
        engine_does="bits 63:32 of the type are ignored",
    ),
    "kvm-ept-violation-by-iret": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 28.1 and 28.2.1",
        sdm=(
            "an EPT violation by an IRET that ended virtual-NMI blocking sets bit 12 of the exit "
            "qualification, and the blocking is saved as 0"
        ),
        engine_does="bit 12 is 0, as KVM passes on bits 8:7 alone; the blocking is saved as 1",
    ),
    "kvm-io-without-alignment-check": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3A, 6.15, and Vol. 2, INS and OUTS",
        sdm="with alignment checking, INS and OUTS of L2 are #AC(0) for an unaligned operand",
        engine_does="KVM emulates them for L2, and accesses the operand without an alignment check",
    ),
    "kvm-link-pointer-to-the-current-vmcs": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 27.3.1.5",
        sdm="VM entry fails where the VMCS link pointer is the current-VMCS pointer",
        engine_does="the entry succeeds: of the VMCS it points to only the first word is looked at",
    ),
    "kvm-vmcall-of-l1-is-a-hypercall": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 31.3, VMCALL",
        sdm="VMCALL of L1 is #UD outside VMX operation, and VMfailValid(1) in it without an SMM monitor",
        engine_does="it is a call of KVM, which answers in RAX and leaves RFLAGS alone",
    ),
    "rdrand-16-bit-operand-size": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, table 28-12",
        sdm="bits 12:11 of the instruction information are 0 for RDRAND and RDSEED with a 16-bit destination",
        engine_does="they are 1, as for a 32-bit destination",
    ),
    "virtual-nmi-blocking-outlives-vm-entry": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 27.7.1",
        sdm='with "virtual NMIs", VM entry sets the blocking to bit 3 of the interruptibility state',
        engine_does="where bit 3 is 0, blocking that was in effect before stays: IRET alone ends it",
    ),
    "vm-entry-with-shadow-vmcs": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 27.1",
        sdm="VMLAUNCH and VMRESUME are VMfailInvalid where the current VMCS is a shadow VMCS",
        engine_does="the shadow bit is not looked at: VMLAUNCH enters, VMRESUME is VMfailValid(5)",
    ),
    "vmcall-in-root-operation": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 31.3, VMCALL",
        sdm="VMCALL in VMX root operation, with a current VMCS and no SMM monitor, is VMfailValid(1)",
        engine_does="the emulator panics (VMCALL: not implemented), and the machine dies",
    ),
}
"""By key: what the marker `vmx_known_difference` names."""
