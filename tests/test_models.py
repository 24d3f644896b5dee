"""What pkd.models promises: networks by name, from uint8 views to logits, exchangeable with plain torchvision."""

import copy
import json
import sys
import urllib.error
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from pkd.errors import UserError
from pkd.models import TORCHVISION_MODELS, Network, build, check_model, description
from pkd.norm import BatchNorm
from pkd.recipe import Model
from pkd.small_models import SMALL_MODELS
from pkd.vision import torchvision
from pkd.weights_file import described_by

RESNET_S = Model(name="pkd_resnet_s")


def _images(count, channels, height, width):
    return torch.randint(256, (count, channels, height, width), dtype=torch.uint8)


def _parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_small_models_take_small_images_and_learn_in_every_weight(name):
    for size, channels in ((8, 1), (8, 3), (16, 1), (28, 1), (28, 3), (32, 3)):
        network = build(Model(name=name), 5, channels, (size, size))
        logits = network(_images(4, channels, size, size))
        assert logits.shape == (4, 5)
        logits.square().sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        last = network.backbone.features(torch.zeros(2, channels, size, size)).shape[2]
        assert 2 <= last <= 8


def test_small_models_have_the_sizes_they_are_named_for():
    ranges = {"pkd_resnet_s": (35e3, 50e3), "pkd_resnet_m": (150e3, 190e3), "pkd_resnet_l": (650e3, 750e3),
              "pkd_mobile": (40e3, 60e3), "pkd_shuffle": (40e3, 60e3)}
    for name, (low, high) in ranges.items():
        full, half = (_parameters(build(Model(name=name, width=width), 10, 3, (32, 32))) for width in (1.0, 0.5))
        assert low < full < high and 1 / 4.2 < half / full < 1 / 3


@pytest.mark.parametrize("name", SMALL_MODELS)
@pytest.mark.parametrize("width", [0.25, 0.5, 1.0])
def test_gradients_are_the_same_channels_last(name, width):
    torch.manual_seed(0)
    plain = build(Model(name=name, width=width), 5, 1, (16, 16))
    last = copy.deepcopy(plain).use_channels_last()
    assert last.channels_last
    images = _images(32, 1, 16, 16)
    for network in (plain, last):
        network(images).square().mean().backward()
    for one, other in zip(plain.parameters(), last.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 0.02 * one.grad.norm() + 1e-3  # a rectifier may tip over


@pytest.mark.parametrize("features, stride, last", [(4, 2, False), (15, (2, 1), False), (4, 1, True), (16, 2, True)])
def test_a_network_whose_gradient_onednn_would_spoil_stays_as_it_is(features, stride, last):
    """Its issue 6035: wrong gradients, a crash or a hang, for 4 features with AVX2 in every run."""
    images, weight = torch.randn(32, features, 8, 8), torch.randn(8, features, 1, 1)
    backbone = nn.Sequential(nn.Conv2d(features, 8, 1, stride, bias=False))
    backbone[0].weight.data.copy_(weight)
    network = Network(backbone, features, (8, 8), (0.0,) * features, (1.0,) * features).use_channels_last()
    assert network.channels_last == last
    network(255 * images).square().sum().backward()
    exact = weight.double().requires_grad_()
    nn.functional.conv2d(images.double(), exact, stride=stride).square().sum().backward()
    assert_close(backbone[0].weight.grad.double(), exact.grad, rtol=1e-3, atol=1e-2)


def test_weights_are_a_function_of_the_seed():
    def drawn(seed):
        torch.manual_seed(seed)
        return build(RESNET_S, 10, 1, (8, 8)).state_dict()
    assert_close(drawn(3), drawn(3), rtol=0, atol=0)
    assert not torch.equal(drawn(3)["backbone.head.weight"], drawn(4)["backbone.head.weight"])


def test_every_classifier_of_torchvision_is_known_by_name():
    assert len(TORCHVISION_MODELS) >= 80
    for name in TORCHVISION_MODELS:
        check_model(Model(name=name, weights="DEFAULT"))


@pytest.mark.parametrize(("name", "arguments", "side"), [
    ("resnet18", {}, 32), ("mobilenet_v2", {}, 8), ("shufflenet_v2_x1_0", {}, 28), ("densenet121", {}, 32),
    ("googlenet", {"aux_logits": False, "init_weights": False}, 32), ("squeezenet1_1", {}, 32), ("swin_t", {}, 8)])
def test_a_torchvision_backbone_is_the_plain_model_of_that_name(name, arguments, side):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = build(Model(name=name), 7, 1, (side, side))
    plain = torchvision.models.get_model(name, num_classes=7, **arguments)
    plain.load_state_dict(network.backbone.state_dict(), strict=True)
    assert all(isinstance(module, BatchNorm) for module in network.modules()
               if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)))
    images = _images(2, 1, side, side)
    prepared = (images.expand(-1, 3, -1, -1) / 255 - 0.5) / 0.5
    assert_close(network.eval()(images), plain.eval()(prepared), rtol=1e-3, atol=1e-4)
    assert network.train()(images).shape == (2, 7)


