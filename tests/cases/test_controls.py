"""Controls computed from capability MSRs, for processors from the first with VMX to a recent one."""

from __future__ import annotations

import pytest

from vmxlab import (
    Capabilities,
    Case,
    ControlSet,
    EntryControls,
    ExitControls,
    IOBitmap,
    Mode,
    MsrBitmap,
    PinControls,
    PrimaryControls,
    SecondaryControls,
    guest_ept,
)
from vmxlab.cases.controls import compute_controls
from vmxlab.errors import MissingCapability
from vmxlab.sdm.controls import SecondaryExitControls, TertiaryControls

PIN, PRIMARY, SECONDARY = ControlSet.PIN, ControlSet.PRIMARY, ControlSet.SECONDARY
EXIT, ENTRY = ControlSet.EXIT, ControlSet.ENTRY

# The MSRs of a set, written out: (plain, TRUE) of SDM Vol. 3D, A.3 to A.5.
MSRS = {PIN: (0x481, 0x48D), PRIMARY: (0x482, 0x48E), EXIT: (0x483, 0x48F), ENTRY: (0x484, 0x490)}


def allowed(capabilities, controls):
    """(bits that must be 1, bits that may be 1) of one of the sets that every processor has."""
    plain, true = MSRS[controls]
    raw = capabilities.raw[true if capabilities.raw[0x480] >> 55 & 1 else plain]
    return raw & 0xFFFF_FFFF, raw >> 32


def controls_of(capabilities, **case):
    return compute_controls(Case(**case), capabilities)


def missing(capabilities, **case):
    with pytest.raises(MissingCapability) as caught:
        controls_of(capabilities, **case)
    return caught.value


# --- the baseline -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controls", MSRS, ids=lambda controls: controls.name)
@pytest.mark.parametrize("mode", [Mode.LONG, Mode.PROTECTED], ids=lambda mode: mode.name)
def test_the_baseline_obeys_the_fixed_bits_of_every_processor(processor, controls, mode):
    must, may = allowed(processor, controls)
    value = controls_of(processor, mode=mode)[controls]
    assert value & must == must
    assert not value & ~may


def test_the_baseline_is_what_the_processor_demands_and_what_a_case_lives_by(processors):
    """Every bit of it, on a processor that can do all of it."""
    values = controls_of(processors["skylake"])
    assert values == {
        PIN: 0x16 | 1 << 0 | 1 << 3 | 1 << 6,
        PRIMARY: 0x0400_6172 | 1 << 7 | 1 << 24 | 1 << 31,
        SECONDARY: 1 << 1,
        EXIT: 0x3_6DFB | 1 << 2 | 1 << 9 | 1 << 20 | 1 << 21,
        ENTRY: 0x11FB | 1 << 2 | 1 << 9 | 1 << 15,
    }


def test_what_is_welcome_is_left_out_where_the_processor_lacks_it(processors):
    values = controls_of(processors["penryn"])
    assert not values[PIN] & PinControls.ACTIVATE_PREEMPTION_TIMER
    assert not values[EXIT] & (ExitControls.SAVE_IA32_EFER | ExitControls.LOAD_IA32_EFER)
    assert not values[ENTRY] & EntryControls.LOAD_IA32_EFER
    assert SECONDARY not in values
    assert values[PRIMARY] & PrimaryControls.HLT_EXITING


def test_the_default1_class_is_set_where_there_are_no_true_msrs(processors):
    """A.2: bits of the default1 class are 1; with IA32_VMX_BASIC[55] the TRUE MSRs let some be 0."""
    bits = PrimaryControls.CR3_LOAD_EXITING | PrimaryControls.CR3_STORE_EXITING
    assert controls_of(processors["first_vmx"])[PRIMARY] & bits == bits
    assert not controls_of(processors["penryn"])[PRIMARY] & bits


def test_sets_that_are_all_zero_are_not_written_unless_every_processor_has_them(processors):
    assert set(controls_of(processors["first_vmx"])) == {PIN, PRIMARY, EXIT, ENTRY}
    assert set(controls_of(processors["every_set"])) == {PIN, PRIMARY, SECONDARY, EXIT, ENTRY}


