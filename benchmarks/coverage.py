"""Which networks of torchvision each flow and recipe takes: ``python -m benchmarks.coverage``.

Each network has random weights, BatchNorm statistics of random images, and a size of image that suits it. A cell works where int8 differs
from fake-quant by no more than one step at any layer, and its outputs from those of fake-quant (QAT) or float by less than these vary:
random weights in depth amplify rounding. It is refused where the package raises an error of its own, whose first sentence the table shows;
anything else is wrong. Each cell runs in a process of its own, and those that are in the JSON file already are not repeated.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.runs import ROOT
from qat_lightning import (
    QAT,
    Call,
    DynamicPTQ,
    QuantizationError,
    StaticPTQ,
    calibrate,
    convert,
    measure_parity,
    prepare,
    quantize_dynamic,
    reestimate_batch_norm,
)
from qat_lightning.observers import apply_phase
from qat_lightning.schedule import IDLE, Phase

# Name in torchvision, size of image, and arguments: without auxiliary classifiers, which no recipe trains.
NETWORKS: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (64, {}),
    "resnext50_32x4d": (64, {}),
    "wide_resnet50_2": (64, {}),
    "mobilenet_v2": (64, {}),
    "mobilenet_v3_small": (64, {}),
    "shufflenet_v2_x1_0": (64, {}),
    "squeezenet1_1": (64, {}),
    "vgg11_bn": (64, {}),
    "densenet121": (64, {}),
    "googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "inception_v3": (96, {"aux_logits": False, "init_weights": False}),
    "efficientnet_b0": (64, {}),
    "regnet_y_400mf": (64, {}),
    "convnext_tiny": (64, {}),
    "vit_b_16": (64, {"image_size": 64}),
    "swin_t": (64, {}),
    "mnasnet1_0": (64, {}),
}
FLOWS = ("fx", "eager", "pt2e")
RECIPES = {"ptq": StaticPTQ, "qat": QAT, "dynamic": DynamicPTQ}
LEARNING = Phase(fake_quant=True, observers=True, bn_frozen=False)
MOST_ERROR = 1.0


def quantize(name: str, flow: str, recipe: str) -> dict[str, Any]:
    """Return what became of one cell: ``status``, ``reason``, ``steps`` and ``error``."""
    torch.manual_seed(0)
    size, arguments = NETWORKS[name]
    net = torchvision.models.get_model(name, weights=None, num_classes=10, **arguments).eval()
    batches = [torch.randn(4, 3, size, size) for _ in range(3)]
    reestimate_batch_norm(net, batches)
    net.eval()
    try:
        prepared, int8 = _models(net, RECIPES[recipe](flow=flow), batches)  # type: ignore[arg-type]
        with torch.inference_mode():
            expected, output = (net if prepared is None or recipe == "ptq" else prepared)(batches[0]), int8(batches[0])
            int8(batches[0][:1])  # the last batch may be smaller
            steps = 0 if prepared is None else max(layer.max_steps for layer in measure_parity(prepared, int8, batches[:1]))
    except QuantizationError as error:
        return {"status": "refused", "reason": f"{error}".partition(". ")[0]}
    error_ratio = relative_error(output, expected)
    works = steps <= 1 and error_ratio < MOST_ERROR
    reason = "" if works else f"int8 differs by {steps} steps at a layer, its outputs by {error_ratio:.2f}"
    return {"status": "works" if works else "wrong", "reason": reason, "steps": steps, "error": round(error_ratio, 4)}


def _models(net: nn.Module, recipe: Any, batches: Sequence[Tensor]) -> tuple[nn.Module | None, nn.Module]:
    """Return the fake-quantized network, where there is one, and the int8 network."""
    if isinstance(recipe, DynamicPTQ):
        return None, quantize_dynamic(net, recipe)
    prepared = prepare(net, recipe, example=Call((batches[0],), {}))
    if isinstance(recipe, StaticPTQ):
        calibrate(prepared, batches)
        return prepared, convert(prepared)
    optimizer = torch.optim.SGD(prepared.train().parameters(), lr=1e-3)
    apply_phase(prepared, LEARNING)
    for batch in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(prepared(batch), torch.arange(len(batch))).backward()
        optimizer.step()
    apply_phase(prepared.eval(), IDLE)
    return prepared, convert(prepared)


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference over the deviation of ``expected``."""
    return float((output - expected).square().mean().sqrt() / expected.std().clamp(min=1e-12))


def run_cell(cell: str, time_limit: float) -> dict[str, Any]:
    """Run one cell in a process of its own."""
    start = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.coverage", "--cell", cell]
    try:
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=time_limit)
        found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        found = {"status": "wrong", "reason": f"not done after {time_limit:.0f} s"}
    except (IndexError, ValueError):
        found = {"status": "wrong", "reason": (finished.stderr.strip().splitlines() or ["no output"])[-1]}
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Return the cells as Markdown: a row for each network, then how many work and why others are refused."""
    columns = [f"{flow} {recipe}" for flow in FLOWS for recipe in RECIPES]
    names = list(dict.fromkeys(cell.split()[0] for cell in cells))
    lines = ["| network | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        statuses = [cells.get(f"{name} {column}", {}).get("status", "") for column in columns]
        lines.append(f"| `{name}` | " + " | ".join(statuses) + " |")
    for flow in FLOWS:
        those = [found for cell, found in cells.items() if cell.split()[1] == flow]
        if those:
            counts = {status: sum(found["status"] == status for found in those) for status in ("works", "refused", "wrong")}
            lines.append(
                f"\n`{flow}`: {counts['works']} of {len(those)} work, {counts['refused']} are refused, {counts['wrong']} are wrong."
            )
    lines += [f"\n- {cell}: {found['status']}, {found['reason']}" for cell, found in cells.items() if found["status"] != "works"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--flows", nargs="+", default=list(FLOWS), choices=FLOWS)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds for a cell")
    parser.add_argument("--json", type=Path, default=Path("outputs/coverage.json"))
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.cell:
        torch.set_num_threads(1)
        print(json.dumps(quantize(*chosen.cell.split())))
        return
    cells = json.loads(chosen.json.read_text()) if chosen.json.is_file() else {}
    for cell in (f"{name} {flow} {recipe}" for name in chosen.networks for flow in chosen.flows for recipe in chosen.recipes):
        if cell not in cells:
            cells[cell] = run_cell(cell, chosen.time_limit)
            chosen.json.parent.mkdir(parents=True, exist_ok=True)
            chosen.json.write_text(json.dumps(cells, indent=2) + "\n")
            print(f"{cell}: {cells[cell]['status']} {cells[cell]['reason']}", file=sys.stderr)
    print(table(cells))


if __name__ == "__main__":
    main()
