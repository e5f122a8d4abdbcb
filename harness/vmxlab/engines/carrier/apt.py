"""Debian packages by the host's apt: which versions there are, and the packages themselves.

apt is asked as if nothing were installed and the machine were amd64, so the answer does not depend on the
host's packages or architecture. The host's own package lists serve where they know the packages and their
versions can still be had; else lists of ours are fetched, from the same sources.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from vmxlab.engines.carrier.tools import run

ROOTS = ("linux-image-cloud-amd64", "qemu-system-x86")
"""The packages that the carrier is made of; the rest is what these depend on."""

HOST_LISTS = Path("/var/lib/apt/lists")
HOST_SOURCES = Path("/etc/apt")

# #clear: the host's configuration has lists of values, which an option on the command line only adds to.
# Hooks of the host (such as docker-clean's) are for its own package state, not for ours.
_CONFIGURATION = """\
#clear APT::Architectures;
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Sandbox::User "root";
APT::Get::Assume-Yes "true";
APT::Install-Recommends "false";
APT::Install-Suggests "false";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
#clear Acquire::Languages;
Acquire::Languages { "none"; };
Acquire::ForceHash "SHA256";
Acquire::Retries "2";
APT::Update::Error-Mode "any";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
quiet "2";
"""

# 'http://.../zlib1g_1.2.13_amd64.deb' zlib1g_1%3a1.2.13_amd64.deb 86684 SHA256:0123...
_URI_LINE = re.compile(r"^'[^']*' (?P<file>\S+\.deb) (?P<bytes>\d+) (?P<hash>\S*)$")


@dataclass(frozen=True, slots=True)
class Package:
    """A package in one version. `sha256` is empty where the sources name none."""

    name: str
    version: str
    file: str
    size_bytes: int
    sha256: str

    @property
    def upstream(self) -> str:
        """The version without Debian's epoch and revision: "6.1.192" of "6.1.192-2"."""
        version = self.version.split(":", 1)[-1]
        return version.rpartition("-")[0] or version

    def is_whole(self, path: Path) -> bool:
        """Whether a file is this package, by size and hash."""
        try:
            if path.stat().st_size != self.size_bytes:
                return False
            with path.open("rb") as file:
                return not self.sha256 or hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
        except OSError:
            return False


def parse_uris(lines: Iterable[str]) -> tuple[Package, ...]:
    """The packages that `apt-get --print-uris` lists; all other lines are passed over."""
    packages = []
    for line in lines:
        match = _URI_LINE.match(line.strip())
        if match is None:
            continue
        name, version, _ = match["file"].rsplit("_", 2)
        kind, _, value = match["hash"].partition(":")
        packages.append(
            Package(
                name,
                unquote(version),
                match["file"],
                int(match["bytes"]),
                value.lower() if kind == "SHA256" else "",
            )
        )
    return tuple(packages)


class Apt:
    """The host's apt with a state folder of ours.

    `private`: work on lists of our own instead of the host's.
    """

    def __init__(self, folder: Path, *, private: bool) -> None:
        self._folder = folder
        self.private = private

    def closure(self, work: Path) -> tuple[Package, ...]:
        """All packages that ROOTS need. Raises ToolFailed where apt does not find them."""
        command = self._command("install", "--no-install-recommends", "--print-uris", *ROOTS)
        return parse_uris(run(command, work))

    def update(self, work: Path) -> None:
        """Fetch our own lists. Raises ToolFailed; some of the lists may be there even so."""
        run(self._command("update"), work)

    def download(self, packages: Sequence[Package], work: Path) -> None:
        """Download these packages into `work`, under their names. Raises ToolFailed.

        apt verifies what it downloads against the signed lists.
        """
        wanted = [f"{package.name}={package.version}" for package in packages]
        run(self._command("download", *wanted), work)

    def _command(self, verb: str, *arguments: str) -> list[str]:
        folder = self._folder
        archives = folder / "cache/archives/partial"
        archives.mkdir(parents=True, exist_ok=True)
        configuration, installed = folder / "apt.conf", folder / "installed"
        configuration.write_text(_CONFIGURATION)
        installed.write_text("")
        options = {
            "Dir::State::status": installed,
            "Dir::State::extended_states": folder / "extended_states",
            "Dir::Cache": folder / "cache",
        }
        if self.private:
            lists = private_lists(folder)
            (lists / "partial").mkdir(parents=True, exist_ok=True)
            options["Dir::State::lists"] = lists
        settings = [f"-o{name}={value}" for name, value in options.items()]
        return ["apt-get", "-c", str(configuration), *settings, verb, *arguments]


def private_lists(folder: Path) -> Path:
    """Where our own lists are, below apt's state folder."""
    return folder / "lists"


def stamp(folder: Path) -> str:
    """The state of all lists and sources that apt's answers come from, as a hash: host's and our own."""
    digest = hashlib.sha256()
    for place in (HOST_LISTS, HOST_SOURCES, private_lists(folder)):
        for line in sorted(_states(place)):
            digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def _states(place: Path) -> Iterable[str]:
    """A line for each file below a folder. Those that come and go with each call of apt are left out."""
    try:
        paths = [path for path in place.rglob("*") if path.name not in ("lock", "partial", "auxfiles")]
    except OSError:
        return
    for path in paths:
        try:
            state = path.stat()
        except OSError:
            continue
        if path.is_file():
            yield f"{path.relative_to(place)} {state.st_size} {state.st_mtime_ns}"