def test_the_result_is_shared_and_so_can_not_be_changed(processors):
    with pytest.raises(TypeError):
        controls_of(processors["skylake"])[PIN] = 0


# --- structures and modes ask for controls ------------------------------------------------------------------


def test_bitmaps_are_used_when_they_are_given(processor):
    both = PrimaryControls.UNCONDITIONAL_IO_EXITING | PrimaryControls.USE_IO_BITMAPS
    without = controls_of(processor)[PRIMARY]
    assert without & both == PrimaryControls.UNCONDITIONAL_IO_EXITING
    assert not without & PrimaryControls.USE_MSR_BITMAPS
    io = controls_of(processor, io_bitmap=IOBitmap.passthrough_all())[PRIMARY]
    assert io & both == PrimaryControls.USE_IO_BITMAPS
    msr = controls_of(processor, msr_bitmap=MsrBitmap.passthrough_all())[PRIMARY]
    assert msr & PrimaryControls.USE_MSR_BITMAPS


def test_unconditional_exiting_may_be_asked_for_with_a_bitmap(processors):
    value = controls_of(
        processors["skylake"],
        io_bitmap=IOBitmap.passthrough_all(),
        enable=PrimaryControls.UNCONDITIONAL_IO_EXITING,
    )[PRIMARY]
    assert value & 3 << 24 == 3 << 24


@pytest.mark.parametrize("structure", [{"ept": guest_ept()}, {"eptp": 0}], ids=["ept", "eptp"])
def test_an_ept_of_its_own_makes_a_case_need_ept(processors, structure):
    assert controls_of(processors["lynnfield"], **structure)[SECONDARY] & SecondaryControls.ENABLE_EPT
    assert missing(processors["penryn"], **structure).feature == "ENABLE_EPT"


def test_64_bit_mode_is_a_control_of_vm_entry(processor):
    assert controls_of(processor)[ENTRY] & EntryControls.IA32E_MODE_GUEST
    assert not controls_of(processor, mode=Mode.PROTECTED)[ENTRY] & EntryControls.IA32E_MODE_GUEST


def test_the_monitor_is_64_bit_code_whatever_l2_is(processor):
    for mode in (Mode.LONG, Mode.PROTECTED):
        assert controls_of(processor, mode=mode)[EXIT] & ExitControls.HOST_ADDRESS_SPACE_SIZE


def test_real_mode_runs_under_unrestricted_guest_and_ept(processors):
    value = controls_of(processors["sandy_bridge"], mode=Mode.REAL)[SECONDARY]
    both = SecondaryControls.UNRESTRICTED_GUEST | SecondaryControls.ENABLE_EPT
    assert value & both == both


@pytest.mark.parametrize(
    ("name", "feature", "bit"),
    [
        ("lynnfield", "UNRESTRICTED_GUEST", "IA32_VMX_PROCBASED_CTLS2[39]"),
        ("penryn", "ENABLE_EPT", "IA32_VMX_PROCBASED_CTLS2[33]"),
        ("first_vmx", "ENABLE_EPT", "IA32_VMX_PROCBASED_CTLS[63]"),
    ],
)
def test_real_mode_is_skipped_where_the_processor_has_no_unrestricted_guest(processors, name, feature, bit):
    error = missing(processors[name], mode=Mode.REAL)
    assert (error.feature, error.bit) == (feature, bit)
    assert bit in str(error)


# --- enable, needs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["enable", "needs"])
@pytest.mark.parametrize(
    ("name", "flag", "bit"),
    [
        ("penryn", PinControls.ACTIVATE_PREEMPTION_TIMER, "IA32_VMX_TRUE_PINBASED_CTLS[38]"),
        ("first_vmx", PinControls.ACTIVATE_PREEMPTION_TIMER, "IA32_VMX_PINBASED_CTLS[38]"),
        ("haswell", PrimaryControls.MONITOR_TRAP_FLAG, "IA32_VMX_TRUE_PROCBASED_CTLS[59]"),
        ("sandy_bridge", SecondaryControls.VMCS_SHADOWING, "IA32_VMX_PROCBASED_CTLS2[46]"),
        ("first_vmx", SecondaryControls.ENABLE_VPID, "IA32_VMX_PROCBASED_CTLS[63]"),
        ("penryn", ExitControls.LOAD_IA32_EFER, "IA32_VMX_TRUE_EXIT_CTLS[53]"),
        ("penryn", EntryControls.LOAD_IA32_EFER, "IA32_VMX_TRUE_ENTRY_CTLS[47]"),
        ("icelake", TertiaryControls.LOADIWKEY_EXITING, "IA32_VMX_TRUE_PROCBASED_CTLS[49]"),
        ("every_set", TertiaryControls(1 << 40), "IA32_VMX_PROCBASED_CTLS3[40]"),
    ],
)
def test_a_missing_control_is_named_with_its_msr_and_bit(processors, where, name, flag, bit):
    error = missing(processors[name], **{where: flag})
    assert error.bit == bit
    assert error.feature == (flag.name or "bit 40")
    assert str(error) == f"the processor lacks {error.feature} ({bit} is 0)"


