import pytest
import torch
from torch import nn

from qat_lightning import QAT, ConfigurationError, QuantizationCallback, prepare
from qat_lightning.fusion import find_groups
from tests.nets import BranchingNet, FunctionalNet, ModuleNet, Plain, fit

SEQUENCES = {
    "conv-bn": [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)],
    "conv-bn-relu": [nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.ReLU()],
    "conv-relu": [nn.Conv3d(1, 2, 3), nn.ReLU()],
    "linear-relu": [nn.Linear(2, 2), nn.ReLU()],
    "bn-relu": [nn.BatchNorm2d(2), nn.ReLU()],
}


@pytest.mark.parametrize("layers", SEQUENCES.values(), ids=SEQUENCES)
def test_groups_of_the_tutorials_are_found(layers):
    assert find_groups(nn.Sequential(*layers)) == [tuple(str(index) for index in range(len(layers)))]


def test_groups_follow_the_data_not_the_order_of_registration():
    assert find_groups(ModuleNet()) == [("conv1", "bn1", "relu1"), ("conv2", "bn2"), ("hidden", "relu2")]


def test_a_module_that_is_used_twice_is_not_fused():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.relu = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.ReLU()

        def forward(self, x):
            return self.relu(self.conv2(self.relu(self.conv1(x))))

    assert find_groups(Shared()) == []


def test_an_output_that_is_used_twice_is_not_fused():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)

        def forward(self, x):
            y = self.conv(x)
            return y, self.bn(y)

    assert find_groups(Forked()) == []


def test_other_layers_are_not_fused():
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.GELU(), nn.ReLU()]
    assert find_groups(nn.Sequential(*layers)) == []


def test_without_a_trace_sequences_are_fused():
    net = BranchingNet()
    net.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    assert find_groups(net) == [("body.0", "body.1", "body.2")]


@pytest.mark.parametrize("groups", [[["conv1", "bn1", "relu1"]], [["net.conv1", "net.bn1"], ["net.hidden", "net.relu2"]]])
def test_the_explicit_list_of_the_tutorials(groups):
    module, _ = fit(QuantizationCallback(QAT(flow="eager", fuse=groups)), max_epochs=1)
    fused = [name for name, child in module.net.named_modules() if "BnReLU" in type(child).__name__ or "ReLU" in type(child).__name__]
    assert "conv1" in fused if len(groups) == 1 else "hidden" in fused
    assert type(module.net.bn2) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["conv1", "bn7"]], r"\['conv1', 'bn7'\], but there is no module 'bn7'"),
        ([["conv1", "fc"]], r"types \['Conv2d', 'Linear'\], which cannot be fused: use Conv-BN"),
        ([["conv1", "bn1"], ["bn1", "relu1"]], "'bn1' in two groups"),
    ],
)
def test_wrong_groups(groups, message):
    with pytest.raises(ConfigurationError, match=message):
        prepare(ModuleNet(), QAT(flow="eager", fuse=groups))


def test_a_wrong_group_is_refused_before_training():
    with pytest.raises(ConfigurationError, match="no module 'bn7'"):
        fit(QuantizationCallback(QAT(flow="eager", fuse=[["conv1", "bn7"]])), Plain())


def test_functional_networks_have_no_groups_across_functions():
    assert find_groups(FunctionalNet()) == [("conv1", "bn1")]
    assert torch.is_tensor(FunctionalNet()(torch.randn(2, 1, 4, 4)))
