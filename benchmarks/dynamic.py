"""Dynamic quantization of the ready-made LSTM and of a small BERT, with several seeds: ``python -m benchmarks.dynamic``.

The LSTM reads the digits of scikit-learn row by row. BERT reads sentences that this benchmark makes: words of praise and blame, some behind
a "not", which turns them round, and a twentieth of the labels wrong. Both are too small for int8 to be faster: a second table has the
speed-up of untrained layers of the usual width, batch 1 and one thread.
"""

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import BertConfig, BertModel

from benchmarks.runs import train
from qat_lightning import DynamicPTQ, quantize_dynamic
from qat_lightning.evaluation import interleaved_medians

GOOD = ("good", "great", "fine", "lovely", "clever", "warm", "fresh", "sharp")
BAD = ("bad", "dull", "poor", "ugly", "silly", "cold", "stale", "flat")
OTHER = tuple(f"{noun}{number}" for noun in ("film", "plot", "scene", "actor", "music") for number in range(20))
WRONG = 0.05
BERT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
HEADER = (
    "| model, backend | float | int8 (by seed) | difference | MB float | MB int8 | if int8 weights take a byte | speed-up |\n"
    "|---|---|---|---|---|---|---|---|"
)

SPEED_HEADER = "| layers, backend | ms float | ms int8 | speed-up |\n|---|---|---|---|"


def sentence(chance: random.Random) -> str:
    """Return a line of a TSV file: words, and 1 where praise prevails."""
    words, balance = [], 0
    for _ in range(chance.choice((1, 3, 5))):
        praise, turned = chance.random() < 0.5, chance.random() < 0.3
        balance += 1 if praise != turned else -1
        words += [*chance.sample(OTHER, 2), *(["not"] if turned else []), chance.choice(GOOD if praise else BAD)]
    label = int(balance > 0) if chance.random() >= WRONG else int(balance <= 0)
    return f"{' '.join(words)}\t{label}"


def write_sentences(folder: Path, train_count: int, test_count: int) -> None:
    """Write ``train.tsv`` and ``dev.tsv``."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    for name, count in (("train", train_count), ("dev", test_count)):
        lines = [sentence(chance) for _ in range(count)]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")


def int8_weights(run: Path) -> int:
    """Return how many weights the int8 model of a run has in int8."""
    (file,) = (run / "int8").glob("weights-*.safetensors")
    return sum(tensor.numel() for tensor in safetensors.torch.load_file(file).values() if tensor.dtype == torch.int8)


def row(name: str, reports: Sequence[dict[str, Any]], weights: int) -> str:
    """Return the row of one model on one backend, with this many weights in int8."""
    floats, int8 = ([100 * report[column]["accuracy"] for report in reports] for column in ("float", "int8"))
    size = [reports[0][column]["size_bytes"] / 1e6 for column in ("float", "int8")]
    expected = size[0] - 3 * weights / 1e6
    speedup = statistics.median(report["speedup"] for report in reports)
    seeds = ", ".join(f"{one:.2f}" for one in int8)
    difference = statistics.mean(int8) - statistics.mean(floats)
    return (
        f"| {name} | {statistics.mean(floats):.2f} | {statistics.mean(int8):.2f} ({seeds}) | {difference:+.2f} "
        f"| {size[0]:.3f} | {size[1]:.3f} | {expected:.3f} | {speedup:.2f} x |"
    )


def speed_rows(backends: Sequence[str]) -> list[str]:
    """Return a row for a wide LSTM and wide BERT layers on each backend; their latency does not depend on the weights."""
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=256, num_hidden_layers=2)).eval()
    wide: dict[str, tuple[torch.nn.Module, torch.Tensor]] = {
        "LSTM, width 512, 32 steps": (torch.nn.Sequential(torch.nn.LSTM(512, 512, batch_first=True)).eval(), torch.randn(1, 32, 512)),
        "2 BERT layers, width 768, 128 tokens": (bert, torch.randint(256, (1, 128))),
    }
    rows = []
    for name, (module, x) in wide.items():
        for backend in backends:
            int8 = quantize_dynamic(module, DynamicPTQ(backend=backend))  # type: ignore[arg-type]
            with torch.inference_mode():
                float_ms, int8_ms = interleaved_medians([partial(module, x), partial(int8, x)])
            rows.append(f"| {name}, {backend} | {float_ms:.2f} | {int8_ms:.2f} | {float_ms / int8_ms:.2f} x |")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and print the tables; ``OUT/dynamic.json`` has the reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", default=["lstm", "bert"], choices=["lstm", "bert"])
    parser.add_argument("--backends", nargs="+", default=["x86", "qnnpack"])
    parser.add_argument("--sentences", type=int, default=3000, help="for training; half as many for the test")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/benchmark_dynamic"), help="folder of the runs; those that are done are kept"
    )
    parser.add_argument("overrides", nargs="*", help="of train.py, after --")
    chosen = parser.parse_args(arguments)
    data = (chosen.out / "sentences").resolve()
    write_sentences(data, chosen.sentences, chosen.sentences // 2)
    config = [f"+model.net.config.{name}={value}" for name, value in BERT.items()]
    bert = ["model=bert", *config, "data=sst2", f"data.root={data}", "data.vocab_size=256", "trainer.max_epochs=6"]
    settings = {"lstm": ["model=lstm"], "bert": bert}
    reports: dict[str, list[dict[str, Any]]] = {}
    weights: dict[str, int] = {}
    for model in chosen.models:
        for backend in chosen.backends:
            overrides = [*settings[model], f"quant/backend={backend}", *chosen.overrides]
            reports[f"{model}, {backend}"] = [
                train(chosen.out / f"{model}-{backend}-{seed}", "dynamic", seed, overrides) for seed in chosen.seeds
            ]
            weights[f"{model}, {backend}"] = int8_weights(chosen.out / f"{model}-{backend}-{chosen.seeds[0]}")
    (chosen.out / "dynamic.json").write_text(json.dumps(reports, indent=2) + "\n")
    print("\n".join([HEADER, *(row(name, those, weights[name]) for name, those in reports.items())]))
    print("\n".join(["", SPEED_HEADER, *speed_rows(chosen.backends)]))


if __name__ == "__main__":
    main()
