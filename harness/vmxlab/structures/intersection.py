"""What several processors can do in common, as capability MSRs of a processor that doesn't exist.

An image built for the result runs on each of them: whatever one requires is required, whatever one lacks is
lacking. Where they leave no common value, that is an error, not a choice made in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vmxlab.errors import CaseError
from vmxlab.sdm.msrs import Msr
from vmxlab.structures.capability_msrs import EptVpidCap, VmcsEnum, VmxBasic, VmxMisc
from vmxlab.structures.register import Bits, Register

_LOW = 0xFFFF_FFFF
_TRUE_MSRS = (
    Msr.IA32_VMX_TRUE_PINBASED_CTLS,
    Msr.IA32_VMX_TRUE_PROCBASED_CTLS,
    Msr.IA32_VMX_TRUE_EXIT_CTLS,
    Msr.IA32_VMX_TRUE_ENTRY_CTLS,
)
_SPLIT_MSRS = (
    Msr.IA32_VMX_PINBASED_CTLS,
    Msr.IA32_VMX_PROCBASED_CTLS,
    Msr.IA32_VMX_EXIT_CTLS,
    Msr.IA32_VMX_ENTRY_CTLS,
    Msr.IA32_VMX_PROCBASED_CTLS2,
    *_TRUE_MSRS,
)
_FIXED_MSRS = (
    (Msr.IA32_VMX_CR0_FIXED0, Msr.IA32_VMX_CR0_FIXED1),
    (Msr.IA32_VMX_CR4_FIXED0, Msr.IA32_VMX_CR4_FIXED1),
)


def intersect(
    one: Mapping[int, int], two: Mapping[int, int], *, ignore_revision_ids: bool = False
) -> dict[int, int]:
    """The capability MSRs of both processors in common.

    - Controls and CR0, CR4: what must be 1 on one must be 1, what must be 0 on one must be 0. CaseError if
      that leaves a bit no value.
    - IA32_VMX_BASIC: the larger region; the 32-bit address limit if either has it; features that both have.
      CaseError if the memory types differ.
    - IA32_VMX_MISC: features that both have, the smaller counts, and the larger preemption-timer shift, so
      that a time turned into counts is never longer on either than meant.
    - IA32_VMX_EPT_VPID_CAP, VMFUNC, the 64-bit control sets: features that both have; the smaller HLAT
      prefix.
    - The VMCS and MSEG revision identifiers have no common value where they differ: CaseError, or 0 in the
      result with `ignore_revision_ids`, for an image whose monitor reads them on the processor that runs
      it.
    - An MSR that only one processor has is dropped; any that Appendix A doesn't list is kept only where
      equal.
    """
    result: dict[int, int] = {}
    for msr in sorted(one.keys() & two.keys()):
        a, b = one[msr], two[msr]
        if msr in _SPLIT_MSRS:
            result[msr] = _split(Msr(msr), a, b)
        elif msr == Msr.IA32_VMX_BASIC:
            result[msr] = _basic(a, b, ignore_revision_ids)
        elif msr == Msr.IA32_VMX_MISC:
            result[msr] = _misc(a, b, ignore_revision_ids)
        elif msr == Msr.IA32_VMX_VMCS_ENUM:
            result[msr] = _combine(a & b, (VmcsEnum.highest_index, min), a, b)
        elif msr == Msr.IA32_VMX_EPT_VPID_CAP:
            result[msr] = _combine(a & b, (EptVpidCap.max_hlat_prefix_size, min), a, b)
        elif msr in (Msr.IA32_VMX_CR0_FIXED0, Msr.IA32_VMX_CR4_FIXED0):
            result[msr] = a | b
        elif Msr.IA32_VMX_BASIC <= msr <= Msr.IA32_VMX_EXIT_CTLS2:
            result[msr] = a & b
        elif a == b:
            result[msr] = a
    for must_be_1, may_be_1 in _FIXED_MSRS:
        if must_be_1 in result and may_be_1 in result:
            _refuse_contradiction(must_be_1, result[must_be_1] & ~result[may_be_1])
    if not VmxBasic(result.get(Msr.IA32_VMX_BASIC, 0)).vmx_flex_controls:
        # Without IA32_VMX_BASIC[55] in common the TRUE MSRs don't exist; the plain ones are valid on both.
        for msr in _TRUE_MSRS:
            result.pop(msr, None)
    return result


def _split(msr: Msr, a: int, b: int) -> int:
    allowed0, allowed1 = (a | b) & _LOW, a >> 32 & b >> 32
    _refuse_contradiction(msr, allowed0 & ~allowed1)
    return allowed1 << 32 | allowed0


def _refuse_contradiction(msr: Msr, bits: int) -> None:
    if bits:
        raise CaseError(
            f"{msr.name}: no value suits both processors, bits {bits:#x} must be 1 on one and 0 on the other",
            advice="build an image for each of them",
        )


def _basic(a: int, b: int, ignore_revision_ids: bool) -> int:
    one, two = VmxBasic(a), VmxBasic(b)
    value = a & b | (a | b) & VmxBasic.is_32bit_address.mask
    value = _combine(value, (VmxBasic.region_size, max), a, b)
    if one.mem_type != two.mem_type:
        raise CaseError(f"IA32_VMX_BASIC: the memory types {one.mem_type} and {two.mem_type} differ")
    return _same_or_zero(value, VmxBasic, VmxBasic.revision_id, a, b, ignore_revision_ids)


def _misc(a: int, b: int, ignore_revision_ids: bool) -> int:
    value = a & b
    value = _combine(value, (VmxMisc.preemption_timer_shift, max), a, b)
    value = _combine(value, (VmxMisc.cr3_target_count, min), a, b)
    value = _combine(value, (VmxMisc.max_msr_list, min), a, b)
    return _same_or_zero(value, VmxMisc, VmxMisc.mseg_revision_id, a, b, ignore_revision_ids)


def _combine(value: int, rule: tuple[Bits, Callable[[int, int], int]], a: int, b: int) -> int:
    # `value` with one field of it made from both registers' by `rule`. Masked fields compare as they stand.
    field, choose = rule
    return value & ~field.mask | choose(a & field.mask, b & field.mask)


def _same_or_zero(value: int, register: type[Register], field: Bits, a: int, b: int, ignore: bool) -> int:
    if a & field.mask == b & field.mask:
        return value
    if not ignore:
        raise CaseError(
            f"{register.bit_name(field.name)}: the {field.feature}s differ, "
            f"{(a & field.mask) >> field.low:#x} and {(b & field.mask) >> field.low:#x}",
            advice="pass ignore_revision_ids=True if the image reads it on the processor that runs it",
        )
    return value & ~field.mask
