"""A second reader of scripts, made from their description alone, and monitors to compile for."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest

from vmxlab import Capabilities, Case
from vmxlab.image.compiler import Target, compile_case
from vmxlab.image.monitor import Monitor, load_monitor

_KIB = 1024
_OWN = (16 * 1024 * _KIB, 64 * 1024 * _KIB)
"""What a case may write to, as docs say it: the machine's memory from 16 MiB to its end."""

# name: (struct format of the fixed operands, their names), by number of the operation.
_OPERANDS: dict[int, tuple[str, str, str]] = {
    0: ("END", "", ""),
    1: ("CASE", "IB", "number length"),
    2: ("FILL", "QIB", "address bytes value"),
    3: ("DATA", "QI", "address bytes"),
    4: ("SEQUENCE", "QIQQ", "address count first stride"),
    5: ("REVISION", "QI", "address flags"),
    16: ("VMXON", "Q", "region"),
    17: ("VMXOFF", "", ""),
    18: ("VMCLEAR", "Q", "region"),
    19: ("VMPTRLD", "Q", "region"),
    20: ("VMPTRST", "", ""),
    21: ("VMREAD", "I", "field"),
    22: ("VMWRITES", "H", "count"),
    23: ("INVEPT", "QQQ", "type low high"),
    24: ("INVVPID", "QQQ", "type low high"),
    25: ("VMCALL", "", ""),
    32: ("RDMSR", "I", "msr"),
    33: ("WRMSR", "IQ", "msr value"),
    34: ("CR0", "Q", "value"),
    35: ("CR4", "Q", "value"),
    36: ("APIC_USED", "", ""),
    37: ("APIC_WRITE", "II", "register value"),
    38: ("APIC_READ", "I", "register"),
    39: ("SECOND_PROCESSOR", "I", "program"),
    48: ("REGISTERS", "H", "mask"),
    49: ("WATCH", "B", "count"),
    50: ("DEFAULTS", "128s", "actions"),
    51: ("REACTION", "HIIQQH", "reason first times mask value bytes"),
    52: ("ENTER", "BI", "resume max_exits"),
    53: ("MEMORY", "QI", "address bytes"),
}
_ACTIONS: dict[int, tuple[str, str, str]] = {
    0: ("STOP", "", ""),
    1: ("SKIP", "", ""),
    2: ("RESUME", "", ""),
    3: ("SET_REGISTER", "BQ", "index value"),
    4: ("SET_FIELD", "IQ", "field value"),
    5: ("SET_MEMORY", "QI", "address bytes"),
    6: ("INVEPT", "QQ", "type eptp"),
    7: ("APIC_WRITE", "II", "register value"),
}


@dataclass(frozen=True)
class Operation:
    """One operation: its name, its operands, whether its failure is passed over, and what follows them."""

    name: str
    operands: Mapping[str, int]
    go_on: bool = False
    rest: object = None

    def __getitem__(self, operand: str) -> int:
        return self.operands[operand]


