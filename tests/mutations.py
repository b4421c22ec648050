"""Ways to damage a saved int8 model, or to make it harmful. Each takes a folder and a source of randomness."""

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch

from qat_lightning.manifest import checksum, file_name

MANIFEST = "manifest.json"
EVIL_VALUES = (
    *(None, True, False, 0, -1, 2**31, 2**63, 10**400, 0.5, 1e308, "", "fx", "pt2e", "../../etc/passwd", "/etc/passwd", "\ud800", "\x00"),
    *([], {}, [[]], [None], {"_target_": "os.system", "_args_": ["id"]}, {"__class__": "os.system"}, "os.system", "A" * 100_000),
)
EVIL_NAMES = ("", "..", ".", "../weights.safetensors", "/etc/passwd", "a/b", "a\\b", "manifest.json", "\x00", "CON", "weights-.safetensors")
EVIL_NUMBERS = (0.0, -1.0, float("nan"), float("inf"), 1e-45, 1e-300, 1e300, -128, 255, 256, 2**31, -(2**63))


@dataclass(frozen=True)
class Mutation:
    """One way.

    Args:
        apply: changes the folder.
        signed: checksums are made to fit, so that what is loaded may compute something else.
    """

    apply: Callable[[Path, Random], None]
    signed: bool

    @property
    def name(self) -> str:
        return self.apply.__name__


MUTATIONS: list[Mutation] = []


def mutation(signed: bool) -> Callable[[Callable[[Path, Random], None]], Callable[[Path, Random], None]]:
    def register(apply: Callable[[Path, Random], None]) -> Callable[[Path, Random], None]:
        MUTATIONS.append(Mutation(apply, signed))
        return apply

    return register


# --- reading and signing -----------------------------------------------------------------------------------------------------


def weights_of(folder: Path) -> Path:
    return next(folder.glob("weights-*"))


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def sign_manifest(folder: Path, content: Any) -> None:
    if isinstance(content, dict):
        content.pop("sha256", None)
        content["sha256"] = checksum(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def sign_weights(folder: Path, content: bytes, size: int | None = None) -> None:
    """Replace the weights, and whatever the manifest says of them."""
    weights_of(folder).unlink()
    sha256 = hashlib.sha256(content).hexdigest()
    (folder / file_name("weights", sha256)).write_bytes(content)
    manifest = read_manifest(folder)
    manifest["files"] = {file_name("weights", sha256): {"sha256": sha256, "bytes": len(content) if size is None else size}}
    sign_manifest(folder, manifest)


def either_file(folder: Path, random: Random) -> Path:
    return random.choice([folder / MANIFEST, weights_of(folder)])


def flipped(content: bytes, random: Random, start: int = 0, end: int | None = None) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 8, 64])):
        changed[random.randrange(start, len(content) if end is None else end)] ^= 1 << random.randrange(8)
    return bytes(changed)


def header_end(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


# --- damage: checksums do not fit --------------------------------------------------------------------------------------------


@mutation(signed=False)
def flip_bits(folder: Path, random: Random) -> None:
    path = either_file(folder, random)
    path.write_bytes(flipped(path.read_bytes(), random))


@mutation(signed=False)
def truncate(folder: Path, random: Random) -> None:
    path = either_file(folder, random)
    os.truncate(path, random.randrange(path.stat().st_size))


@mutation(signed=False)
def append(folder: Path, random: Random) -> None:
    with either_file(folder, random).open("ab") as file:
        file.write(random.randbytes(random.choice([1, 8, 1000])))


@mutation(signed=False)
def splice(folder: Path, random: Random) -> None:
    """Put a piece of one file into another."""
    source, path = either_file(folder, random).read_bytes(), either_file(folder, random)
    content, start = path.read_bytes(), random.randrange(len(source))
    at = random.randrange(len(content))
    path.write_bytes(content[:at] + source[start : start + random.randrange(1, 200)] + content[at:])


@mutation(signed=False)
def delete(folder: Path, random: Random) -> None:
    either_file(folder, random).unlink()


@mutation(signed=False)
def replace_by_something_else(folder: Path, random: Random) -> None:
    """A link, a folder, a pipe or a device where a file belongs."""
    path = either_file(folder, random)
    kind = random.choice(["link", "link to a device", "dangling link", "folder", "pipe"])
    moved = path.rename(folder / "moved")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"link": moved, "link to a device": "/dev/zero", "dangling link": "/nowhere"}[kind])


@mutation(signed=False)
def bend_text(folder: Path, random: Random) -> None:
    """JSON that many readers take: keys given twice, numbers that are none, deep nesting."""
    path = folder / MANIFEST
    text = path.read_text()
    at = random.choice([index for index, character in enumerate(text) if character in "{[:,"]) + 1
    piece = random.choice(
        ['"format": "qat_lightning int8", ', "NaN", "-Infinity, ", "1e999", "[" * 10_000, '{"a":' * 50_000, "9" * 5_000, "\ud800"]
    )
    path.write_bytes((text[:at] + piece + text[at:]).encode(errors="surrogatepass"))


