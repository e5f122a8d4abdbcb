"""The file that `vmxlab caps --json` writes and `--caps FILE` reads: a processor's capability MSRs.

    {
      "engine": {"name": "bochs", "version": "2.7", "model": "corei7_skylake_x"},
      "physical_address_width": 40,
      "msrs": {"IA32_VMX_BASIC": "0x00d810000000002b", ...}
    }

"msrs" is what `Capabilities.to_dict` gives; it is empty for a processor without VMX. The same processor
always gives the same text. A file that holds nothing but the MSRs is read too, and a serial log of the
monitor, which is what a processor without an engine leaves: an image, booted on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmxlab.errors import CaseError
from vmxlab.structures.capabilities import Capabilities
from vmxlab.structures.checks import MAX_PHYSICAL_ADDRESS_WIDTH

if TYPE_CHECKING:
    from vmxlab.engines.base import EngineInfo

_ADVICE = "write it with: vmxlab caps --json > FILE"


@dataclass(frozen=True, slots=True)
class CapsFile:
    """A processor: its capability MSRs, MAXPHYADDR in bits, and where they were read."""

    capabilities: Capabilities
    physical_address_width: int = MAX_PHYSICAL_ADDRESS_WIDTH
    engine: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, capabilities: Capabilities, physical_address_width: int, info: EngineInfo) -> CapsFile:
        """What a machine said. Why the engine was chosen is left out: it isn't the processor's doing."""
        engine = {"name": info.name, "version": info.version, "model": info.model}
        return cls(capabilities, physical_address_width, engine)

    def to_json(self) -> str:
        """The text of the file."""
        import json

        values = {
            "engine": dict(self.engine),
            "physical_address_width": self.physical_address_width,
            "msrs": self.capabilities.to_dict(),
        }
        return json.dumps(values, indent=2)

    @classmethod
    def from_json(cls, text: str) -> CapsFile:
        """The reverse of `to_json`. Raises CaseError for a text that is no such file."""
        import json

        try:
            values = json.loads(text)
        except ValueError as error:
            raise CaseError(f"the capabilities are no JSON: {error}", advice=_ADVICE) from error
        if not isinstance(values, dict):
            raise CaseError("the capabilities are no JSON object", advice=_ADVICE)
        if "msrs" not in values:
            return cls(Capabilities.from_dict(values))
        return cls(
            Capabilities.from_dict(_mapping(values, "msrs")),
            _width(values.get("physical_address_width", MAX_PHYSICAL_ADDRESS_WIDTH)),
            {str(key): str(value) for key, value in _mapping(values, "engine").items()},
        )

    def intersection(self, other: CapsFile) -> CapsFile:
        """What both processors can do. Raises CaseError where they leave no common value.

        Revision identifiers may differ: a case gets its own from the processor that runs it.
        """
        return CapsFile(
            self.capabilities.intersection(other.capabilities, ignore_revision_ids=True),
            min(self.physical_address_width, other.physical_address_width),
        )


def read_caps_file(path: Path) -> CapsFile:
    """A file of capabilities. Raises CaseError where it can't be read, or is none, or is of no VMX."""
    try:
        content = path.read_bytes()
        found = _of_log(content) or CapsFile.from_json(content.decode("utf-8"))
    except OSError as error:
        raise CaseError(f"{path} can't be read: {error.strerror}", advice=_ADVICE) from error
    except UnicodeDecodeError as error:
        raise CaseError(f"{path} is no text", advice=_ADVICE) from error
    except CaseError as error:
        raise CaseError(f"{path}: {error.message}", advice=error.advice) from error
    if not found.capabilities.raw:
        raise CaseError(f"{path} is of a processor without VMX", advice="no case can be made for it")
    return found


def _of_log(content: bytes) -> CapsFile | None:
    """What the monitor said of the processor when it booted; None where this is no log of it."""
    from vmxlab.console.records import parse_log
    from vmxlab.console.session import capabilities_from_record

    records, _ = parse_log(content)
    caps = [record for record in records if record.kind == "caps"]
    boot = [record for record in records if record.kind == "boot"]
    if not caps or not boot:
        return None
    return CapsFile(capabilities_from_record(caps[-1]), boot[-1].number("maxphyaddr"))


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key, {})
    if not isinstance(found, dict):
        raise CaseError(f"{key!r} is no JSON object", advice=_ADVICE)
    return found


def _width(value: object) -> int:
    if not isinstance(value, int) or not 32 <= value <= MAX_PHYSICAL_ADDRESS_WIDTH:
        raise CaseError(f"physical_address_width is {value!r}: 32 to {MAX_PHYSICAL_ADDRESS_WIDTH} bits")
    return value
