"""The folder of a saved int8 model: reading its files as those of a stranger, writing them so that a kill leaves the old or the new."""

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from qat_lightning.errors import ArtifactError
from qat_lightning.files import read_regular, write_atomically
from qat_lightning.manifest import FileEntry, Manifest, is_manifest

MANIFEST = "manifest.json"
ONNX_MODEL = "model.onnx"
MANIFEST_LIMIT = 4_000_000
# Names that save_quantized gives, while it writes and after.
_NAMES = r"(manifest\.json|model\.onnx|weights-[0-9a-f]{16}\.safetensors|program-[0-9a-f]{16}\.json|model-[0-9a-f]{16}\.onnx)"
OWN_NAMES = re.compile(rf"({_NAMES}|\.{_NAMES}\.\w{{8}})")


def refuse_foreign(folder: Path) -> None:
    """Refuse to write into anything that is neither an artifact, nor empty, nor what a kill left of a first save.

    Args:
        folder: for :func:`save_quantized`.

    Raises:
        ArtifactError: it holds what is not ours.
    """
    if not folder.exists():
        return
    try:
        ours = is_manifest(read_regular(folder / MANIFEST, MANIFEST_LIMIT))
    except FileNotFoundError:
        ours = all(OWN_NAMES.fullmatch(path.name) for path in folder.iterdir())
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise ArtifactError(f"{folder} exists and is no saved int8 model: it is not overwritten. Choose another folder.")


def write_files(folder: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    """Write an artifact, and remove what an older one or a kill has left.

    Args:
        folder: is made where there is none.
        manifest: describes the files.
        contents: of the files by name.
    """
    text = manifest.to_json()
    for name, content in contents.items():
        write_atomically(folder / name, content)
    # The manifest last: until it is replaced, it names the old files, which are still there.
    write_atomically(folder / MANIFEST, text)
    _link_model(folder, manifest)
    for path in folder.iterdir():
        if OWN_NAMES.fullmatch(path.name) and path.name not in (MANIFEST, ONNX_MODEL, *contents) and not path.is_dir():
            path.unlink(missing_ok=True)


def _link_model(folder: Path, manifest: Manifest) -> None:
    """Give the ONNX model a name that does not change, too: a second name of the same file where the file system has such."""
    plain, found = folder / ONNX_MODEL, manifest.file("model")
    if found is None:
        plain.unlink(missing_ok=True)
        return
    temporary = folder / f".{ONNX_MODEL}.00000000"
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
        os.link(folder / found[0], temporary)
        os.replace(temporary, plain)
        return
    write_atomically(plain, (folder / found[0]).read_bytes())


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of an artifact.

    Raises:
        ArtifactError: there is none, or one that cannot be used.
    """
    path = folder / MANIFEST
    try:
        return Manifest.from_json(read_regular(path, MANIFEST_LIMIT))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{folder} has no {MANIFEST}: it is no int8 model saved by save_quantized, or an incomplete one.") from None
    except (ArtifactError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be used: {error}") from error


def read_file(folder: Path, name: str, entry: FileEntry, limit: int | None = None) -> bytes:
    """Return the content of a file, which is that of the manifest.

    Args:
        folder: of the artifact.
        name: of the file.
        entry: what the manifest says of it.
        limit: how many bytes it may have; None: as many as the manifest says.

    Raises:
        ArtifactError: it is missing, no regular file, too large, truncated or altered.
    """
    try:
        content = read_regular(folder / name, entry.bytes if limit is None else limit)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} has no {name}: the artifact is incomplete. Copy it anew from where it was saved.") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / name} cannot be used: {error}") from error
    if len(content) != entry.bytes or hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ArtifactError(
            f"{folder / name} is not the file that {MANIFEST} describes ({entry.bytes} bytes, SHA-256 {entry.sha256[:16]}...): it is "
            f"truncated or altered. Copy it anew from where it was saved."
        )
    return content