# --- forgery: checksums fit --------------------------------------------------------------------------------------------------


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of everything in a JSON value."""
    children = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    return [path] * bool(path) + [found for key, child in children for found in nodes(child, (*path, key))]


def parent_of(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


@mutation(signed=True)
def change_manifest(folder: Path, random: Random) -> None:
    manifest = read_manifest(folder)
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        change_node(manifest, random)
    sign_manifest(folder, manifest)


def change_node(manifest: Any, random: Random) -> None:
    path = random.choice([path for path in nodes(manifest) if path != ("sha256",)])
    other = random.choice(nodes(manifest))
    owner, key = parent_of(manifest, path), path[-1]
    kind = random.choice(["replace", "replace", "delete", "add", "rename", "copy", "twice"])
    if kind == "delete":
        del owner[key]
    elif kind == "rename" and isinstance(owner, dict):
        owner[random.choice(EVIL_NAMES)] = owner.pop(key)
    elif kind == "add" and isinstance(owner, dict):
        owner[random.choice([*EVIL_NAMES, "_target_", "__reduce__"])] = random.choice(EVIL_VALUES)
    elif kind == "copy":
        owner[key] = json.loads(json.dumps(parent_of(manifest, other)[other[-1]]))
    elif kind == "twice" and isinstance(owner, list):
        owner.append(owner[key])
    else:
        owner[key] = random.choice(EVIL_VALUES)


@mutation(signed=True)
def change_plan(folder: Path, random: Random) -> None:
    """Values that are allowed, but are not those the model was saved with."""
    manifest = read_manifest(folder)
    plan = random.choice(list(manifest["targets"].values()))["plan"]
    names = [*plan["layers"], "", "pool", "relu1", "no.such.layer", "training", "__class__", "forward"]
    layer = random.choice(list(plan["layers"].values()))
    for _ in range(random.choice([1, 1, 2])):
        change = random.choice(
            [
                lambda: plan.update(flow=random.choice(["fx", "eager"])),
                lambda: plan.update(backend=random.choice(["x86", "fbgemm", "onednn", "qnnpack"])),
                lambda: plan.update(recipe=random.choice(["qat", "ptq", "dynamic"])),
                lambda: plan.update(observer=random.choice([None, "histogram", "minmax", "moving_average", "percentile", "entropy"])),
                lambda: plan.update(float_modules=random.sample(names, random.randrange(4))),
                lambda: plan.update(fuse=[random.sample(names, random.randrange(4)) for _ in range(random.randrange(3))]),
                lambda: plan.update(constants=random.sample(["x", "mask", "self", "__class__", "args"], random.randrange(3))),
                lambda: plan["layers"].pop(random.choice(list(plan["layers"])), None),
                lambda: plan["layers"].update({random.choice(names): layer}),
                lambda: layer.update(per_channel=not layer["per_channel"]),
                lambda: layer["kernel"].update(activation_bits=random.choice([7, 8])),
                lambda: layer["kernel"].update(engine=random.choice(["x86", "fbgemm", "onednn", "qnnpack"])),
                lambda: manifest["targets"].update({random.choice(names): {"plan": plan, "inputs": None}}),
            ]
        )
        if plan["layers"]:
            change()
    sign_manifest(folder, manifest)


@mutation(signed=True)
def fill_manifest(folder: Path, random: Random) -> None:
    """As much of something as a manifest of the largest size can hold."""
    manifest = read_manifest(folder)
    entry = random.choice(list(manifest["targets"].values()))
    plan = entry["plan"]
    layer = next(iter(plan["layers"].values()))
    fill = random.choice(
        [
            lambda: manifest["metrics"].update({f"figure {i}": 0.5 for i in range(100_000)}),
            lambda: entry.update(inputs=[{"name": "x", "dtype": "float32", "shape": [1]}] * 50_000),
            lambda: entry.update(inputs=[{"name": "x", "dtype": "float32", "shape": [1] * 1_000_000}]),
            lambda: plan.update(float_modules=["fc"] * 500_000),
            lambda: plan.update(constants=["x"] * 500_000),
            lambda: plan.update(fuse=random.choice([[[]] * 500_000, [["fc"]] * 400_000, [["fc"] * 500_000]])),
            lambda: plan["layers"].update({f"fc{i}": layer for i in range(30_000)}),
            lambda: manifest["targets"].update({f"fc{i}": entry for i in range(3_000)}),
            lambda: manifest["cpu"].update(name="A" * 3_900_000),
            lambda: manifest["cpu"].update(features=["avx2"] * 400_000),
        ]
    )
    fill()
    sign_manifest(folder, manifest)


@mutation(signed=True)
def name_another_file(folder: Path, random: Random) -> None:
    manifest = read_manifest(folder)
    name = weights_of(folder).name
    entry, rest = manifest["files"].pop(name), manifest["files"]
    outside = folder.parent / name
    if random.random() < 0.5:
        outside.write_bytes((folder / name).read_bytes())
    other = random.choice([*EVIL_NAMES, f"../{name}", str(outside), f"./{name}", f"x/../{name}", name.upper(), f"{name}\x00"])
    manifest["files"] = {**random.choice([{other: entry}, {name: entry, other: entry}, {other: entry, name: entry}]), **rest}
    sign_manifest(folder, manifest)


@mutation(signed=True)
def declare_a_size(folder: Path, random: Random) -> None:
    """A size of the file that is huge, with a sparse file that has it, or without."""
    manifest, path = read_manifest(folder), weights_of(folder)
    size = random.choice([2**40, 2**31, 2**63, 10**400, -1, 0, path.stat().st_size + 1])
    manifest["files"][path.name]["bytes"] = size
    sign_manifest(folder, manifest)
    if random.random() < 0.7 and 0 <= size <= 2**40:
        os.truncate(path, size)


@mutation(signed=True)
def flip_signed_weights(folder: Path, random: Random) -> None:
    content = weights_of(folder).read_bytes()
    end = header_end(content)
    start, stop = random.choice([(0, 8), (8, end), (end, len(content)), (end, len(content)), (0, len(content))])
    sign_weights(folder, flipped(content, random, start, stop))


@mutation(signed=True)
def truncate_signed_weights(folder: Path, random: Random) -> None:
    content = weights_of(folder).read_bytes()
    sign_weights(folder, content[: random.choice([0, 7, 8, header_end(content), random.randrange(len(content))])])


@mutation(signed=True)
def change_header(folder: Path, random: Random) -> None:
    content = weights_of(folder).read_bytes()
    end = header_end(content)
    header, data = json.loads(content[8:end]), content[end:]
    name = random.choice(list(header))
    kind = random.choice(["shape", "dtype", "offsets", "delete", "rename", "metadata", "anything", "swap", "length"])
    entry = header[name]
    if kind == "shape" and "shape" in entry:
        entry["shape"] = random.choice(
            [[], [0], [-1], [2**62, 4], [2**64], [10**30], [1] * 1000, entry["shape"][::-1], [1, *entry["shape"]]]
        )
    elif kind == "dtype" and "dtype" in entry:
        entry["dtype"] = random.choice(["F64", "F32", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "object", "", 7])
    elif kind == "offsets" and "data_offsets" in entry:
        entry["data_offsets"] = random.choice([[0, 0], [0, 2**63], [2**64 - 1, 2**64], [-1, 4], [5, 1], [0], [0, len(data)], None])
    elif kind == "delete":
        del header[name]
    elif kind == "rename":
        header[random.choice(["_target_", "__class__", "../x", "\x00", "conv1.weight", "fc.weight"])] = header.pop(name)
    elif kind == "metadata":
        header["__metadata__"] = random.choice([{"_target_": "os.system"}, {}, [], {"format": "tf"}, {"x": 1}])
    elif kind == "swap":
        other = random.choice(list(header))
        header[name], header[other] = header[other], header[name]
    else:
        header[name] = random.choice(EVIL_VALUES)
    text = json.dumps(header).encode()
    length = random.choice([0, 1, 2**63, 2**64 - 1, 100_000_000, len(text) + 1]) if kind == "length" else len(text)
    sign_weights(folder, struct.pack("<Q", length) + text + data)


@mutation(signed=True)
def change_values(folder: Path, random: Random) -> None:
    """Numbers that kernels do not expect: in scales, zero points and everything else."""
    path = weights_of(folder)
    tensors = safetensors.torch.load(path.read_bytes())
    grids = [name for name in tensors if "scale" in name or "zero_point" in name]
    for name in random.sample(grids, random.choice([1, 1, 2])) if random.random() < 0.8 else [random.choice(list(tensors))]:
        tensor, number = tensors[name], random.choice(EVIL_NUMBERS)
        if not tensor.is_floating_point():
            limits = torch.iinfo(tensor.dtype)
            number = int(min(max(number, limits.min), limits.max)) if number == number else 1
        tensor.view(-1)[random.randrange(tensor.numel()) :] = torch.tensor(number).to(tensor.dtype)
    sign_weights(folder, safetensors.torch.save(tensors))


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@mutation(signed=True)
def pickle_instead(folder: Path, random: Random) -> None:
    """A pickle, or an archive of ``torch.save`` with one, in the place of the weights or of the manifest."""
    malicious, file = Malicious(folder / "owned"), folder / "pickled"
    if random.random() < 0.5:
        torch.save({"conv1.weight": malicious}, file)
    else:
        file.write_bytes(pickle.dumps(malicious))
    content = file.read_bytes()
    file.unlink()
    if random.random() < 0.7:
        sign_weights(folder, content)
    else:
        (folder / MANIFEST).write_bytes(content)
