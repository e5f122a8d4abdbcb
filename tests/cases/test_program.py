"""Guest programs: the bytes that come out, the errors that name the case's lines, and what the cache does."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from vmxlab.cases.assembler import split_statements
from vmxlab.cases.program import MAX_PROGRAM_BYTES, Assembler, Mode, Program, Request, assemble
from vmxlab.cases.program_cache import ProgramCache
from vmxlab.errors import OutOfRange, ProgramError

ORIGIN = 0x8000


@pytest.fixture
def make() -> Assembler:
    """An assembler that keeps nothing beyond the test."""
    return Assembler(ProgramCache(None))


def one(
    make: Assembler, source: str, mode: Mode = Mode.LONG, origin: int = ORIGIN, **symbols: int
) -> Program:
    return make.assemble_many([Request(source, mode, origin, symbols)])[0]


def refused(make: Assembler, source: str, mode: Mode = Mode.LONG, origin: int = ORIGIN) -> ProgramError:
    with pytest.raises(ProgramError) as caught:
        one(make, source, mode, origin)
    return caught.value


def little(value: int, size: int) -> str:
    return value.to_bytes(size, "little").hex()


# --- what comes out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "separator", ["; ", "\n", "\r\n", " ;\n  # a comment; with more\n\t", " /* over\n lines */\n"]
)
def test_statements_end_at_a_newline_or_a_semicolon(make: Assembler, separator: str) -> None:
    assert one(make, f"in al, 0x60{separator}hlt").code == bytes.fromhex("e460f4")


@pytest.mark.parametrize(
    ("mode", "source", "code"),
    [
        (Mode.LONG, "mov rax, 1; push rax; inc eax", "48c7c001000000 50 ffc0"),
        (Mode.PROTECTED, "mov eax, 1; push eax; inc eax", "b801000000 50 40"),
        (Mode.REAL, "mov ax, 1; push ax; inc eax", "b80100 50 6640"),
    ],
)
def test_each_mode_has_its_own_encodings(make: Assembler, mode: Mode, source: str, code: str) -> None:
    program = one(make, source, mode)
    assert program.code == bytes.fromhex(code)
    assert (program.mode, program.origin, program.source) == (mode, ORIGIN, source)


@pytest.mark.parametrize("source", ["", " \n\t\n", ";;\n;", "# nothing but a comment", "/* nor\nhere */"])
def test_no_statements_are_no_bytes(make: Assembler, as_calls: list[list[str]], source: str) -> None:
    assert one(make, source).code == b""
    assert as_calls == []


def test_the_shared_assembler_serves_the_plain_functions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vmxlab.cases import program as program_module

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program_module._shared_assembler.cache_clear()
    try:
        assert assemble("x: hlt; jmp x", symbols={"UNUSED": 1}).symbols == {"x": ORIGIN}
        assert len(list((tmp_path / "vmxlab").rglob("*"))) > 0
    finally:
        program_module._shared_assembler.cache_clear()


def test_instructions_of_vmx_are_known(make: Assembler) -> None:
    source = (
        "vmcall; vmfunc; vmlaunch; vmread rax, rbx; invept rax, [rbx]; invvpid rax, [rbx]; xsetbv; rdtscp"
    )
    assert len(one(make, source).code) == 3 + 3 + 3 + 3 + 5 + 5 + 3 + 3


def test_strings_and_characters_may_hold_separators(make: Assembler) -> None:
    assert (
        one(make, """mov al, ';' # x; y\n.ascii "a;#b\\"/*"; hlt""").code == b"\xb0;" + b'a;#b"/*' + b"\xf4"
    )


def test_a_comment_that_looks_like_a_line_marker_is_a_comment(make: Assembler) -> None:
    assert "line 2" in refused(make, '# 77 "elsewhere.c"\n bogus').listing


def test_a_program_can_be_hashed_and_sent_to_another_process(make: Assembler) -> None:
    program = one(make, "x: jmp x")
    assert pickle.loads(pickle.dumps(program)) == program
    assert len({program, one(make, "x: jmp x")}) == 1


