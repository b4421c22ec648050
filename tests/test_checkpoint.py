import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from qat_lightning.checkpoint import load_float_weights
from qat_lightning.errors import ConfigurationError


class Model(LightningModule):
    def __init__(self, late=False, width=3):
        super().__init__()
        self.width = width
        self.net = None if late else self.build()

    def build(self):
        return nn.Sequential(nn.Linear(2, self.width), nn.BatchNorm1d(self.width))

    def configure_model(self):
        if self.net is None:
            self.net = self.build()


def save(content, folder):
    torch.save(content, folder / "weights.pt")
    return folder / "weights.pt"


@pytest.mark.parametrize(
    "content",
    [
        lambda model: {"state_dict": model.state_dict(), "epoch": 3},
        lambda model: model.state_dict(),
        lambda model: model.net.state_dict(),
        lambda model: {"state_dict": model.net.state_dict()},
        lambda model: {name: value for name, value in model.net.state_dict().items() if "num_batches" not in name},
    ],
    ids=["lightning checkpoint", "module", "bare network", "wrapped bare network", "no batch counters"],
)
@pytest.mark.parametrize("late", [False, True], ids=["built in __init__", "built in configure_model"])
def test_every_kind_of_file(content, late, tmp_path):
    source, model = Model(), Model(late)
    load_float_weights(model, save(content(source), tmp_path))
    torch.testing.assert_close(model.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: Model(width=4).state_dict(), r"other shapes: net\.0\.weight is \(4, 2\), expected \(3, 2\)"),
        (lambda: {"net.0.weight": torch.zeros(3, 2)}, r"missing: net\.0\.bias"),
        (lambda: {**Model().state_dict(), "net.9.weight": torch.zeros(1)}, r"not in the model: net\.9\.weight"),
        (lambda: {f"other.{i}": torch.zeros(1) for i in range(9)}, "and 4 more"),
        (lambda: {}, "no state dict"),
        (lambda: {"state_dict": None}, "no state dict"),
        (lambda: torch.zeros(3), "no state dict"),
        (lambda: {"net": Model().net}, "weights alone"),
    ],
)
def test_what_does_not_fit_is_named(content, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        load_float_weights(Model(), save(content(), tmp_path))


def test_missing_file(tmp_path):
    with pytest.raises(ConfigurationError, match="is not a file"):
        load_float_weights(Model(), tmp_path / "none.ckpt")


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 half an archive"])
def test_broken_file(content, tmp_path):
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(ConfigurationError, match="weights alone"):
        load_float_weights(Model(), tmp_path / "weights.pt")