def test_images_too_small_for_a_network_are_refused_with_the_remedy():
    for name, side in (("googlenet", 8), ("vit_b_32", 28)):
        with pytest.raises(UserError, match=f"{name}.*{side} x {side} pixels.*input_size"):
            build(Model(name=name), 7, 1, (side, side))
    assert build(Model(name="vit_b_32", input_size=224), 7, 1, (28, 28)).input_size == (224, 224)


def test_preprocessing_is_resize_repeat_and_normalise_in_fp32_whatever_the_weights_dtype():
    model = Model(name="mobilenet_v3_small", input_size=32, mean=(0.1, 0.2, 0.3), std=(0.5,))
    network = build(model, 4, 1, (8, 12)).eval()
    images = _images(3, 1, 8, 12)
    seen = []
    network.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        network.to(dtype)
        logits = network(images)
        assert logits.dtype == seen[-1].dtype == dtype and logits.shape == (3, 4)
        assert network.mean.dtype == network.std.dtype == torch.float32
    pixels = torchvision.transforms.functional.resize(images / 255, [32, 32], antialias=True)
    wanted = (pixels.expand(-1, 3, -1, -1) - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5
    assert_close(seen[0], wanted)
    assert_close(seen[1], seen[0].bfloat16(), rtol=0, atol=0)
    assert all(key.startswith("backbone.") for key in network.state_dict())


class OneConvolution(nn.Module):
    """A user's model of three channels, with a batch norm that pkd must replace."""

    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.BatchNorm2d(num_classes))

    def forward(self, images):
        return self.layers(images).mean((2, 3))


class TwoOutputs(OneConvolution):
    def forward(self, images):
        return super().forward(images), 0


class NoArguments(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)


class Frozen(OneConvolution):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.layers[0].bias.requires_grad_(False)


class Tied(OneConvolution):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.again = self.layers[1]


def not_a_network(num_classes):
    raise AssertionError("only classes of networks are called, whatever a recipe names")


def test_a_class_of_ones_own_is_a_model_and_its_failures_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    network = build(Model(name="mine:OneConvolution"), 6, 1, (8, 8))
    assert network.channels == 3 and isinstance(network.backbone.layers[1], BatchNorm)
    assert network(_images(2, 1, 8, 8)).shape == (2, 6)
    for attribute, reason in {"Absent": "could not be imported", "NoArguments": "TypeError",
                              "not_a_network": "no torch.nn.Module class", "TwoOutputs": "returned a tuple",
                              "Frozen": "1 frozen parameters, such as layers.0.bias",
                              "Tied": "one tensor under two names, layers.1.weight and again.weight"}.items():
        with pytest.raises(UserError, match=f"mine:{attribute}.*{reason}"):
            build(Model(name=f"mine:{attribute}"), 6, 1, (8, 8))
    with pytest.raises(UserError, match="2 x 2 pixels"):
        build(Model(name="mine:OneConvolution"), 6, 1, (2, 2))
    with pytest.raises(UserError, match="could not be imported"):
        check_model(Model(name="no_such_module:Net"))