# --- labels, addresses, relocations ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "source", "code"),
    [
        (Mode.LONG, "nop; x: mov rax, offset x", "90 48c7c0" + little(ORIGIN + 1, 4)),
        (Mode.LONG, "nop; x: movabs rax, offset x", "90 48b8" + little(ORIGIN + 1, 8)),
        (Mode.LONG, "nop; x: mov eax, offset x", "90 b8" + little(ORIGIN + 1, 4)),
        (Mode.LONG, "lea rax, [rip + x]; x: hlt", "488d0500000000 f4"),
        (Mode.LONG, "mov eax, [x + 4]; x: hlt", "8b0425" + little(ORIGIN + 11, 4) + "f4"),
        (Mode.LONG, "jmp [table + 8]; table: .quad table, table + 8", "ff2425" + little(ORIGIN + 15, 4)
         + little(ORIGIN + 7, 8) + little(ORIGIN + 15, 8)),
        (Mode.LONG, "x: .quad x - 0x9000", "00f0ffffffffffff"),
        (Mode.LONG, "jmp 0x8000", "e9 fbffffff"),
        (Mode.LONG, "call 0x9000", "e8 fb0f0000"),
        (Mode.LONG, ".weak x; jmp x; x: hlt", "e900000000 f4"),
        (Mode.LONG, ".weak x; x: nop; jrcxz x", "90 e3fd"),
        (Mode.LONG, "x: .word x; .long x; .quad x, .", "0080 00800000 0080000000000000 0e80000000000000"),
        (Mode.LONG, "x: .long y - x; y:", "04000000"),
        (Mode.PROTECTED, "x: mov eax, offset x; jmp 0x8000", "b8 00800000 e9 f6ffffff"),
        (Mode.PROTECTED, "x: .long x - 0x9000", "00f0ffff"),
        (Mode.PROTECTED, "call 0xfffff000", "e8 fb6fffff"),
        (Mode.REAL, "x: mov ax, offset x; mov al, [x + 1]", "b8 0080 a0 0180"),
        (Mode.REAL, "jmp 0x0000", "e9 fd7f"),
        (Mode.REAL, "x: ljmp 0, offset x", "ea 0080 0000"),
        (Mode.REAL, "x: mov eax, offset x", "66b8 00800000"),
        (Mode.LONG, ".att_syntax prefix; x: mov $x, %eax", "b8 00800000"),
    ],
)  # fmt: skip
def test_addresses_are_final(make: Assembler, mode: Mode, source: str, code: str) -> None:
    assert one(make, source, mode).code.hex() == code.replace(" ", "")


def test_an_eight_bit_address_is_filled_where_it_fits(make: Assembler) -> None:
    assert one(make, "x: mov al, offset x; .byte x", Mode.REAL, 0x7C).code == bytes.fromhex("b07c7c")


@pytest.mark.parametrize("origin", [0, 0x1000, 0x7FFF_0000])
def test_labels_count_from_the_origin(make: Assembler, origin: int) -> None:
    program = one(make, "nop; here: mov rax, offset here; end:", origin=origin)
    assert program.symbols == {"here": origin + 1, "end": origin + 8}
    assert program.code[4:8] == (origin + 1).to_bytes(4, "little")


def test_numeric_labels_bind_to_the_nearest(make: Assembler) -> None:
    assert one(make, "1: jmp 1b; jmp 1f; nop; 1: hlt").code == bytes.fromhex("ebfe eb01 90 f4")


def test_an_alignment_that_the_origin_has_is_kept(make: Assembler) -> None:
    assert one(make, "nop; .p2align 4; x: hlt").symbols == {"x": ORIGIN + 16}


def test_an_alignment_that_the_origin_lacks_is_refused(make: Assembler) -> None:
    assert "alignment of 16" in str(refused(make, "nop; .p2align 4; hlt", origin=ORIGIN + 8))