def test_a_control_may_be_needed_without_being_enabled(processors):
    skylake = processors["skylake"]
    assert controls_of(skylake, needs=SecondaryControls.VMCS_SHADOWING) == controls_of(skylake)


def test_of_several_the_first_missing_one_is_named(processors):
    flags = SecondaryControls.ENABLE_EPT | SecondaryControls.VMCS_SHADOWING | SecondaryControls.ENABLE_PML
    assert missing(processors["lynnfield"], enable=flags).feature == "VMCS_SHADOWING"


def test_enabling_a_control_of_a_further_set_activates_the_set(processors):
    capabilities = processors["every_set"]
    values = controls_of(
        capabilities,
        enable=[TertiaryControls(1), SecondaryExitControls(1 << 3), PrimaryControls.RDTSC_EXITING],
    )
    assert values[ControlSet.TERTIARY] == 1
    assert values[ControlSet.SECONDARY_EXIT] == 1 << 3
    assert values[PRIMARY] & PrimaryControls.ACTIVATE_TERTIARY_CONTROLS
    assert values[EXIT] & ExitControls.ACTIVATE_SECONDARY_CONTROLS
    assert not controls_of(capabilities)[PRIMARY] & PrimaryControls.ACTIVATE_TERTIARY_CONTROLS


def test_secondary_controls_without_ept_on_a_processor_that_has_only_those(processors):
    values = controls_of(processors["penryn"], enable=SecondaryControls.WBINVD_EXITING)
    assert values[SECONDARY] == SecondaryControls.WBINVD_EXITING
    assert values[PRIMARY] & PrimaryControls.ACTIVATE_SECONDARY_CONTROLS


def test_what_one_case_asked_for_is_not_given_to_the_next(processors):
    """Bit 11 is "RDPMC exiting" in one set and "RDRAND exiting" in another."""
    skylake = processors["skylake"]
    first = controls_of(skylake, enable=PrimaryControls.RDPMC_EXITING)
    second = controls_of(skylake, enable=SecondaryControls.RDRAND_EXITING)
    assert first[PRIMARY] & 1 << 11 and not first[SECONDARY] & 1 << 11
    assert second[SECONDARY] & 1 << 11 and not second[PRIMARY] & 1 << 11


def test_what_one_processor_can_do_is_not_given_to_another(processors):
    assert SECONDARY in controls_of(processors["lynnfield"])
    assert SECONDARY not in controls_of(processors["penryn"])
    assert SECONDARY in controls_of(Capabilities(processors["lynnfield"].raw))


# --- disable ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("controls", "flag"),
    [
        (PIN, PinControls.EXTERNAL_INTERRUPT_EXITING),
        (PIN, PinControls.ACTIVATE_PREEMPTION_TIMER),
        (PRIMARY, PrimaryControls.HLT_EXITING),
        (PRIMARY, PrimaryControls.UNCONDITIONAL_IO_EXITING),
        (EXIT, ExitControls.SAVE_DEBUG_CONTROLS),
        (ENTRY, EntryControls.LOAD_IA32_EFER),
    ],
)
def test_what_the_baseline_sets_can_be_disabled(processors, controls, flag):
    skylake = processors["skylake"]
    assert controls_of(skylake)[controls] & flag
    assert controls_of(skylake, disable=flag) == {
        **controls_of(skylake),
        controls: controls_of(skylake)[controls] & ~flag,
    }


