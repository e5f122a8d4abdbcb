"""Cases about instructions that exit always or by a control: controls, operands, privilege and modes."""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st

from vmxlab import ExitReason, Field, Mode, PrimaryControls, SecondaryControls, on
from vmxlab.cases.guest_state import guest_state
from vmxlab.cases.memory import DATA
from vmxlab.sdm.registers import CR4
from vmxlab.structures import Capabilities

from .drawing import (
    Drawn,
    Snippet,
    hlt,
    merged,
    modes,
    mov,
    one_of_texts,
    register_names,
    settings_of,
    some,
    some_bits_of,
    spread,
    what_differs,
)
from .privilege import privileges

_P, _S = PrimaryControls, SecondaryControls

CONTROLS = (
    _P.RDTSC_EXITING,
    _P.RDPMC_EXITING,
    _P.INVLPG_EXITING,
    _P.PAUSE_EXITING,
    _S.WBINVD_EXITING,
    _S.RDRAND_EXITING,
    _S.RDSEED_EXITING,
    _S.ENABLE_RDTSCP,
    _S.ENABLE_INVPCID,
    _S.DESCRIPTOR_TABLE_EXITING,
    _S.ENABLE_VM_FUNCTIONS,
)
"""In this order the first are the simplest to look at; what a processor lacks is left out."""

_PLAIN = (
    "cpuid", "rdtsc", "rdtscp", "invd", "wbinvd", "pause", "rdpmc", "vmcall", "vmlaunch", "vmresume",
    "vmxoff", "vmfunc", "getsec", "xsetbv", "rsm", "nop", "ud2",
)  # fmt: skip
_CR4_OF_INTEREST = int(CR4.TSD | CR4.PCE | CR4.SMXE | CR4.OSXSAVE | CR4.UMIP)
_SEGMENTS = ("", "es:", "cs:", "ss:", "fs:", "gs:")


@cache
def memory_operands(mode: Mode) -> tuple[str, ...]:
    """Effective addresses of all forms: base, index, scale, displacement, segment, address size."""
    if mode is Mode.REAL:
        forms = ["bx", "bx+si", "bx+di+0x10", "bp+si-0x10", "di+0x1234", "0x7400", "ebx+ecx*4+0x10", "ebx"]
    elif mode is Mode.PROTECTED:
        forms = [
            "ebx",
            "ebx+ecx*1",
            "ebx+ecx*8+0x12345678",
            "ecx*4+0x10000",
            "ebp-8",
            "0x10010",
            "bx+si+0x20",
        ]
    else:
        forms = [
            "rbx", "rbx+rcx*1", "r8+r9*8+0x12345678", "rcx*4+0x10000", "rbp-8", "0x10010", "ebx+ecx*2+0x20",
            "rip+0x10", "r13+r12*1", "rbx-0x80000000", "r12+0x7fffffff",
        ]  # fmt: skip
    return tuple(f"{segment}[{form}]" for form in forms for segment in _SEGMENTS)


@cache
def texts_with_memory(mode: Mode) -> tuple[str, ...]:
    """Instructions with a memory operand, each with each form of address."""
    wide = mode is Mode.LONG
    far = "fword" if not wide else "tbyte"
    number, last = ("qword", "r15") if wide else ("dword", "edx")
    sized = [
        *(f"{name} {far} ptr {{}}" for name in ("sgdt", "sidt", "lgdt", "lidt")),
        *(f"{name} word ptr {{}}" for name in ("sldt", "str", "lldt", "ltr")),
        "invlpg byte ptr {}",
    ]
    if mode is not Mode.REAL:
        sized += [
            *(f"{name} qword ptr {{}}" for name in ("vmclear", "vmptrld", "vmptrst", "vmxon")),
            *(f"{name} {last}, xmmword ptr {{}}" for name in ("invept", "invvpid", "invpcid")),
            f"vmread {number} ptr {{}}, {last}",
            f"vmwrite {last}, {number} ptr {{}}",
        ]
    return tuple(text.format(operand) for text in sized for operand in memory_operands(mode))