class Script:
    """A script taken apart. Reading it fails where an operation is unknown or runs past the end."""

    def __init__(self, script: bytes) -> None:
        self._bytes = script
        self._at = 0
        self.operations: list[Operation] = []
        while self._at < len(script):
            self.operations.append(self._operation())

    def _take(self, count: int) -> bytes:
        assert self._at + count <= len(self._bytes), "an operation runs past the end of the script"
        self._at += count
        return self._bytes[self._at - count : self._at]

    def _unpack(self, layout: str, names: str) -> dict[str, int]:
        values = struct.unpack("<" + layout, self._take(struct.calcsize("<" + layout)))
        return dict(zip(names.split(), values, strict=True))

    def _operation(self) -> Operation:
        (code,) = self._take(1)
        name, layout, names = _OPERANDS[code & 0x7F]
        operands = self._unpack(layout, names)
        return Operation(name, operands, bool(code & 0x80), self._rest(name, operands))

    def _rest(self, name: str, operands: Mapping[str, int]) -> object:
        match name:
            case "CASE":
                return self._take(operands["length"]).decode("ascii")
            case "DATA":
                return self._take(operands["bytes"])
            case "VMWRITES":
                return [struct.unpack("<IQ", self._take(12)) for _ in range(operands["count"])]
            case "REGISTERS":
                bits = [bit for bit in range(16) if operands["mask"] >> bit & 1]
                return {bit: struct.unpack("<Q", self._take(8))[0] for bit in bits}
            case "WATCH":
                return [struct.unpack("<I", self._take(4))[0] for _ in range(operands["count"])]
            case "REACTION":
                return self._reaction(self._at + operands["bytes"])
        return None

    def _reaction(self, end: int) -> list[Operation]:
        actions = []
        while self._at < end:
            (code,) = self._take(1)
            name, layout, names = _ACTIONS[code]
            operands = self._unpack(layout, names)
            rest = self._take(operands["bytes"]) if name == "SET_MEMORY" else None
            actions.append(Operation(name, operands, rest=rest))
        assert self._at == end
        return actions

    @property
    def names(self) -> list[str]:
        """The operations in order, those that lay out memory left out."""
        return [op.name for op in self.operations if op.name not in ("FILL", "DATA", "SEQUENCE", "REVISION")]

    def all(self, name: str) -> list[Operation]:
        """Every operation of a name."""
        return [op for op in self.operations if op.name == name]

    def one(self, name: str) -> Operation:
        """The only operation of a name."""
        (operation,) = self.all(name)
        return operation

    @property
    def fields(self) -> dict[int, int]:
        """What the VMWRITEs of the case write."""
        rest = self.one("VMWRITES").rest
        assert isinstance(rest, list)
        return dict(rest)

    def read(self, revision: int = 0x2B) -> Callable[..., bytes]:
        """read(address, count=4096): the machine's memory when the script has run; it held rubbish before."""
        start, end = _OWN
        contents = [(op, _content(op, revision)) for op in self.operations]
        writes = [(op["address"] - start, content) for op, content in contents if content is not None]
        memory = bytearray(b"\xcc" * max(at + len(content) for at, content in writes))
        for at, content in writes:
            assert 0 <= at <= end - start - len(content), hex(start + at)
            memory[at : at + len(content)] = content
        return lambda address, count=4096: bytes(
            memory[address - start : address - start + count].ljust(count, b"\xcc")
        )


def _content(op: Operation, revision: int) -> bytes | None:
    match op.name:
        case "FILL":
            return bytes([op["value"]]) * op["bytes"]
        case "DATA":
            assert isinstance(op.rest, bytes)
            return op.rest
        case "SEQUENCE":
            values = [(op["first"] + i * op["stride"]) % (1 << 64) for i in range(op["count"])]
            return struct.pack(f"<{len(values)}Q", *values)
        case "REVISION":
            return struct.pack("<I", revision | op["flags"])
    return None


@pytest.fixture
def read_script() -> Callable[[bytes], Script]:
    """read_script(bytes) -> `Script`."""
    return Script


@pytest.fixture(scope="session")
def monitor() -> Monitor:
    """The monitor that was built."""
    return load_monitor()


@pytest.fixture(scope="session")
def paper_monitor() -> Monitor:
    """A monitor on paper: addresses that can be told apart, and code that is easy to find again."""
    return Monitor(
        elf=b"",
        code=b"monitor " * 1024,
        reset_stub=b"VMXLABRM" + bytes(32) + b"stub " * 196 + b"end.",
        entry=0x10_0020,
        exit_entry=0x10_1111,
        exit_stack_top=0x10_2220,
        page_table_root=0x10_3000,
        gdt=0x10_4440,
        gdt_bytes=0x28,
        idt=0x10_5550,
        idt_bytes=0x1000,
        tss=0x10_6660,
    )


@pytest.fixture
def target_for(paper_monitor: Monitor, processors: Mapping[str, Capabilities]) -> Callable[[str], Target]:
    """target_for(name) -> what to compile for: that processor and the monitor on paper."""
    return lambda name: Target(processors[name], paper_monitor, l2_tsc=1_000_000)


@pytest.fixture
def compiled(target_for):
    """compiled(processor="skylake", **case) -> CompiledCase. The program is HLT in machine code."""

    def make(processor="skylake", *, number=0, target=None, **case):
        case.setdefault("program", b"\xf4")
        return compile_case(Case(**case), target or target_for(processor), number=number)

    return make


@pytest.fixture
def script_of(compiled):
    """script_of(...) -> the script that `compiled` gives, taken apart."""
    return lambda *args, **case: Script(b"".join(compiled(*args, **case).units))


@pytest.fixture
def refused(compiled):
    """refused(kind of error, ...) -> the error that `compiled` raises."""

    def refuse(kind, *args, **case):
        with pytest.raises(kind) as caught:
            compiled(*args, **case)
        return caught.value

    return refuse
