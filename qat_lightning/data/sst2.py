"""Sentences with a sentiment, as tab-separated files of the GLUE benchmark."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from qat_lightning.data.base import SplitData, split_indices
from qat_lightning.errors import ConfigurationError
from qat_lightning.recipe import check_count

HEADER = ["sentence", "label"]
PADDING, UNKNOWN = 0, 1

Encode = Callable[[str], list[int]]


class SST2Data(SplitData):
    """The Stanford Sentiment Treebank, or any data in its format: ``train.tsv`` and ``dev.tsv`` with the columns sentence and label.

    ``dev.tsv`` is the test set, since the test labels of GLUE are not public; validation data is held out from ``train.tsv``.

    Args:
        root: folder of the files.
        tokenizer: local folder of a tokenizer of transformers; None splits at spaces and takes the words of ``train.tsv``.
        vocab_size: words of that vocabulary at most, padding and unknown counted.
        max_length: tokens of a sentence at most.
        batch_size: sentences per batch.
        num_workers: processes that load data.
        seed: of the split.
        val_fraction: part of the training data held out for validation.
        num_classes: number of labels.
    """

    def __init__(
        self,
        root: str | Path,
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        max_length: int = 64,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        num_classes: int = 2,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, num_classes)
        check_count("vocab_size", vocab_size, minimum=3)
        check_count("max_length", max_length, minimum=1)
        self.root = Path(root).expanduser()
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.val_fraction = val_fraction

    def setup(self, stage: str) -> None:
        """Read the files and number the words."""
        train, test = read_tsv(self.root / "train.tsv"), read_tsv(self.root / "dev.tsv")
        self._check_classes(range(1 + max(label for _, label in train + test)), str(self.root))
        encode = self._pretrained() if self.tokenizer else _vocabulary([sentence for sentence, _ in train], self.vocab_size)
        data = _Sentences(train, encode, self.max_length)
        kept, held_out = split_indices(len(data), self.val_fraction, self.seed)
        self.train_set, self.calibration_set, self.val_set = Subset(data, kept), Subset(data, kept), Subset(data, held_out)
        self.test_set = _Sentences(test, encode, self.max_length)

    def _pretrained(self) -> Encode:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ConfigurationError('`tokenizer` needs transformers: pip install "qat-lightning[text]".') from error
        if not Path(str(self.tokenizer)).is_dir():
            raise ConfigurationError(f"`tokenizer={self.tokenizer}` is no folder: give one that `save_pretrained` has written.")
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer, local_files_only=True)
        return lambda sentence: list(tokenizer(sentence, truncation=True, max_length=self.max_length)["input_ids"])

    def _loader(self, data: Dataset[Any], **options: Any) -> DataLoader[Any]:
        return super()._loader(data, collate_fn=_collate, **options)


def read_tsv(path: Path) -> list[tuple[str, int]]:
    """Return sentences and labels.

    Raises:
        ConfigurationError: no file, another header, no row, or a row without a label; names the line.
    """
    if not path.is_file():
        raise ConfigurationError(f"{path} is missing: `root` needs train.tsv and dev.tsv with the columns {HEADER}.")
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    if not lines or lines[0].split("\t") != HEADER:
        raise ConfigurationError(
            f"{path}: expected the header {HEADER} in line 1, but got {lines[0].split(chr(9)) if lines else 'an empty file'}."
        )
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        sentence, _, label = line.partition("\t")
        if not sentence.strip() or not label.strip().isdecimal():
            raise ConfigurationError(f"{path}, line {number}: expected a sentence, a tab and a label such as 0 or 1, but got {line!r}.")
        rows.append((sentence, int(label)))
    if not rows:
        raise ConfigurationError(f"{path} has a header but no sentences.")
    return rows


class _Sentences(Dataset[tuple[list[int], int]]):
    def __init__(self, rows: Sequence[tuple[str, int]], encode: Encode, max_length: int) -> None:
        self.samples = [(encode(sentence)[:max_length], label) for sentence, label in rows]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[list[int], int]:
        return self.samples[index]


def _vocabulary(sentences: Sequence[str], size: int) -> Encode:
    counts = Counter(word for sentence in sentences for word in sentence.lower().split())
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: size - 2]
    numbers = {word: number for number, word in enumerate(ranked, start=2)}
    return lambda sentence: [numbers.get(word, UNKNOWN) for word in sentence.lower().split()]


def _collate(samples: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
    length = max(len(tokens) for tokens, _ in samples)
    tokens = torch.tensor([tokens + [PADDING] * (length - len(tokens)) for tokens, _ in samples])
    mask = torch.tensor([[1] * len(tokens) + [0] * (length - len(tokens)) for tokens, _ in samples])
    return {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([label for _, label in samples])}