@pytest.mark.parametrize(("model", "reason"), [
    (Model(name="resnet81"), "did you mean 'resnet18'"),
    (Model(name="pkd_mobil"), "did you mean 'pkd_mobile'"),
    (Model(name="fcn_resnet50"), "not known"),
    (Model(name="resnet18", width=0.5), "width 0.5"),
    (Model(name="resnet18", weights="IMAGENET1K_V2"), "did you mean 'IMAGENET1K_V1'"),
    (Model(name="pkd_mobile", weights="IMAGENET1K_V1"), "safetensors"),
    (Model(name="pkd_mobile", weights="absent.safetensors"), "absent.safetensors.*exists")])
def test_what_is_unknown_is_refused_before_anything_is_built(model, reason):
    with pytest.raises(UserError, match=reason):
        check_model(model)


@pytest.mark.parametrize(("model", "channels", "reason"), [
    (Model(name="pkd_mobile", mean=(0.1, 0.2)), 3, "mean.*2 numbers.*3"),
    (Model(name="resnet18", std=(0.1, 0.2)), 1, "std.*2 numbers.*3"),
    (Model(name="resnet18"), 4, "images of 3 channels and the data has 4")])
def test_channels_must_fit(model, channels, reason):
    with pytest.raises(UserError, match=reason):
        build(model, 10, channels, (32, 32))


def test_a_safetensors_file_fills_all_but_a_head_of_another_shape(tmp_path):
    source = build(RESNET_S, 10, 1, (8, 8)).bfloat16()
    for state in (source.state_dict(), source.backbone.state_dict()):
        save_file(state, tmp_path / "weights.safetensors")
        model = Model(name="pkd_resnet_s", weights=str(tmp_path / "weights.safetensors"))
        same = build(model, 10, 1, (8, 8))
        assert_close(same.state_dict(), source.state_dict(), check_dtype=False, rtol=0, atol=0)
        torch.manual_seed(1)
        other = build(model, 4, 1, (8, 8)).state_dict()
        torch.manual_seed(1)
        fresh = build(RESNET_S, 4, 1, (8, 8)).state_dict()
        for key, tensor in other.items():
            assert torch.equal(tensor, fresh[key] if "head" in key else same.state_dict()[key])


