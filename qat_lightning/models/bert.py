"""BERT for sentence classification, by Hugging Face's transformers (extra ``text``)."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qat_lightning.errors import ConfigurationError

TINY: Mapping[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}


class BertNet(nn.Module):
    """A BERT encoder with a classification head.

    Args:
        num_classes: length of the output.
        path: local folder of a pretrained model, as ``save_pretrained`` writes it; None starts from random weights.
        config: arguments of ``transformers.BertConfig``, on top of a tiny model's; only without ``path``.

    Raises:
        ConfigurationError: transformers is not installed, ``path`` is no folder or comes with ``config``, or ``config`` has an unknown key.
    """

    def __init__(self, num_classes: int = 2, path: str | None = None, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        try:
            from transformers import BertConfig, BertForSequenceClassification
        except ImportError as error:
            raise ConfigurationError('BertNet needs transformers: pip install "qat-lightning[text]".') from error
        if path is None:
            settings = {**TINY, **(config or {}), "num_labels": num_classes}
            _refuse_unknown(settings, BertConfig().to_dict())
            self.bert: nn.Module = BertForSequenceClassification(BertConfig(**settings))
            return
        if config:
            raise ConfigurationError("Expected either `path` or `config`, but got both: a pretrained model has a config of its own.")
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ConfigurationError(f"`path={path}` is no folder: give one that `save_pretrained` has written.")
        # A folder of half-precision weights would train, and be quantized, in half precision.
        pretrained: nn.Module = BertForSequenceClassification.from_pretrained(folder, num_labels=num_classes, local_files_only=True)
        self.bert = pretrained.float()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        """Return logits ``(N, num_classes)`` for token ids ``(N, L)``, int64; the mask is 1 at tokens and 0 at padding."""
        logits: Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits
        return logits


def _refuse_unknown(settings: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Transformers keeps whatever it is given, a misspelt name too."""
    for name in settings.keys() - known.keys() - {"num_labels"}:
        close = difflib.get_close_matches(name, known, n=3) or sorted(known)
        raise ConfigurationError(f"`config` has the key {name!r}, which transformers.BertConfig does not have. Names are e.g. {close}.")
