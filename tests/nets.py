"""Networks and data as users bring them, small."""

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from qat_lightning import Call, StaticPTQ, calibrate, convert, prepare
from qat_lightning.models import Add

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class ModuleNet(nn.Module):
    """Every operation a module, as eager mode wants it: 4 layers with weights."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.add, self.pool, self.drop = Add(relu=True), nn.AdaptiveAvgPool2d(2), nn.Dropout(0.1)
        self.hidden, self.relu2, self.fc = nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)
        self.width = 8

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.add(self.bn2(self.conv2(x)), x)
        return self.fc(self.relu2(self.hidden(self.drop(torch.flatten(self.pool(x), 1)))))


class FunctionalNet(nn.Module):
    """Functional additions, concatenations, activations and dropout: 4 layers with weights."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.conv3 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = torch.cat([F.hardswish(self.conv2(x)), F.relu6(self.conv3(x)) + x], 1)
        return self.fc(F.dropout(x.mean((2, 3)), 0.5, self.training))


class BranchingNet(nn.Module):
    """Python control flow on a tensor: only eager mode takes it."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.pool, self.fc = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x):
        if x.shape[0] > 1000:
            x = x / 2
        return self.fc(torch.flatten(self.pool(self.relu(self.conv(x))), 1))


class BranchingAddition(BranchingNet):
    """Control flow and a functional addition: no flow takes it, and a trace cannot tell."""

    def forward(self, x):
        if x.shape[0] > 1000:
            x = x / 2
        x = self.relu(self.conv(x))
        return self.fc(torch.flatten(self.pool(x + x), 1))


class ManyInputs(nn.Module):
    """Two tensors, one of them token ids, keyword arguments, and a mapping with a tuple out: 3 layers with weights."""

    def __init__(self):
        super().__init__()
        self.emb, self.a, self.b, self.fc = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x, ids, *, mask=None, scale=2):
        h = F.relu(self.a(x)) + self.b(self.emb(ids))
        if mask is not None:
            h = h * mask
        return {"logits": self.fc(h) * scale, "rest": (h, ids)}


class ColourNet(nn.Sequential):
    """Images in colour: 2 layers with weights."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class MappingInput(nn.Module):
    """A mapping in, a tuple out: 2 layers with weights."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, batch):
        h = self.a(batch["x"]).relu()
        return h, self.b(h)


class TrainingBranch(nn.Module):
    """One graph for training, another for evaluation."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        y = self.fc(x)
        return y.tanh() if self.training else y


class Recurrent(nn.Module):
    """LSTM, GRU and Linear, for dynamic quantization: 3 layers with weights."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.fc = nn.LSTM(8, 16, batch_first=True), nn.GRU(16, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.gru(self.lstm(x)[0])[0][:, -1])


class Images(LightningDataModule):
    """96 images of 1x8x8 whose class is the brightest quarter."""

    def __init__(self, batch_size=16):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(96) % 4
        self.images = torch.randn(96, 1, 8, 8, generator=generator)
        for index, label in enumerate(self.labels.tolist()):
            row, column = 4 * (label // 2), 4 * (label % 2)
            self.images[index, :, row : row + 4, column : column + 4] += 1.5
        self.batch_size = batch_size

    def loader(self, **options):
        return DataLoader(TensorDataset(self.images, self.labels), batch_size=self.batch_size, **options)

    def train_dataloader(self):
        return self.loader(shuffle=True)

    val_dataloader = test_dataloader = predict_dataloader = loader


class Plain(LightningModule):
    """A LightningModule with a network, a metric and a loss as children."""

    def __init__(self, net=None, lr=0.02):
        super().__init__()
        self.net = net if net is not None else ModuleNet()
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.loss = nn.CrossEntropyLoss()
        self.lr = lr

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(self.net(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("test/acc", self.accuracy)

    def predict_step(self, batch, batch_idx=0):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Disturb(Callback):
    """Moves the student away from its teacher, once that is made, by far more than rounding does."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step or batch_idx:
            return
        generator = torch.Generator().manual_seed(5)
        for parameter in pl_module.net.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.2 * parameter.detach().abs().mean() * noise


def fit(callback, module=None, data=None, watching=(), **trainer):
    """Fit a module with a callback, and others that run after it; returns the module and its Trainer."""
    module = Plain() if module is None else module
    trainer = Trainer(**{"max_epochs": 2, "callbacks": [callback, *watching], **QUIET, **trainer})
    trainer.fit(module, Images() if data is None else data)
    return module, trainer


def static_int8(net, x, **settings):
    """Return the net quantized statically: calibrated with one tensor, or with one :class:`Call`."""
    call = x if isinstance(x, Call) else Call((x,), {})
    return convert(calibrate(prepare(net.eval(), StaticPTQ(**settings), example=call), [call]))
