"""``manifest.json`` of a saved int8 model: what it holds, how it is written, and the strict reading of it."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qat_lightning.backend import Cpu
from qat_lightning.decoding import decode, parse_json, shown
from qat_lightning.errors import ArtifactError
from qat_lightning.plan import Plan
from qat_lightning.runtimes import Timing
from qat_lightning.signature import Signature

FORMAT = "qat_lightning int8"
FORMAT_VERSION = 3
SHA256 = re.compile(r"[0-9a-f]{64}")

FileKind = Literal["weights", "program", "model"]
SUFFIXES: dict[FileKind, str] = {"weights": "safetensors", "program": "json", "model": "onnx"}
"""The weights, torch's program on them, and the same for other runtimes with weights of its own."""


@dataclass(frozen=True)
class TargetEntry:
    """One int8 submodule.

    Args:
        plan: recipe, flow, backend, and engine and value range of each layer.
        inputs: what it was called with before it was saved; None where nobody saw a call.
    """

    plan: Plan
    inputs: Signature | None


@dataclass(frozen=True)
class FileEntry:
    """A file besides the manifest.

    Args:
        sha256: of its content, in hexadecimal digits.
        bytes: its size.
    """

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        """Check what the types leave open."""
        if not SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256 is {shown(self.sha256)}, which is no SHA-256")
        if self.bytes < 0:
            raise ValueError(f"bytes is {self.bytes}, less than none")


@dataclass(frozen=True)
class Manifest:
    """What a saved int8 model is, besides its weights.

    Args:
        package: version of qat_lightning.
        torch: version of PyTorch.
        cpu: the processor it was saved on.
        targets: the int8 submodules by qualified name; the name is empty where the whole model is one.
        metrics: figures of its report, e.g. ``int8/acc``; empty where none was given.
        files: the files of the folder by name: the weights, and the programs, if there are any.
        entry: the submodule that the programs compute; empty for the whole model.
        timings: of the runtimes, on the machines that have loaded it with ``runtime="auto"``.
    """

    package: str
    torch: str
    cpu: Cpu
    targets: Mapping[str, TargetEntry]
    metrics: Mapping[str, float]
    files: Mapping[str, FileEntry]
    entry: str
    timings: tuple[Timing, ...]

    def __post_init__(self) -> None:
        """Check what the types leave open."""
        if not self.targets or ("" in self.targets and len(self.targets) > 1):
            raise ValueError(f"targets are {shown(sorted(self.targets))}: there must be one, or several with names")
        kinds = [_kind(name, entry.sha256) for name, entry in self.files.items()]
        if None in kinds:
            raise ValueError(f"files are {shown(sorted(self.files))}: their names must come from their SHA-256")
        if len({*kinds}) < len(kinds) or "weights" not in kinds:
            raise ValueError(f"files are {shown(sorted(self.files))}: there must be one of weights, and at most one program of each kind")

    def file(self, kind: FileKind) -> tuple[str, FileEntry] | None:
        """Return name and entry of a file, None where there is no such."""
        return next(((name, entry) for name, entry in self.files.items() if _kind(name, entry.sha256) == kind), None)

    @property
    def weights(self) -> tuple[str, FileEntry]:
        """Name and entry of the weights."""
        found = self.file("weights")
        assert found is not None
        return found

    def to_json(self) -> str:
        """Return the manifest as it is written, with a checksum of itself."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps({**content, "sha256": checksum(content)}, indent=2, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: bytes) -> "Manifest":
        """Return the manifest that ``to_json`` wrote.

        Raises:
            ArtifactError: no JSON, written by something else or by another version, altered, or with a key or value that does not belong.
        """
        try:
            content = parse_json(text)
        except ValueError as error:
            raise ArtifactError(f"it is no JSON: {error}. Copy the folder anew from where it was saved.") from None
        _check_origin(content)
        if content.pop("sha256", None) != checksum(content):
            raise ArtifactError("its own `sha256` does not match: it was altered or damaged. Copy the folder anew from where it was saved.")
        del content["format"], content["format_version"]
        try:
            return decode(Manifest, content)
        except ValueError as error:
            raise ArtifactError(f"it says what save_quantized never writes: {error}.") from None


def file_name(kind: FileKind, sha256: str) -> str:
    """Return the name of a file, which comes from its content: a new one never replaces one in use."""
    return f"{kind}-{sha256[:16]}.{SUFFIXES[kind]}"


def _kind(name: str, sha256: str) -> FileKind | None:
    return next((kind for kind in SUFFIXES if file_name(kind, sha256) == name), None)


def is_manifest(text: bytes) -> bool:
    """Whether a file was written by ``to_json``, of this or another version."""
    try:
        content = parse_json(text)
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def checksum(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON values, however a file may lay them out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_origin(content: Any) -> None:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError("it was not written by save_quantized. Give the folder that save_quantized returned.")
    version = content.get("format_version")
    if type(version) is not int or version < FORMAT_VERSION:
        raise ArtifactError(f"its format version is {shown(version)}; this version of qat_lightning reads {FORMAT_VERSION}: save it anew.")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"it was written by a newer version of qat_lightning: its format version is {shown(version)}, "
            f"this version reads {FORMAT_VERSION}. Upgrade qat_lightning."
        )
