import re

import pytest
import torch
from torch import nn

from qat_lightning.errors import ConfigurationError
from qat_lightning.models import Add, BertNet, CifarResNet, Classifier, RowLSTM, torchvision_net

NETWORKS = ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small"]


@pytest.mark.parametrize("relu", [False, True])
def test_add(relu):
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(Add(relu)(a, b), (a + b).relu() if relu else a + b)


@pytest.mark.parametrize(("depth", "layers"), [(8, 10), (20, 22), (32, 34)])
def test_resnet_has_its_depth_and_two_shortcuts(depth, layers):
    net = CifarResNet(depth, in_channels=1, num_classes=7)
    assert sum(isinstance(child, nn.Conv2d | nn.Linear) for child in net.modules()) == layers
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_resnet_refuses_other_depths(depth):
    with pytest.raises(ValueError, match=f"6n \\+ 2.*got {depth}"):
        CifarResNet(depth)


def test_lstm_reads_rows():
    assert RowLSTM(in_channels=2, width=5, num_classes=3)(torch.randn(4, 2, 6, 5)).shape == (4, 3)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_torchvision_network_for_any_data(name, in_channels):
    net = torchvision_net(name, num_classes=5, in_channels=in_channels).eval()
    assert net(torch.randn(1, in_channels, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("prefix", ["", "net."])
def test_torchvision_weights_from_a_file(prefix, tmp_path):
    source = torchvision_net("mobilenet_v3_small", num_classes=4)
    weights = {f"{prefix}{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"state_dict": weights} if prefix else weights, tmp_path / "weights.pt")
    loaded = torchvision_net("mobilenet_v3_small", num_classes=4, weights=str(tmp_path / "weights.pt"))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet19"}, "`name`.*'resnet19'"),
        ({"name": "resnet18", "weights": "IMAGENET"}, "`weights` of resnet18.*IMAGENET1K_V1.*'IMAGENET'"),
        ({"name": "resnet18", "weights": "missing.pt"}, "no file .*missing.pt"),
    ],
)
def test_torchvision_errors(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        torchvision_net(**arguments)


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet"])
def test_torchvision_networks_with_other_heads(name):
    net = torchvision_net(name, num_classes=5, in_channels=1).train()
    assert net(torch.randn(2, 1, 64, 64)).shape == (2, 5)


def test_torchvision_weights_of_another_shape(tmp_path):
    torch.save(torchvision_net("mobilenet_v3_small", num_classes=4).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ConfigurationError, match=re.compile("do not fit.*(Missing key|size mismatch)", re.DOTALL)):
        torchvision_net("resnet18", num_classes=4, weights=str(tmp_path / "weights.pt"))


def test_torchvision_weights_of_another_class_count_and_of_colour(tmp_path, caplog):
    source = torchvision_net("mobilenet_v3_small", num_classes=4)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    net = torchvision_net("mobilenet_v3_small", num_classes=5, in_channels=1, weights=str(tmp_path / "weights.pt"))
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert torch.equal(net.classifier[0].weight, source.classifier[0].weight)
    torch.testing.assert_close(net.features[0][0].weight, source.features[0][0].weight.sum(1, keepdim=True))
    assert "the last layer is new" in caplog.text


def test_bert_from_a_config_and_from_a_folder(tmp_path):
    pytest.importorskip("transformers")
    net = BertNet(num_classes=2, config={"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}).eval()
    net.bert.save_pretrained(tmp_path)
    ids = torch.randint(0, 50, (3, 7))
    assert torch.equal(BertNet(num_classes=2, path=str(tmp_path)).eval()(ids), net(ids, attention_mask=torch.ones_like(ids)))


def test_bert_is_single_precision_whatever_the_folder_holds(tmp_path):
    pytest.importorskip("transformers")
    net = BertNet(config={"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16})
    net.bert.half().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in BertNet(path=str(tmp_path)).parameters()} == {torch.float32}


def test_bert_names_a_misspelt_setting():
    pytest.importorskip("transformers")
    with pytest.raises(ConfigurationError, match=r"`config` has the key 'hiden_size'.*'hidden_size'"):
        BertNet(config={"hiden_size": 16})


def test_bert_refuses_a_missing_folder():
    pytest.importorskip("transformers")
    with pytest.raises(ConfigurationError, match="`path=nowhere` is no folder"):
        BertNet(path="nowhere")


@pytest.mark.parametrize(
    "batch",
    [
        torch.randn(4, 6),
        (torch.randn(4, 6), torch.zeros(4, dtype=torch.long)),
        {"input": torch.randn(4, 6), "labels": torch.zeros(4, dtype=torch.long)},
    ],
    ids=["tensor", "tuple", "mapping"],
)
def test_classifier_predicts_labelled_and_unlabelled_batches(batch):
    assert Classifier(nn.Linear(6, 3), num_classes=3).predict_step(batch).shape == (4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, "`lr` to be positive, but got -0.1"),
        ({"lr": "fast"}, TypeError, "`lr` to be a number, but got 'fast'"),
        ({"label_smoothing": 1}, ValueError, r"`label_smoothing` to be in \[0, 1\), but got 1"),
        ({"label_smoothing": True}, TypeError, "`label_smoothing`.*True"),
        ({"num_classes": 0}, ValueError, "`num_classes` to be at least 2"),
    ],
)
def test_classifier_checks_its_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Classifier(nn.Linear(6, 3), **{"num_classes": 3, **arguments})


def test_classifier_names_a_network_of_another_width():
    with pytest.raises(ConfigurationError, match="returns 3 numbers a sample, but `num_classes=4`"):
        Classifier(nn.Linear(6, 3), num_classes=4).training_step((torch.randn(4, 6), torch.zeros(4).long()), 0)