@pytest.mark.parametrize(
    ("source", "symbols", "code"),
    [
        ("in al, PORT", {"PORT": 0x60}, "e460"),
        ("mov rax, BIG", {"BIG": 0x1234_5678_9ABC_DEF0}, "48b8f0debc9a78563412"),
        ("mov rax, BIG", {"BIG": (1 << 64) - 2}, "48c7c0feffffff"),
        ("mov eax, A + 2*B", {"A": 1, "B": -1}, "b8ffffffff"),
        ("x: jmp x + OVER", {"OVER": 1}, "ebff"),
    ],
)
def test_constants_are_there_by_name(
    make: Assembler, source: str, symbols: dict[str, int], code: str
) -> None:
    program = one(make, source, **symbols)
    assert program.code.hex() == code
    assert not set(symbols) & set(program.symbols)


@pytest.mark.parametrize(
    "name", ["rax", "R8D", "al", "cr3", "xmm7", "ds", "dword", "offset", "1x", "a b", "", "x;hlt"]
)
def test_a_constant_can_not_hide_behind_a_register_or_an_operator(name: str) -> None:
    with pytest.raises(ProgramError, match="constant can't be called"):
        Request("nop", symbols={name: 1})


@pytest.mark.parametrize("value", [1 << 64, -(1 << 63) - 1])
def test_a_constant_wider_than_64_bits_is_refused(value: int) -> None:
    with pytest.raises(OutOfRange, match="constant WIDE"):
        Request("nop", symbols={"WIDE": value})


@pytest.mark.parametrize(
    ("mode", "origin"), [(Mode.REAL, 0x10000), (Mode.PROTECTED, 1 << 32), (Mode.LONG, -1)]
)
def test_an_origin_that_the_mode_can_not_address_is_refused(mode: Mode, origin: int) -> None:
    with pytest.raises(OutOfRange, match="origin"):
        Request("nop", mode, origin)


# --- what is refused, and how it is said -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "line", "shown", "message"),
    [
        ("frob eax", 1, "frob eax", "no such instruction"),
        ("mov eax, 1; frob eax; hlt", 1, "mov eax, 1; frob eax; hlt", "no such instruction: `frob eax'"),
        ("\n\n  nop\n  nop; mov al, cr3\n", 4, "nop; mov al, cr3", "mismatch"),
        ("nop # fine\r\nfrob\r\n", 2, "frob", "no such instruction"),
        ("/* one\ntwo */ frob", 2, "two */ frob", "no such instruction"),
        ("mov al, 0x1ff", 1, "mov al, 0x1ff", "shortened"),
        (".byte 0x1ff", 1, ".byte 0x1ff", "truncated"),
        ("iret", 1, "iret", "ambiguous operand size"),
        ("nop\nhlt; jmp nowhere", 2, "hlt; jmp nowhere", "undefined symbol 'nowhere'"),
        ("nop\nx: mov rax, [y]\n", 2, "x: mov rax, [y]", "undefined symbol 'y'"),
        ("nop; jmp 1f", 1, "nop; jmp 1f", "not defined"),
        ("nop\nx: nop; mov al, offset x", 2, "x: nop; mov al, offset x", "does not fit in the 8 bits"),
        ("x: .long x - 0x9000", 1, "x: .long x - 0x9000", "does not fit in the 32 bits"),
        ("nop\nmov rax, x@gotpcrel[rip]", 2, "mov rax, x@gotpcrel[rip]", "x needs a linker"),
        ('nop\n.ascii "open', 2, '.ascii "open', "unterminated string"),
        ("x: nop\nx: nop", 2, "x: nop", "already defined"),
        ("nop\n.incbin \"/etc/passwd\"", 2, ".incbin", "can't read another file"),
        ("nop; x: .INCLUDE \"other.s\"", 1, ".INCLUDE", "can't read another file"),
    ],
)  # fmt: skip
def test_an_error_shows_the_line_of_the_case(
    make: Assembler, source: str, line: int, shown: str, message: str
) -> None:
    error = refused(make, source)
    assert f"line {line}: " in error.listing
    assert shown in error.listing
    assert message in str(error)
    assert "/tmp" not in str(error)
    assert "standard input" not in str(error)


