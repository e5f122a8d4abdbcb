"""All capability MSRs together: which MSR answers, what is allowed, and what is missing by name."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmxlab.errors import CaseError, MissingCapability, OutOfRange, VmxlabError
from vmxlab.sdm.controls import (
    ControlSet,
    EntryControls,
    ExitControls,
    PinControls,
    PrimaryControls,
    SecondaryControls,
    SecondaryExitControls,
    TertiaryControls,
)
from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.registers import CR0, CR4, RFLAGS
from vmxlab.structures import (
    CAPABILITY_MSRS,
    Capabilities,
    ControlCapability,
    EptVpidCap,
    FeatureControl,
    VmFunc,
    VmxBasic,
    VmxMisc,
)

properties = settings(derandomize=True, max_examples=60, deadline=None)
WORD = st.integers(0, 2**32 - 1)


# --- ControlCapability -------------------------------------------------------------------------------------


@given(must=WORD, may=WORD, wanted=WORD)
@properties
def test_adjust_changes_only_fixed_bits_and_says_which(must: int, may: int, wanted: int) -> None:
    may |= must  # no real processor contradicts itself
    capability = ControlCapability.from_bits(may << 32 | must)
    adjusted = capability.adjust(wanted)
    for bit in range(32):
        fixed = 1 if must >> bit & 1 else 0 if not may >> bit & 1 else None
        before, after = wanted >> bit & 1, adjusted >> bit & 1
        assert after == (before if fixed is None else fixed)
        assert capability.forced_on(wanted) >> bit & 1 == (after > before)
        assert capability.forced_off(wanted) >> bit & 1 == (after < before)
    assert capability.allows(adjusted)
    assert capability.check(adjusted) == []
    assert capability.allows(wanted) == (adjusted == wanted)
    assert len(capability.check(wanted)) == (adjusted ^ wanted).bit_count()
    assert capability.contradictions == 0
    assert capability.flexible == may & ~must


def test_low_half_must_be_1_and_high_half_may_be_1() -> None:
    capability = ControlCapability.from_bits(0x0000_007F_0000_0016, PinControls)
    assert (capability.allowed0, capability.allowed1) == (0x16, 0x7F)
    assert capability.adjust(0) == 0x16
    assert capability.adjust(PinControls.NMI_EXITING | PinControls.PROCESS_POSTED_INTERRUPTS) == 0x1E
    assert capability.forced_off(PinControls.PROCESS_POSTED_INTERRUPTS) == 0x80


def test_a_64_bit_set_has_only_allowed_1_settings() -> None:
    capability = ControlCapability.from_allowed1(1 << 40 | 3, TertiaryControls)
    assert (capability.width, capability.allowed0) == (64, 0)
    assert capability.adjust(2**64 - 1) == 1 << 40 | 3
    assert capability.bit_name(40) == "capability MSR[40]"


def test_check_names_the_control_and_its_capability_bit(skylake: Capabilities) -> None:
    capability = skylake.control(ControlSet.SECONDARY)
    (broken,) = capability.check(SecondaryControls.ENABLE_EPT | SecondaryControls.ENABLE_PCONFIG)
    assert broken.feature == "ENABLE_PCONFIG"
    assert broken.bit == "IA32_VMX_PROCBASED_CTLS2[59]"
    assert "ENABLE_PCONFIG must be 0 but is 1" in str(broken)
    missing = skylake.control(ControlSet.PIN).check(0)
    assert [rule.rule for rule in missing] == [f"bit {bit} must be 1 but is 0" for bit in (1, 2, 4)]


@pytest.mark.parametrize("value", [-1, 1 << 32])
def test_a_value_wider_than_its_set_is_refused(value: int, skylake: Capabilities) -> None:
    capability = skylake.control(ControlSet.PRIMARY)
    for refused in (capability.adjust, capability.check, capability.allows, capability.forced_on):
        with pytest.raises(OutOfRange):
            refused(value)
    for arguments in ((value, 0), (0, value)):
        with pytest.raises(OutOfRange):
            ControlCapability(*arguments)


# --- which MSR answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("controls", [ControlSet.PIN, ControlSet.PRIMARY, ControlSet.EXIT, ControlSet.ENTRY])
def test_true_msrs_answer_where_the_processor_has_them(
    controls: ControlSet, skylake_raw: dict[int, int]
) -> None:
    assert controls.true_msr is not None
    skylake_raw[controls.true_msr] &= ~0xFFFF_FFFF
    assert Capabilities(skylake_raw).control(controls).allowed0 == 0
    assert Capabilities(skylake_raw).control(controls).msr is controls.true_msr
    skylake_raw[0x480] &= ~(1 << 55)
    plain = Capabilities(skylake_raw).control(controls)
    assert plain.allowed0 == skylake_raw[controls.msr] & 0xFFFF_FFFF != 0
    assert plain.msr is controls.msr


@pytest.mark.parametrize(
    ("controls", "activating_msrs", "bit", "msr"),
    [
        (ControlSet.SECONDARY, (0x482, 0x48E), 63, 0x48B),
        (ControlSet.TERTIARY, (0x482, 0x48E), 49, 0x492),
        (ControlSet.SECONDARY_EXIT, (0x483, 0x48F), 63, 0x493),
    ],
)
def test_a_set_that_cannot_be_activated_is_all_zero_and_needs_no_msr(
    controls: ControlSet,
    activating_msrs: tuple[int, ...],
    bit: int,
    msr: int,
    skylake_raw: dict[int, int],
) -> None:
    for activating in activating_msrs:
        skylake_raw[activating] &= ~(1 << bit)
    skylake_raw.pop(msr, None)
    without = Capabilities(skylake_raw).control(controls)
    assert (without.allowed0, without.allowed1, without.width) == (0, 0, controls.bits)
    for activating in activating_msrs:
        skylake_raw[activating] |= 1 << bit
    skylake_raw[msr] = 0x5 << 32 | 0x5
    with_it = Capabilities(skylake_raw).control(controls)
    assert with_it.allowed1 == (0x5 if controls.bits == 32 else 0x5 << 32 | 0x5)
    assert with_it.allowed0 == (0x5 if controls.bits == 32 else 0)


def test_an_msr_that_should_be_there_and_is_not_is_said(skylake_raw: dict[int, int]) -> None:
    del skylake_raw[0x48B]
    with pytest.raises(VmxlabError, match=r"IA32_VMX_PROCBASED_CTLS2 \(0x48b\) is not among"):
        Capabilities(skylake_raw).control(ControlSet.SECONDARY)


def test_without_vmx_everything_is_missing() -> None:
    nothing = Capabilities({})
    for ask in (
        lambda: nothing.basic,
        lambda: nothing.misc,
        lambda: nothing.cr0,
        lambda: nothing.control(ControlSet.PIN),
        lambda: nothing.require(PinControls.NMI_EXITING),
        lambda: nothing.require(SecondaryControls.ENABLE_EPT),
        lambda: nothing.require(TertiaryControls.ENABLE_HLAT),
    ):
        with pytest.raises(MissingCapability) as missing:
            ask()
        assert missing.value.bit == "CPUID.01H:ECX[5]"
    assert not nothing.supports(PinControls.NMI_EXITING)
    assert not nothing.supports(SecondaryControls.ENABLE_EPT)
    assert nothing.ept_vpid == EptVpidCap(0)
    assert "no VMX" in repr(nothing)


def test_ept_and_vm_function_msrs_are_zero_where_they_do_not_exist(skylake_raw: dict[int, int]) -> None:
    assert Capabilities(skylake_raw).ept_vpid == EptVpidCap(0x0F01_0633_4141)
    assert Capabilities(skylake_raw).vmfunc.eptp_switching
    skylake_raw[0x48B] &= ~((1 << 1 | 1 << 5 | 1 << 13) << 32)
    del skylake_raw[0x48C], skylake_raw[0x491]
    assert Capabilities(skylake_raw).ept_vpid == EptVpidCap(0)
    assert Capabilities(skylake_raw).vmfunc == VmFunc(0)


def test_fixed_bits_of_cr0_and_cr4(skylake: Capabilities) -> None:
    assert skylake.cr0_fixed0 == 0x8000_0021
    assert skylake.cr0_fixed1 == 0xFFFF_FFFF
    assert skylake.cr4_fixed0 == 0x2000
    assert skylake.cr4_fixed1 == 0x37_67FF
    assert skylake.cr0.adjust(0) == 0x8000_0021
    assert skylake.cr4.adjust(CR4.PAE | CR4.CET) == CR4.PAE | CR4.VMXE
    assert not skylake.cr0.allows(1 << 32 | 0x8000_0021)


def test_the_simple_registers(skylake: Capabilities) -> None:
    assert skylake.basic.revision_id == 0x2B
    assert skylake.misc.cr3_target_count == 4
    assert skylake.vmcs_enum.highest_index == 0x17
    assert skylake.raw[0x48A] == 0x2E


# --- features by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "supported"),
    [
        (PinControls.ACTIVATE_PREEMPTION_TIMER, True),
        (PinControls.PROCESS_POSTED_INTERRUPTS, False),
        (PrimaryControls.USE_IO_BITMAPS, True),
        (PrimaryControls.USE_IO_BITMAPS | PrimaryControls.USE_MSR_BITMAPS, True),
        (PrimaryControls.USE_IO_BITMAPS | PrimaryControls.ACTIVATE_TERTIARY_CONTROLS, False),
        (SecondaryControls.ENABLE_EPT, True),
        (SecondaryControls.ENABLE_PCONFIG, False),
        (TertiaryControls.LOADIWKEY_EXITING, False),
        (ExitControls.LOAD_IA32_EFER, True),
        (SecondaryExitControls.PREMATURELY_BUSY_SHADOW_STACK, False),
        (EntryControls.LOAD_IA32_EFER, True),
        (EntryControls.LOAD_PKRS, False),
    ],
)
def test_supports_is_whether_a_control_may_be_1(
    flag: BitFlags, supported: bool, skylake: Capabilities
) -> None:
    assert skylake.supports(flag) is supported
    if supported:
        skylake.require(flag)
    else:
        with pytest.raises(MissingCapability):
            skylake.require(flag)


@pytest.mark.parametrize(
    ("flag", "feature", "bit"),
    [
        (
            PinControls.PROCESS_POSTED_INTERRUPTS,
            "PROCESS_POSTED_INTERRUPTS",
            "IA32_VMX_TRUE_PINBASED_CTLS[39]",
        ),
        (SecondaryControls.ENABLE_PML, "ENABLE_PML", "IA32_VMX_PROCBASED_CTLS2[49]"),
        (
            SecondaryControls.ENABLE_PML | SecondaryControls.ENABLE_EPT,
            "ENABLE_PML",
            "IA32_VMX_PROCBASED_CTLS2[49]",
        ),
        (SecondaryControls(1 << 29), "bit 29", "IA32_VMX_PROCBASED_CTLS2[61]"),
        (TertiaryControls.ENABLE_HLAT, "ENABLE_HLAT", "IA32_VMX_TRUE_PROCBASED_CTLS[49]"),
        (
            SecondaryExitControls.PREMATURELY_BUSY_SHADOW_STACK,
            "PREMATURELY_BUSY_SHADOW_STACK",
            "IA32_VMX_TRUE_EXIT_CTLS[63]",
        ),
        (EntryControls.LOAD_PKRS, "LOAD_PKRS", "IA32_VMX_TRUE_ENTRY_CTLS[54]"),
    ],
    ids=str,
)
def test_require_names_the_feature_and_the_bit_that_denies_it(
    flag: BitFlags, feature: str, bit: str, skylake_raw: dict[int, int]
) -> None:
    skylake_raw[0x48B] &= ~(1 << 49)
    with pytest.raises(MissingCapability) as missing:
        Capabilities(skylake_raw).require(flag)
    assert missing.value.feature == feature
    assert missing.value.bit == bit
    assert bit in str(missing.value)


def test_a_bit_of_a_64_bit_set_is_named_by_its_own_number(skylake_raw: dict[int, int]) -> None:
    for msr in (0x482, 0x48E):
        skylake_raw[msr] |= 1 << 49
    skylake_raw[0x492] = 1
    with pytest.raises(MissingCapability) as missing:
        Capabilities(skylake_raw).require(TertiaryControls.IPI_VIRTUALIZATION)
    assert missing.value.bit == "IA32_VMX_PROCBASED_CTLS3[4]"


def test_adjust_takes_the_set_by_name(skylake: Capabilities) -> None:
    assert skylake.adjust(ControlSet.PRIMARY, PrimaryControls.HLT_EXITING) == 0x0400_61F2
    assert skylake.adjust(ControlSet.TERTIARY, 1) == 0


def test_only_control_flags_can_be_asked_for(skylake: Capabilities) -> None:
    for ask, what in ((skylake.supports, CR4.VMXE), (skylake.require, RFLAGS.CF)):
        with pytest.raises(TypeError, match="control"):
            ask(what)


# --- as a value --------------------------------------------------------------------------------------------


def test_json_is_stable_and_comes_back(skylake: Capabilities, skylake_raw: dict[int, int]) -> None:
    backwards = Capabilities(dict(reversed(skylake_raw.items())))
    assert backwards.to_json() == skylake.to_json()
    assert Capabilities.from_json(skylake.to_json()) == skylake
    values = json.loads(skylake.to_json())
    assert values["IA32_VMX_BASIC"] == "0x00da04000000002b"
    assert list(values)[:2] == ["IA32_VMX_BASIC", "IA32_VMX_PINBASED_CTLS"]


@given(
    st.dictionaries(
        st.sampled_from([0x3A, 0x9, 0xC000_0FFF, *map(int, CAPABILITY_MSRS)]), st.integers(0, 2**64 - 1)
    )
)
@properties
def test_any_msrs_come_back_from_json(raw: dict[int, int]) -> None:
    capabilities = Capabilities(raw)
    assert dict(Capabilities.from_json(capabilities.to_json()).raw) == raw


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"IA32_VMX_NONSENSE": "0x1"}',
        '{"IA32_VMX_BASIC": "one"}',
        '{"IA32_VMX_BASIC": 17}',
        '{"IA32_VMX_BASIC": null}',
        '{"IA32_VMX_BASIC": "0x1", "0x480": "0x1"}',
    ],
)
def test_text_that_is_no_capabilities_is_a_clear_error(text: str) -> None:
    with pytest.raises(CaseError):
        Capabilities.from_json(text)


@pytest.mark.parametrize("raw", [{0x480: -1}, {0x480: 1 << 64}, {-1: 0}, {1 << 32: 0}])
def test_what_msrs_cannot_be_is_refused(raw: dict[int, int]) -> None:
    with pytest.raises(OutOfRange):
        Capabilities(raw)


def test_capabilities_are_a_value(skylake: Capabilities, skylake_raw: dict[int, int]) -> None:
    same = Capabilities(skylake_raw)
    assert same == skylake
    assert hash(same) == hash(skylake)
    skylake_raw[0x480] = 0
    assert same == skylake
    assert copy.deepcopy(skylake) == skylake
    assert pickle.loads(pickle.dumps(skylake)) == skylake
    with pytest.raises(TypeError):
        skylake.raw[0x480] = 0  # type: ignore[index]
    assert "revision 0x2b" in repr(skylake)


def test_the_capability_msrs_are_480_to_493() -> None:
    assert list(CAPABILITY_MSRS) == list(range(0x480, 0x494))


# --- needs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("need", "feature", "bit"),
    [
        (EptVpidCap.page_1g, "EPT pages of 1 GiB", "IA32_VMX_EPT_VPID_CAP[17]"),
        (VmFunc.eptp_switching, "VM function 0, EPTP switching", "IA32_VMX_VMFUNC[0]"),
        (CR4.UMIP, "CR4.UMIP", "IA32_VMX_CR4_FIXED1[11]"),
        (CR4.PAE | CR4.PCIDE, "CR4.PCIDE", "IA32_VMX_CR4_FIXED1[17]"),
        (CR0(1 << 40), "CR0.bit 40", "IA32_VMX_CR0_FIXED1[40]"),
    ],
)
def test_a_processor_says_which_bit_tells_that_it_lacks_a_feature(processors, need, feature, bit):
    """Penryn has neither EPT nor VM functions, and lacks the MSRs that tell of their details."""
    with pytest.raises(MissingCapability) as caught:
        processors["penryn"].require(need)
    assert (caught.value.feature, caught.value.bit, caught.value.value) == (feature, bit, 0)


@pytest.mark.parametrize(
    "need",
    [
        EptVpidCap.page_1g,
        VmFunc.eptp_switching,
        VmxMisc.activity_hlt,
        VmxBasic.revision_id,
        CR4.PAE | CR4.PCIDE,
        CR0.WP,
    ],
)
def test_a_feature_that_is_there_may_be_required(processors, need):
    processors["skylake"].require(need)


def test_what_is_no_feature_of_a_processor_is_a_type_error(processors):
    for wrong in (vars(FeatureControl).get("lock"), 5):
        with pytest.raises(TypeError):
            processors["skylake"].require(wrong)