def test_a_file_of_weights_brings_the_normalisation_that_stands_beside_it(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(build(RESNET_S, 10, 1, (8, 8)).backbone.state_dict(), path)
    model = Model(name="pkd_resnet_s", weights=str(path))
    assert build(model, 10, 1, (8, 8)).normalisation == ((0.5,), (0.5,))
    (tmp_path / "weights.json").write_text('{"mean": [0.1], "std": [0.3]}')
    assert build(model, 10, 1, (8, 8)).normalisation == ((0.1,), (0.3,))
    assert build(model.model_copy(update={"mean": (0.2,)}), 10, 1, (8, 8)).normalisation == ((0.2,), (0.3,))
    for name, beside in (("a.safetensors.index.json", "a.json"), ("model.safetensors", "config.json")):  # large; of the hub
        assert described_by(tmp_path / name)[-1] == tmp_path / beside
    hub = tmp_path / "model.safetensors"
    path.rename(hub)
    (tmp_path / "weights.json").rename(tmp_path / "config.json")
    assert build(model.model_copy(update={"weights": str(hub)}), 10, 1, (8, 8)).normalisation == ((0.1,), (0.3,))


def test_a_vision_transformer_is_as_large_as_its_images():
    network = build(Model(name="vit_b_16", input_size=64), 4, 3, (32, 32), empty=True)
    assert network.backbone.image_size == 64 and network.backbone.encoder.pos_embedding.shape[1] == 17
    with pytest.raises(UserError, match=r"images of 28 x 28 pixels .*: set input_size"):
        build(Model(name="vit_b_16"), 4, 1, (28, 28), empty=True)


def test_a_safetensors_file_that_does_not_fit_is_refused_by_its_first_wrong_key(tmp_path):
    path = tmp_path / "weights.safetensors"
    model = Model(name="pkd_resnet_s", weights=str(path))
    state = build(RESNET_S, 10, 1, (8, 8)).backbone.state_dict()
    lacking = {key: tensor for key, tensor in state.items() if key != "features.1.body.0.0.weight"}
    more = state | {"extra.weight": torch.zeros(1)}
    wide = build(Model(name="pkd_resnet_s", width=2), 10, 1, (8, 8)).backbone.state_dict()
    for wrong, reason in ((lacking, "features.1.body.0.0.weight is only in the network"),
                          (more, "extra.weight is only in the weights"),
                          (wide, r"features.0.0.weight has shape \[24, 1, 3, 3\].*\[12, 1, 3, 3\]")):
        save_file(wrong, path)
        with pytest.raises(UserError, match=reason):
            build(model, 10, 1, (8, 8))
    path.write_bytes(b"not tensors at all")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        build(model, 10, 1, (8, 8))


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std as torchvision prepares images


@pytest.mark.parametrize(("name", "arguments", "mean", "side"), [
    ("shufflenet_v2_x0_5", {}, IMAGENET[0], 32),
    ("googlenet", {"init_weights": False}, (0.5,) * 3, 32),
    ("inception_v3", {"init_weights": False}, (0.5,) * 3, 80)])
def test_named_weights_fill_all_but_the_head_and_bring_their_normalisation(name, arguments, mean, side, monkeypatch):
    trained = torchvision.models.get_model(name, **arguments)
    weights = torchvision.models.get_model_weights(name)
    monkeypatch.setattr(weights, "get_state_dict", lambda self, *args, **kwargs: trained.state_dict())
    model = Model(name=name, weights="IMAGENET1K_V1")
    for key, tensor in build(model, 10, 3, (side, side)).backbone.state_dict().items():
        assert key.startswith("fc.") or torch.equal(tensor, trained.state_dict()[key])
    network = build(model, 1000, 3, (side, side))
    assert network.normalisation[0] == mean
    trained.transform_input = True  # as torchvision sets it for the weights of googlenet and inception_v3
    images = _images(2, 3, side, side)
    usual = torchvision.transforms.functional.normalize(images / 255, *IMAGENET)
    assert_close(network.eval()(images), trained.eval()(usual), rtol=1e-3, atol=1e-4)


def test_weights_that_cannot_be_downloaded_are_a_users_error_with_the_remedy(monkeypatch):
    def offline(self, *args, **kwargs):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(UserError, match=r"no route to host.*resnet18.*pth.*checkpoints"):
        build(Model(name="resnet18", weights="IMAGENET1K_V1"), 10, 3, (32, 32))


@pytest.mark.parametrize("name", ["pkd_shuffle", "googlenet"])
def test_the_description_rebuilds_the_network(name):
    model = Model(name=name, input_size=24)
    network = build(model, 3, 1, (28, 20))
    told = json.loads(json.dumps(description(model, ("a", "b", "c"), 1, (28, 20), network)))
    maker = SMALL_MODELS[name] if told["library"] == "pkd" else torchvision.models.get_model_builder(name)
    maker(**told["arguments"]).load_state_dict(network.backbone.state_dict(), strict=True)
    assert told["architecture"] == name and told["classes"] == ["a", "b", "c"]
    assert (told["view_size"], told["input_size"], told["channels"]) == ([28, 20], [24, 24], 1)
    assert told["mean"] == told["std"] == [0.5] * told["input_channels"]
    assert told["parameters"] == _parameters(network)
