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
    "apic-access-by-a-walk-is-linear": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, table 28-6",
        sdm="an APIC-access exit by a walk of L2's paging structures has access type 15 (or 10 in delivery)",
        engine_does="the access type is that of the linear access which needed the walk, 0 or 3",
    ),
    "apic-access-exit-rf-clear": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 28.3.3",
        sdm="an APIC-access exit outside event delivery saves RFLAGS.RF as 1",
        engine_does="RF is saved as it was, 0",
    ),
    "apic-access-fetch": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 30.4.2 and table 28-6",
        sdm="an instruction fetch from the APIC-access page is an APIC-access exit of access type 2",
        engine_does="the emulator panics (prefetch: getHostMemAddr vetoed direct read), the machine dies",
    ),
    "cr0-pg-not-fixed-in-32-bit-mode": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 24.8 and 26.3",
        sdm='without "unrestricted guest" a MOV to CR0 that clears PG, or PE and PG, is #GP(0)',
        engine_does="outside 64-bit mode it is executed, and L2 goes on without paging",
    ),
    "descriptor-table-operand-size": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, table 28-10",
        sdm="bit 11 of the instruction information is 1 for LGDT, LIDT, SGDT, SIDT with a 32-bit operand",
        engine_does="it is 0, as for a 16-bit operand",
    ),
    "displacement-of-a-register-operand": KnownDifference(
        # It is about what Bochs has decoded before, which is little where it does not run Linux.
        seen_with={"kvm-in-bochs": _IN_KVM},
        section="Vol. 3C, 28.2.1",
        sdm="the exit qualification is 0 for VMREAD, VMWRITE, SLDT, ... without a memory operand",
        engine_does="it is the displacement of some instruction that was decoded earlier",
    ),
    "entry-cs-dpl-against-its-rpl": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 27.3.1.2",
        sdm="DPL of CS is held against DPL of SS; RPL of CS is not checked for an unrestricted guest",
        engine_does="DPL of CS is held against its own RPL, and DPL of SS is not looked at",
    ),
    "entry-data-segment-dpl-of-readable-code": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 27.3.1.2",
        sdm="DPL of DS, ES, FS and GS is at least the RPL of the selector for each type from 0 to 11",
        engine_does="the check is left out for type 11 (readable code, accessed): the entry succeeds",
    ),
    "entry-debugctl-not-checked": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 27.3.1.1",
        sdm='with "load debug controls" VM entry fails where reserved bits of IA32_DEBUGCTL are 1',
        engine_does="the field is not looked at: the entry succeeds",
    ),
    "entry-error-code-of-any-event": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 27.2.1.3",
        sdm="with IA32_VMX_BASIC[56], too, an error code goes only with a hardware exception, and CR0.PE",
        engine_does="where that bit is 1 nothing of this is checked: the entry succeeds",
    ),
    "entry-failure-writes-instruction-length": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 27.8",
        sdm="a VM-entry failure with exit reason 33 or 34 leaves all other VM-exit information fields alone",
        engine_does="the VM-exit instruction length becomes that of VMLAUNCH or VMRESUME, 3",
    ),
    "entry-host-cet-without-wp": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 27.2.2",
        sdm="VM entry fails where CR4.CET of the host is 1 and CR0.WP is 0",
        engine_does="this is checked of the guest alone: the entry succeeds",
    ),
    "entry-ia32e-guest-without-paging": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 27.3.1.1",
        sdm='VM entry fails where "IA-32e mode guest" is 1 and CR0.PG is 0',
        engine_does="of an unrestricted guest this is not checked: the entry succeeds",
    ),
    "entry-nmi-over-virtual-nmi-blocking": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 27.3.1.5",
        sdm='with "virtual NMIs" no NMI can be injected where the state says blocking by NMI',
        engine_does="the entry succeeds",
    ),
    "entry-pending-debug-upper-half": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 27.3.1.5",
        sdm="VM entry fails where bits 63:32 of the pending debug exceptions are not 0",
        engine_does="these bits are not looked at: the entry succeeds",
    ),
    "entry-pending-single-step-not-checked": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 27.3.1.5",
        sdm="with blocking by STI or MOV SS, or in HLT, BS of the pending debug exceptions is RFLAGS.TF",
        engine_does="this is not checked: the entry succeeds",
    ),
    "entry-perf-global-ctrl-not-checked": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 27.2.2 and 27.3.1.1",
        sdm="VM entry fails where reserved bits of IA32_PERF_GLOBAL_CTRL, which is to be loaded, are 1",
        engine_does="the fields are not looked at: the entry succeeds",
    ),
    "entry-to-smm-as-guest-state": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 27.2.1.3",
        sdm='outside of SMM "entry to SMM" is an invalid control: VMfailValid(7)',
        engine_does="it is a VM-entry failure due to invalid guest state, exit reason 33",
    ),
    "entry-virtual-8086-without-protection": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 27.3.1.4",
        sdm="VM entry fails where RFLAGS.VM is 1 and CR0.PE is 0",
        engine_does="of an unrestricted guest this is not checked: the entry succeeds",
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
    "error-code-in-real-mode": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 28.2.2",
        sdm="bit 11 (error code valid) of the interruption information is 0 for exits from real mode",
        engine_does="it is 1 for #GP and the others that have an error code in protected mode",
    ),
    "exception-exit-rf-clear": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 28.3.3",
        sdm="an exit for a fault saves RFLAGS.RF as delivery of the fault would have pushed it: 1",
        engine_does="RF is saved as it was, 0",
    ),
    "exit-before-privilege-fault": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 26.1.1",
        sdm="faults based on privilege level come before exits: INVPCID and XSETBV at CPL 3 are #GP(0)",
        engine_does="they exit at any CPL",
    ),
    "exit-from-an-inactive-state": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 28.1 and 28.3.4",
        sdm="the activity state is saved as it was before the exit: HLT, shutdown or wait-for-SIPI",
        engine_does="it is saved as active; by a SIPI, with blocking by SMI and NMI",
    ),
    "external-interrupt-while-if-is-clear": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 26.2 and 26.3",
        sdm='with "external-interrupt exiting" RFLAGS.IF does not block interrupts: they exit',
        engine_does="where L1 and L2 both have IF clear the interrupt stays masked, and nothing exits",
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
    "init-pending-at-entry-to-an-inactive-state": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 26.2 and 27.7.2",
        sdm="an INIT that is pending at a VM entry into HLT or shutdown exits at once",
        engine_does="L2 sleeps on: only an INIT that comes later is seen",
    ),
    "init-stays-pending-behind-its-exit": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 26.2",
        sdm="an INIT signal in VMX non-root operation is an exit, and no more",
        engine_does="it stays pending: each later VM entry exits again, and VMXOFF resets the processor",
    ),
    "injection-into-hlt-not-checked": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 27.3.1.5",
        sdm="VM entry into HLT fails with an event other than an interrupt, NMI, #DB, #MC or MTF",
        engine_does="the entry succeeds, and the event is delivered",
    ),
    "injection-of-a-pending-mtf-without-mtf": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 27.2.1.3",
        sdm="an interruption type of 7 is VMfailValid(7) where the processor has no monitor trap flag",
        engine_does="the emulator panics (unsupported event injection type 7), and the machine dies",
    ),
    "interrupt-window-in-hlt": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 27.7.5",
        sdm="an interrupt-window exit wakes a processor that VM entry has just put into HLT",
        engine_does="L2 sleeps on",
    ),
    "invept-invvpid-type-upper-half": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 31.3, INVEPT and INVVPID",
        sdm="in 64-bit mode the type is a 64-bit operand, and one that is not supported is VMfail(28)",
        engine_does="bits 63:32 of the type are ignored",
    ),
    "kvm-blocking-by-nmi-with-nmi-exiting": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 27.7.1",
        sdm='with "NMI exiting" and no "virtual NMIs" bit 3 of the interruptibility state blocks NMIs in L2',
        engine_does="an NMI exits at once",
    ),
    "kvm-eoi-exit-bitmap": KnownDifference(
        # Only where the processor that KVM runs on has no posted interrupts, as Bochs.
        seen_with={"kvm-in-bochs": r"linux-6\.1\."},
        section="Vol. 3C, 30.1.4",
        sdm="an EOI of a vector that the EOI-exit bitmap names is a virtualized-EOI exit",
        engine_does="KVM does not pass the EOI-exit bitmaps on: there is no exit",
    ),
    "kvm-ept-misconfiguration-qualification": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 28.2.1",
        sdm="the exit qualification is cleared where the exit is none of those it is saved for",
        engine_does="an EPT misconfiguration that KVM finds itself has that of the violation which led there",
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
    "kvm-exit-before-umip-fault": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 26.1.1",
        sdm="faults based on privilege level come before exits: SGDT at CPL 3 with CR4.UMIP is #GP(0)",
        engine_does="where KVM emulates UMIP, it exits by descriptor-table exiting",
    ),
    "kvm-external-interrupt-before-the-windows": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 27.7.5 and 27.7.6",
        sdm="exits by interrupt window and NMI window have priority over external interrupts",
        engine_does="the external interrupt exits",
    ),
    "kvm-fault-of-iret": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 28.1",
        sdm="an IRET that faults and exits has ended blocking by NMI, which is saved as 0",
        engine_does="bit 12 of the interruption information is set, but the blocking is saved as 1",
    ),
    "kvm-inactive-state-not-checked": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 27.3.1.5",
        sdm="VM entry fails where blocking or the injected event do not go with an inactive activity state",
        engine_does="of the activity state only the number is checked; the entry succeeds",
    ),
    "kvm-injected-int1-is-lost": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 27.6.1.1",
        sdm="an injected privileged software exception (INT1) is delivered",
        engine_does="L2 goes on without it, where an exit to KVM comes in between",
    ),
    "kvm-int1-is-a-hardware-exception": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 28.2.4 and 28.3.3",
        sdm="INT1 that meets a task gate is a privileged software exception, and RIP is that of INT1",
        engine_does="KVM intercepts the #DB and injects it again, as a hardware exception behind INT1",
    ),
    "kvm-interrupt-in-the-shadow-of-sti-or-mov-ss": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 27.7.1",
        sdm="blocking by STI or MOV SS at VM entry holds an external interrupt back for one instruction",
        engine_does="it exits before the first instruction",
    ),
    "kvm-interrupt-window-in-hlt": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 28.1 and 28.3.4",
        sdm="an interrupt-window or NMI-window exit from HLT saves the activity state HLT",
        engine_does="KVM does not begin to halt, and the state is saved as active",
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
    "kvm-lmsw-drops-the-read-shadow": KnownDifference(
        seen_with={"kvm-in-bochs": r"linux-6\.1\."},
        section="Vol. 3C, 26.3",
        sdm="SMSW and MOV from CR0 read the bits of the CR0 guest/host mask from the CR0 read shadow",
        engine_does="after an LMSW that does not exit to L1 they read these bits from CR0 itself",
    ),
    "kvm-loads-noncanonical-sysenter": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 27.4",
        sdm="VM entry fails to load what WRMSR refuses: a non-canonical IA32_SYSENTER_ESP or _EIP",
        engine_does="the address is made canonical, and the entry succeeds",
    ),
    "kvm-nmi-pending-over-an-exit": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 27.7.1, and Vol. 3A, 6.7.1",
        sdm="an NMI that was blocked in L2 is delivered when L2's IRET ends the blocking",
        engine_does="after an exit to L1 meanwhile, KVM waits no more for the end of the blocking",
    ),
    "kvm-nmi-that-exits-in-its-delivery": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 28.1",
        sdm="an NMI, or virtual NMI, whose delivery exits has begun its blocking, which the exit saves",
        engine_does="the blocking is saved as 0",
    ),
    "kvm-operand-of-an-instruction-emulated-for-umip": KnownDifference(
        # Only where the processor that KVM runs on has no UMIP, as the model of Bochs.
        seen_with={"kvm-in-bochs": r"linux-6\.1\."},
        section="Vol. 3C, 28.2.1",
        sdm="an EPT violation records the guest-linear and the guest-physical address of the access",
        engine_does=(
            "where KVM emulates LLDT, LTR, ... for CR4.UMIP, the guest-physical address is that of the page, "
            "and the guest-linear address that of an access before"
        ),
    ),
    "kvm-pml-full-for-accessed-flags": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 29.3.6",
        sdm="the PML index is examined before an accessed flag for EPT is set too: over 511 it exits",
        engine_does="KVM examines it for writes alone; what only sets an accessed flag is executed",
    ),
    "kvm-sipi-ends-hlt": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 27.7.2",
        sdm="a start-up IPI is discarded in the activity state HLT",
        engine_does="it ends the halt: L2 goes on behind it as if an interrupt had come",
    ),
    "kvm-tpr-threshold-in-hlt": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 27.7.7",
        sdm="an exit by the TPR threshold after VM entry wakes a processor that it put into the HLT state",
        engine_does="KVM halts L2 itself, and looks at no threshold",
    ),
    "kvm-vmcall-of-l1-is-a-hypercall": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 31.3, VMCALL",
        sdm="VMCALL of L1 is #UD outside VMX operation, and VMfailValid(1) in it without an SMM monitor",
        engine_does="it is a call of KVM, which answers in RAX and leaves RFLAGS alone",
    ),
    "kvm-vmwrite-drops-access-rights-bits": KnownDifference(
        seen_with=_KVM,
        section="Vol. 3C, 27.3.1.2",
        sdm="bits 11:8 and 31:17 of the access rights of a usable segment are 0, or VM entry fails",
        engine_does="VMWRITE drops these bits, as some processors do, and the entry succeeds",
    ),
    "mtf-single-step": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 26.5.2",
        sdm='with "monitor trap flag" 1 an exit follows the first instruction, or the event, behind VM entry',
        engine_does="models that report the 1-setting take it, and make only the exit that VM entry injects",
    ),
    "nmi-blocking-outlives-vm-entry": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 27.7.1",
        sdm='without "virtual NMIs", VM entry sets blocking by NMI to bit 3 of the interruptibility state',
        engine_does="where bit 3 is 0, blocking that an NMI exit left in L1 stays in L2: a pending NMI waits",
    ),
    "nmi-exit-saves-its-own-blocking": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 28.1 and 28.3.4",
        sdm="an NMI that exits blocks others only after the exit: blocking by NMI is saved as it was before",
        engine_does="blocking by NMI is saved as 1",
    ),
    "ple-first-pause-after-vm-entry": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 26.1.3",
        sdm="the first PAUSE at CPL 0 after VM entry starts a loop, and does not exit by PAUSE-loop exiting",
        engine_does="a loop goes on across VM entries: that PAUSE exits where the gap is long enough",
    ),
    "pml-entry-low-bits": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 29.3.6",
        sdm="bits 11:0 of what is written to the page-modification log are 0",
        engine_does="they are those of the access's guest-physical address",
    ),
    "pml-full-without-a-flag-to-set": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 29.3.6",
        sdm="a PML index over 511 causes an exit when an accessed or dirty flag for EPT has to be set",
        engine_does="any translation of a write by EPT exits, though all flags are set",
    ),
    "protection-keys-by-privilege-level": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3A, 4.6.2 and 4.7",
        sdm="PKRU is for data accesses to user-mode addresses, whatever the CPL, and for no others",
        engine_does=(
            "it is for accesses at CPL 3: a supervisor's access to a user-mode address is let through, and "
            "the page fault of a user's access to a supervisor-mode address has PK = 1"
        ),
    ),
    "protection-keys-of-supervisor-mode-addresses": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3A, 4.6.2",
        sdm="PKRU is for user-mode addresses only",
        engine_does="with CR0.WP = 1 its write-disable bits also stop writes to supervisor-mode addresses",
    ),
    "rdrand-16-bit-operand-size": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, table 28-12",
        sdm="bits 12:11 of the instruction information are 0 for RDRAND and RDSEED with a 16-bit destination",
        engine_does="they are 1, as for a 32-bit destination",
    ),
    "real-mode-cs-type": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 27.3.2.2 and 28.3.2",
        sdm="access rights of CS are saved as VM entry loaded them, in real mode as well: code, type 11",
        engine_does="the type is saved as 3, as after a reset",
    ),
    "single-step-before-the-instruction": KnownDifference(
        seen_with={"kvm-in-bochs": _IN_KVM},
        section="Vol. 3B, 18.3.1.4",
        sdm="with RFLAGS.TF the single-step trap comes behind the instruction",
        engine_does="it comes before the first instruction of L2, where L0 maps that page only then",
    ),
    "ve-eptp-index-of-the-field": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 25.6.20 and Table 26-1",
        sdm="the virtualization-exception information holds the EPTP index of the VMCS",
        engine_does="VM entry does not load the field: the index is that of the last EPTP switching, or 0",
    ),
    "virtual-interrupt-does-not-wake": KnownDifference(
        seen_with=_BOCHS_DIRECTLY,
        section="Vol. 3C, 30.2.2",
        sdm="virtual-interrupt delivery wakes a processor from the HLT state",
        engine_does="L2 stays in the HLT state, whether VM entry or HLT brought it there",
    ),
    "virtual-interrupt-idt-vectoring": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 28.2.4",
        sdm="an exit during the delivery of a virtual interrupt has it in the IDT-vectoring information",
        engine_does="the IDT-vectoring information is that of an event before it",
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
