"""What the chapter on VM entries says that is no rule here, and why not (SDM Vol. 3C, chapter 27)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NotARule:
    """A check of VM entry that no rule is about: its section, what it says, and why it is left out."""

    section: str
    check: str
    why: str


_NOT_THE_VMCS = "it is about the instruction and the processor's state, not about what the VMCS says"
_SMM = "VM entries in SMM return from an SMM monitor; none can be run, and nobody but firmware has one"
_NO_VERDICT = "it says what VM entry does, not what makes it fail"

NOT_RULES: tuple[NotARule, ...] = (
    NotARule(
        "27.1",
        "#UD outside of VMX operation, in real-address, virtual-8086 and compatibility mode",
        _NOT_THE_VMCS,
    ),
    NotARule("27.1", "#GP(0) where CPL is not 0", _NOT_THE_VMCS),
    NotARule(
        "27.1",
        "VMfailInvalid without a current VMCS, or with a shadow VMCS as the current one",
        _NOT_THE_VMCS,
    ),
    NotARule("27.1", "VMfailValid where there is blocking by MOV SS", _NOT_THE_VMCS),
    NotARule("27.1", "VMfailValid where the launch state does not fit VMLAUNCH or VMRESUME", _NOT_THE_VMCS),
    NotARule(
        "27.2.1.1",
        "on processors without Intel 64, addresses set no bit in 63:32",
        "every processor of today has Intel 64; IA32_VMX_BASIC[48], which says the same, is obeyed",
    ),
    NotARule("27.2.1.1", "bytes 3:1 of VTPR may be cleared", _NO_VERDICT),
    NotARule(
        "27.2.1.3",
        'with Intel PT enabled (IA32_RTIT_CTL.TraceEn) "load IA32_RTIT_CTL" is 0',
        "the value of that MSR at the time of VM entry is not in the VMCS",
    ),
    NotARule("27.2.1.3", '"deactivate dual-monitor treatment" and the executive-VMCS pointer in SMM', _SMM),
    NotARule(
        "27.2.2, 27.3.1.1",
        "on processors with linear-address masking, bits 62:61 of CR3",
        "they lie beyond every physical-address width, which CR3 is checked against here; no engine has them",
    ),
    NotARule(
        "27.3.1.1",
        "FRED: the fields that the later VM-entry control loads",
        "later than the edition cited, which has no such fields",
    ),
    NotARule("27.3.1.5", "in SMM the VMCS link pointer is not the executive-VMCS pointer", _SMM),
    NotARule("27.3.2", "how guest state is loaded from the VMCS", _NO_VERDICT),
    NotARule(
        "27.4",
        "an MSR that can't be loaded for model-specific reasons; what WRMSR makes of other MSRs",
        "it is the processor's own: such entries are shown as not checked",
    ),
    NotARule("27.5 to 27.7", "trace-address pre-translation, event injection, special features", _NO_VERDICT),
    NotARule("27.9", "VM-entry failure due to a machine-check event, exit reason 41", "no VMCS makes one"),
)
"""In the order of the manual."""