def test_ept_can_be_disabled_and_with_it_the_secondary_controls_go(processors):
    values = controls_of(processors["skylake"], disable=SecondaryControls.ENABLE_EPT)
    assert SECONDARY not in values
    assert not values[PRIMARY] & PrimaryControls.ACTIVATE_SECONDARY_CONTROLS


def test_a_further_set_can_be_left_inactive(processors):
    values = controls_of(processors["skylake"], disable=PrimaryControls.ACTIVATE_SECONDARY_CONTROLS)
    assert values[SECONDARY] & SecondaryControls.ENABLE_EPT
    assert not values[PRIMARY] & PrimaryControls.ACTIVATE_SECONDARY_CONTROLS


@pytest.mark.parametrize(
    ("flag", "feature", "bit"),
    [
        (PrimaryControls.CR3_LOAD_EXITING, "CR3_LOAD_EXITING", "IA32_VMX_PROCBASED_CTLS[15]"),
        (ExitControls.SAVE_DEBUG_CONTROLS, "SAVE_DEBUG_CONTROLS", "IA32_VMX_EXIT_CTLS[2]"),
        (EntryControls.LOAD_DEBUG_CONTROLS, "LOAD_DEBUG_CONTROLS", "IA32_VMX_ENTRY_CTLS[2]"),
        (PinControls(1 << 1), "bit 1", "IA32_VMX_PINBASED_CTLS[1]"),
        (
            PrimaryControls.CR3_STORE_EXITING | PrimaryControls.HLT_EXITING | PrimaryControls.PAUSE_EXITING,
            "CR3_STORE_EXITING",
            "IA32_VMX_PROCBASED_CTLS[16]",
        ),
    ],
)
def test_a_control_the_processor_insists_on_can_not_be_disabled(processors, flag, feature, bit):
    error = missing(processors["first_vmx"], disable=flag)
    assert (error.feature, error.bit) == (f"the 0-setting of {feature}", bit)
    assert "is 1" in str(error)


def test_the_true_msr_lets_more_be_disabled(processors):
    """A.2: "load debug controls" is of the default1 class, and 0 in the TRUE MSR's allowed 0-settings."""
    values = controls_of(processors["penryn"], disable=EntryControls.LOAD_DEBUG_CONTROLS)
    assert not values[ENTRY] & EntryControls.LOAD_DEBUG_CONTROLS
    assert missing(processors["penryn"], disable=PinControls(2)).bit == "IA32_VMX_TRUE_PINBASED_CTLS[1]"


# --- raw ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controls", MSRS, ids=lambda controls: controls.name)
@pytest.mark.parametrize("value", [0, 0xFFFF_FFFF, 0x1234_5678])
def test_raw_controls_are_written_as_they_are(processor, controls, value):
    values = controls_of(processor, raw_controls={controls: value})
    assert values[controls] == value
    rest = controls_of(processor)
    assert {**values, controls: rest[controls]} == rest, "and nothing else is changed by them"


@pytest.mark.parametrize("value", [0, 0xFFFF_FFFF])
def test_raw_secondary_controls_activate_their_set(processors, value):
    values = controls_of(processors["penryn"], raw_controls={SECONDARY: value})
    assert values[SECONDARY] == value
    assert values[PRIMARY] & PrimaryControls.ACTIVATE_SECONDARY_CONTROLS


def test_raw_controls_of_a_set_that_does_not_exist_are_a_missing_capability(processors):
    error = missing(processors["first_vmx"], raw_controls={SECONDARY: 0})
    assert (error.feature, error.bit) == ("ACTIVATE_SECONDARY_CONTROLS", "IA32_VMX_PROCBASED_CTLS[63]")


def test_what_is_disabled_in_raw_controls_is_the_cases_own_affair(processors):
    values = controls_of(
        processors["skylake"], disable=PrimaryControls.HLT_EXITING, raw_controls={PRIMARY: 0xFFFF_FFFF}
    )
    assert values[PRIMARY] == 0xFFFF_FFFF


# --- no VMX -------------------------------------------------------------------------------------------------


def test_without_vmx_every_case_is_skipped_with_the_cpuid_bit():
    error = missing(Capabilities({}))
    assert error.feature == "VMX"
    assert "CPUID" in error.bit and "ECX[5]" in error.bit
