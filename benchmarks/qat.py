"""Quantization-aware training with several seeds, and what each default buys: ``python -m benchmarks.qat`` in the root of the repository.

What follows ``--`` goes to ``train.py``: the model, the data, how long. Each run is a process of its own.

    python -m benchmarks.qat --seeds 0 1 2 --ablation --out runs -- model=custom model.net._target_=my_package.MyNet
        'allowed_targets=[my_package]' data=imagefolder data.root=images data.num_classes=10 quant.float_epochs=0 trainer.max_epochs=2
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.runs import train

DEFAULTS = "defaults"
ABLATIONS: dict[str, list[str]] = {
    DEFAULTS: [],
    "learns from labels, at a hundredth of the learning rate": ["quant.distillation=0"],
    "ranges follow the training until 60 % of it": ["quant.freeze_observers.fraction=0.6"],
    "... and start with the first batch": ["quant.freeze_observers.fraction=0.6", "quant.calibration_batches=0"],
    "ranges calibrated by minima and maxima": ["quant.observer=minmax"],
    "biases not corrected": ["quant.bias_correction=false"],
    "BatchNorm freezes halfway": ["quant.freeze_bn.fraction=0.5"],
    "one weight scale per tensor": ["quant.per_channel=false"],
}


@dataclass(frozen=True)
class Row:
    """The outcome of one variant.

    Args:
        name: of the variant.
        float32: accuracy of the float model in percent.
        int8: accuracy in percent, for each seed.
    """

    name: str
    float32: float
    int8: tuple[float, ...]

    def to_markdown(self) -> str:
        """Return a row of the table."""
        mean, seeds = statistics.mean(self.int8), ", ".join(f"{one:.2f}" for one in self.int8)
        return f"| {self.name} | {self.float32:.2f} | {mean:.2f} ({seeds}) | {mean - self.float32:+.2f} |"


def measure(name: str, index: int, seeds: Sequence[int], out: Path, overrides: Sequence[str]) -> Row:
    """Return the row of one variant."""
    reports = [train(out / f"variant{index}-seed{seed}", "qat", seed, [*overrides, *ABLATIONS[name]]) for seed in seeds]
    return Row(name, 100 * reports[0]["float"]["accuracy"], tuple(100 * report["int8"]["accuracy"] for report in reports))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the variants and print the table; ``OUT/qat.json`` has the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each")
    parser.add_argument("--ablation", action="store_true", help="also without each of the defaults")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_qat"), help="folder of the runs; those that are done are kept")
    parser.add_argument("overrides", nargs="*", help="of train.py, after --")
    chosen = parser.parse_args(arguments)
    console, rows = Console(stderr=True), []
    for index, name in enumerate(ABLATIONS if chosen.ablation else [DEFAULTS]):
        with console.status(f"{name}: {len(chosen.seeds)} run(s)"):
            rows.append(measure(name, index, chosen.seeds, chosen.out, chosen.overrides))
        console.print(rows[-1].to_markdown())
    (chosen.out / "qat.json").write_text(json.dumps([vars(row) for row in rows], indent=2) + "\n")
    print("\n".join(["| QAT | float | int8 (by seed) | difference |", "|---|---|---|---|", *(row.to_markdown() for row in rows)]))


if __name__ == "__main__":
    main()