@cache
def texts_with_registers(mode: Mode) -> tuple[str, ...]:
    """Instructions with register operands."""
    names = [name for name in register_names(mode) if name not in ("rsp", "esp")]
    texts = [f"{name} {register}" for name in ("rdrand", "rdseed") for register in names]
    texts += [f"{name} {register}" for name in ("rdrand", "rdseed") for register in ("ax", "si")]
    if mode is not Mode.REAL:
        texts += [f"{name} {a}, {b}" for name in ("vmread", "vmwrite") for a in names[:4] for b in names[3:]]
        texts += [f"{name} {register}" for name in ("sldt", "str") for register in (*names, "ax", "di")]
        texts += [f"{name} {register}" for name in ("lldt", "ltr") for register in ("ax", "di")]
    return tuple(texts)


@cache
@st.composite
def _instruction(draw: st.DrawFn, mode: Mode) -> list[Snippet]:
    kind = draw(st.sampled_from(("plain", "registers", "memory")))
    if kind == "plain":
        instruction = draw(one_of_texts(mode, _PLAIN))
        if instruction.text == "vmfunc":
            return [
                mov(mode, "rax", draw(st.sampled_from((0, 1, 63, 64)))),
                mov(mode, "rcx", 512),
                instruction,
            ]
        if instruction.text == "getsec":
            return [mov(mode, "rax", 0), mov(mode, "rbx", 0), instruction]
        return [instruction]
    if kind == "registers":
        return [draw(one_of_texts(mode, texts_with_registers(mode)))]
    return [draw(one_of_texts(mode, texts_with_memory(mode)))]


@cache
def _base_registers(mode: Mode) -> st.SearchStrategy[dict[str, int]]:
    """What addresses are made of."""
    near = st.sampled_from((DATA, 0x11000, 0, 0x1FFF0, 0x20000)) if mode is not Mode.REAL else spread(16)
    width = 64 if mode is Mode.LONG else 32
    far = st.one_of(near, near, spread(width))
    small = st.one_of(st.integers(0, 64), spread(width))
    return st.fixed_dictionaries(
        {
            "rbx": far,
            "rcx": small,
            "rbp": near,
            "rsi": small,
            "rdi": small,
            "r8": far,
            "r9": small,
            "r12": small,
        }
    ).map(lambda registers: {name: value for name, value in registers.items() if value})


@cache
def _segment_bases(mode: Mode) -> st.SearchStrategy[dict[Field, int]]:
    """FS and GS at other addresses."""
    if mode is Mode.REAL:
        return st.just({})
    bases = st.sampled_from((0, 0x1000, 0x10000))
    return st.fixed_dictionaries({Field.GUEST_FS_BASE: bases, Field.GUEST_GS_BASE: bases})


@cache
@st.composite
def instruction_cases(draw: st.DrawFn, capabilities: Capabilities) -> Drawn:
    """A few instructions with controls, CR4 and registers; L1 may change a register on the way."""
    mode = draw(modes(capabilities))
    with_ept = capabilities.supports(SecondaryControls.ENABLE_EPT)
    state = guest_state(mode, capabilities, with_ept=with_ept)
    groups = draw(some(_instruction(mode)))
    lines = [line for group in groups for line in group]
    changed = draw(some_bits_of(_CR4_OF_INTEREST & capabilities.cr4_fixed1))
    fields = {Field.GUEST_CR4: state[Field.GUEST_CR4] ^ changed, **draw(_segment_bases(mode))}
    rest: dict[str, object] = {
        "registers": draw(_base_registers(mode)),
        "fields": what_differs(fields, state),
        "watch": (
            Field.GUEST_GDTR_BASE,
            Field.GUEST_GDTR_LIMIT,
            Field.GUEST_IDTR_BASE,
            Field.GUEST_IDTR_LIMIT,
        ),
    }
    if draw(st.booleans()):
        reason = draw(st.sampled_from((ExitReason.CPUID, ExitReason.GDTR_IDTR_ACCESS, ExitReason.VMREAD)))
        register = draw(st.sampled_from(("rax", "rbx", "rcx")))
        rest["reactions"] = (on(reason).set(register, draw(spread(32))).skip(),)
    controls = draw(settings_of(capabilities, CONTROLS))
    if _S.ENABLE_VM_FUNCTIONS in controls["enable"]:
        rest["fields"] = {**fields, Field.VM_FUNCTION_CONTROLS: 0}  # not of the baseline
    return Drawn(mode, (*lines, hlt(mode)), merged(draw(privileges(mode, capabilities)), rest, controls))