def test_the_mark_stands_under_the_statement(make: Assembler) -> None:
    first, second = refused(make, "nop; \tfrob eax; hlt").listing.splitlines()
    assert first.index("frob") == second.index("^")
    assert second.count("\t") == 1


def test_each_bad_line_is_shown_once_and_not_without_end(make: Assembler) -> None:
    listing = refused(make, "frob\n" * 2 + "nop\n" + "bogus\n" * 100).listing
    assert listing.count("`frob'") == 2
    assert "and 82 more" in listing


def test_a_program_with_data_outside_text_is_refused(make: Assembler) -> None:
    assert "4 bytes in section .data" in str(refused(make, "nop; .data; .long 5"))
    assert "8 bytes in section .bss" in str(refused(make, "nop; .bss; .skip 8"))


@pytest.mark.parametrize("name", [".incbin", ".include"])
def test_a_file_directive_may_stand_in_a_comment_or_a_string(make: Assembler, name: str) -> None:
    assert one(make, f'.ascii "{name}" # {name} "x"').code == name.encode()


def test_the_longest_program_fits_and_one_byte_more_does_not(make: Assembler) -> None:
    assert len(one(make, f".skip {MAX_PROGRAM_BYTES}").code) == MAX_PROGRAM_BYTES
    assert "32768 (0x8000)" in str(refused(make, f".skip {MAX_PROGRAM_BYTES + 1}"))


def test_a_program_can_not_run_past_the_end_of_its_address_space(make: Assembler) -> None:
    assert one(make, "hlt", Mode.REAL, 0xFFFF).code == b"\xf4"
    assert "it is 2 bytes long" in str(refused(make, "nop; hlt", Mode.REAL, 0xFFFF))


def test_a_program_without_end_is_stopped(make: Assembler) -> None:
    assert "the assembler gave up" in str(refused(make, ".skip 0x100000000"))


@pytest.mark.parametrize("source", [b"nop", None, 7, "nop\x00", "nop\x1b", "nop\rhlt", "nop \ud800"])
def test_what_is_not_text_is_refused(source: object) -> None:
    with pytest.raises(ProgramError):
        Request(source)


def test_a_comment_without_end_is_refused(make: Assembler) -> None:
    assert "line 2" in str(refused(make, "nop\nhlt /* and so on\nnop"))


def test_a_missing_assembler_is_named_with_its_package(
    make: Assembler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    error = refused(make, "nop")
    assert "apt-get install binutils" in str(error)


def test_an_assembler_that_does_not_know_the_processor_is_an_error(
    make: Assembler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "as"
    fake.write_text("#!/bin/sh\necho \"as: unrecognized option '--64'\" >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert "unrecognized option" in str(refused(make, "nop"))


# --- many at once ------------------------------------------------------------------------------------------


def test_three_hundred_plain_snippets_take_one_call(make: Assembler, as_calls: list[list[str]]) -> None:
    programs = make.assemble_many([Request(f"mov eax, {i}; in al, 0x60; hlt") for i in range(300)])
    assert len(as_calls) <= 2
    for i, program in enumerate(programs):
        assert program.code == b"\xb8" + i.to_bytes(4, "little") + b"\xe4\x60\xf4"


def test_snippets_of_all_modes_and_origins_share_a_call(make: Assembler, as_calls: list[list[str]]) -> None:
    requests = [Request("inc eax; jmp 0x100", mode, origin) for mode in Mode for origin in (0x100, 0x200)]
    together = [program.code for program in make.assemble_many(requests)]
    assert len(as_calls) == 1
    alone = Assembler(ProgramCache(None))
    assert together == [alone.assemble_many([request])[0].code for request in requests]


def test_snippets_with_the_same_constants_share_a_call(make: Assembler, as_calls: list[list[str]]) -> None:
    first = [Request(f"mov eax, {i}; out PORT, al", symbols={"PORT": 0x80}) for i in range(20)]
    second = [Request(f"mov eax, {i}; out PORT, al", symbols={"PORT": 0x81}) for i in range(20)]
    programs = make.assemble_many(first + second)
    assert [program.code[-1] for program in programs] == [0x80] * 20 + [0x81] * 20
    assert len(as_calls) == 2


def test_the_same_request_is_assembled_once(make: Assembler, as_calls: list[list[str]]) -> None:
    first, second = make.assemble_many([Request("x: jmp x"), Request("x: jmp x")])
    assert first == second
    assert len(as_calls) == 1


@pytest.mark.parametrize("borrowed", ["jmp x", "jmp 1b", "jmp 1f", "mov eax, X", "mov eax, offset x", "m"])
@pytest.mark.parametrize(
    "lender", ["x: 1: nop; .set X, 5", ".globl x; x: hlt; 1:", ".macro m; nop; .endm", "X = 5"]
)
def test_no_name_of_one_program_is_seen_by_another(make: Assembler, borrowed: str, lender: str) -> None:
    for requests in ([lender, borrowed], [borrowed, lender]):
        with pytest.raises(ProgramError) as caught:
            make.assemble_many([Request(source) for source in ["nop", *requests, "hlt"]])
        assert borrowed in caught.value.listing


def test_labels_of_the_same_name_stay_apart(make: Assembler) -> None:
    first, second = make.assemble_many([Request("x: jmp x"), Request("nop; nop; x: mov eax, offset x")])
    assert (first.symbols, second.symbols) == ({"x": ORIGIN}, {"x": ORIGIN + 2})
    assert second.code[-4:] == (ORIGIN + 2).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("source", "plain"),
    [
        ("in al, 0x60", True),
        ("rep movsb", True),
        ("lock add dword ptr [rax + 4*rcx - 8], 1", True),
        ("mov al, fs:[0x10]", True),
        ("HLT", True),
        ("jmp somewhere", True),  # binds to nothing there, and is refused on its own
        ("x: hlt", False),
        ("1: hlt", False),
        ("jmp 1b", False),
        ("jmp .", False),
        (".byte 1", False),
        ("X = 5", False),
        ('.ascii "x"', False),
        ("mov al, 'x'", False),
        ("es: hlt", False),
        ("{evex} vaddps xmm0, xmm1, xmm2", False),
    ],
)
def test_only_what_can_not_touch_another_program_shares_a_call(source: str, plain: bool) -> None:
    (statement,) = split_statements(source)
    assert statement.is_plain is plain


def test_a_bad_one_among_many_costs_few_calls_and_the_others_nothing(
    as_calls: list[list[str]], tmp_path: Path
) -> None:
    make = Assembler(ProgramCache(tmp_path))
    good = [Request(f"mov eax, {i}") for i in range(100)]
    bad = [Request("nop\nfrob"), Request("jmp nowhere")]
    with pytest.raises(ProgramError, match="line 2: frob"):
        make.assemble_many(good[:50] + bad + good[50:])
    assert len(as_calls) <= 6
    as_calls.clear()
    assert len(make.assemble_many(good)) == 100
    assert len(Assembler(ProgramCache(tmp_path)).assemble_many(good)) == 100
    assert as_calls == []
    with pytest.raises(ProgramError, match="nowhere"):
        make.assemble_many(bad[1:])


def test_changing_a_result_does_not_change_the_next(make: Assembler) -> None:
    dict.clear(one(make, "x: jmp x").symbols)
    assert one(make, "x: jmp x").symbols == {"x": ORIGIN}


def test_nothing_is_left_behind(make: Assembler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    one(make, "x: jmp x")
    refused(make, "frob")
    assert list(tmp_path.iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before
