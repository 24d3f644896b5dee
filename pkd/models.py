"""Networks by name: pkd's small ones, torchvision's classifiers and anybody's `package.module:Class`.

All take uint8 images as they come out of the views, and return logits.
"""

import contextlib
import http.client
import importlib
import inspect
import os
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pkd.errors import UserError, nearest
from pkd.files import read_json
from pkd.norm import Float32Buffers, convert
from pkd.recipe import Model, Recipe
from pkd.small_models import SMALL_MODELS
from pkd.vision import torchvision
from pkd.weights_file import Weights, described_by, is_weights_file

TORCHVISION_MODELS = frozenset(torchvision.models.list_models(module=torchvision.models))
_tried: set[tuple] = set()
_AUXILIARY = ("googlenet", "inception_v3")  # in training these return several outputs unless told otherwise


class Network(Float32Buffers):
    """Preprocessing and a backbone: uint8 [n, channels or 1, h, w] -> logits [n, classes] in the backbone's dtype.

    Pixels are divided by 255, resized to `input_size` (height, width; bilinear with antialiasing) if they differ, grey
    repeated over the backbone's `channels`, normalised by `mean` and `std`, all in float32, then cast to the dtype of
    the backbone's parameters.
    """

    channels_last = False

    def __init__(self, backbone: nn.Module, channels: int, input_size: tuple[int, int], mean: tuple[float, ...],
                 std: tuple[float, ...]):
        super().__init__()
        self.backbone = backbone
        self.channels, self.input_size, self.normalisation = channels, input_size, (mean, std)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.float() / 255
        if tuple(pixels.shape[-2:]) != self.input_size:
            pixels = F.interpolate(pixels, self.input_size, mode="bilinear", antialias=True)
        pixels = pixels.expand(-1, self.channels, -1, -1)
        pixels = ((pixels - self.mean) / self.std).to(next(self.backbone.parameters()).dtype)
        return self.backbone(pixels.contiguous(memory_format=torch.channels_last) if self.channels_last else pixels)

    def use_channels_last(self, weights: bool = True) -> "Network":
        """From now on images lie channels last, and the weights of convolutions, unless they are where they have to stay:
        other kernels, the same results but for their last bits. A network with too narrow a shortcut stays as it is.
        """
        if any(map(_too_narrow, self.modules())):
            return self
        self.channels_last = True
        return self.to(memory_format=torch.channels_last) if weights else self


def _too_narrow(layer: nn.Module) -> bool:
    """Whether oneDNN 3.12 writes past its workspace in the gradient of this layer's weights, channels last on a CPU: that of
    a 1 x 1 convolution with a stride, of fewer features than a vector holds, 8 with AVX2, 16 with AVX-512 (its issue 6035).
    """
    return (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and max(layer.stride) > 1
            and layer.in_channels // layer.groups < 16)


def models_of(recipe: Recipe) -> list[Model]:
    """Every model that a recipe names, teachers' first."""
    return [level.model for level in recipe.pyramid] + [student.model for student in recipe.students]


def check_model(model: Model) -> None:
    """UserError for an unknown name, weights unknown or missing, or a width where there is none; builds nothing."""
    name, weights = model.name, model.weights
    if ":" in name:
        _user_class(name)
    elif name not in SMALL_MODELS and name not in TORCHVISION_MODELS:
        raise UserError(f"model {name!r} is not known{nearest(name, {*SMALL_MODELS, *TORCHVISION_MODELS})}: use one of "
                        f"{', '.join(SMALL_MODELS)}, a classification model of torchvision, or package.module:Class")
    if model.width != 1 and name not in SMALL_MODELS:
        raise UserError(f"model {name!r} cannot have width {model.width:g}: only pkd's own models scale, so leave "
                        f"width out or use one of {', '.join(SMALL_MODELS)}")
    if weights is None:
        return
    if is_weights_file(weights):
        if not Path(weights).is_file():
            raise UserError(f"weights {weights!r} of model {name!r} are no file that exists: mend the path")
    elif name not in TORCHVISION_MODELS:
        raise UserError(f"weights {weights!r} of model {name!r} are no .safetensors file, and only torchvision's "
                        "models have weights by name: give the path of such a file (or of a .safetensors.index.json) or "
                        "leave weights out")
    else:
        known = list(torchvision.models.get_model_weights(name).__members__)
        if weights not in known:
            raise UserError(f"weights {weights!r} of model {name!r} are not known{nearest(weights, known)}: use one of "
                            f"{', '.join(known)} or the path of a .safetensors file")


def build(model: Model, classes: int, channels: int, size: tuple[int, int], empty: bool = False) -> Network:
    """The network of `model` for uint8 views [n, channels, *size], `size` being (height, width) in pixels.

    Random weights are drawn from torch's global generator; `empty`: there are none, parameters are on the meta device
    and take no memory, and buffers are real. Every batch norm is a pkd.norm.BatchNorm. Raises
    UserError for what check_model finds, a class that cannot be built, a number of channels, mean or std that does not
    fit, images too small for the network, and weights that cannot be fetched or do not fit.
    """
    check_model(model)
    name = model.name
    input_size = tuple(size) if model.input_size is None else (model.input_size, model.input_size)
    arguments = _arguments(model, classes, channels, input_size)
    with _without_weights() if empty else contextlib.nullcontext():
        backbone = _backbone(name, arguments)
    if name in SMALL_MODELS:
        wanted = channels
    elif name in TORCHVISION_MODELS:
        wanted = 3
    else:
        wanted = next((layer.in_channels for layer in backbone.modules() if isinstance(layer, nn.Conv2d)), channels)
    if channels not in (1, wanted):
        raise UserError(f"model {name!r} takes images of {wanted} channels and the data has {channels}: use one of "
                        f"{', '.join(SMALL_MODELS)}, or images of 1 or {wanted} channels")
    mean, std = (_per_channel(model, key, wanted) for key in ("mean", "std"))
    network = Network(convert(backbone), wanted, input_size, mean, std)
    if not empty or ":" not in name:  # a user's code needs its weights to be tried
        _try(network, model, classes, channels, size)
    if empty:
        return network
    if model.weights is not None:
        _load(network.backbone, read_weights(model), model, classes)
    return network


def _backbone(name: str, arguments: dict) -> nn.Module:
    if name in SMALL_MODELS:
        return SMALL_MODELS[name](**arguments)
    if name not in TORCHVISION_MODELS:
        return _user_network(name, arguments)
    try:
        return torchvision.models.get_model(name, **arguments)
    except AssertionError as error:  # a vision transformer's patches do not fit
        side = arguments.get("image_size")
        raise UserError(f"model {name!r} cannot be built for images of {side} x {side} pixels ({_first_line(error)}): set "
                        "input_size, such as 224") from None


def _without_weights():
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def description(model: Model, classes: tuple[str, ...], channels: int, size: tuple[int, int], network: Network) -> dict:
    """What rebuilds `network` outside pkd, as JSON data.

    `architecture` called with `arguments` makes the backbone (a torchvision.models.get_model name, a name of
    pkd.small_models.SMALL_MODELS, or a class); Network's docstring says how images are prepared. `classes` are names.
    Sizes are (height, width) in pixels, `view_size` of the images and `input_size` after resizing.
    """
    name = model.name
    return {
        "architecture": name,
        "library": "pkd" if name in SMALL_MODELS else "torchvision" if name in TORCHVISION_MODELS else "own",
        "arguments": _arguments(model, len(classes), channels, network.input_size),
        "width": model.width,
        "classes": list(classes),
        "channels": channels,
        "view_size": list(size),
        "input_channels": network.channels,
        "input_size": list(network.input_size),
        "mean": list(network.normalisation[0]),
        "std": list(network.normalisation[1]),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


def _named_weights(model: Model):
    """torchvision's weights entry, or None."""
    if model.weights is None or is_weights_file(model.weights):
        return None
    return torchvision.models.get_model_weights(model.name)[model.weights]


def _arguments(model: Model, classes: int, channels: int, input_size: tuple[int, int]) -> dict:
    if model.name in SMALL_MODELS:
        return {"classes": classes, "channels": channels, "width": model.width, "size": min(input_size)}
    arguments = {"num_classes": classes}
    if model.name in _AUXILIARY:
        arguments |= {"aux_logits": False, "init_weights": True}  # the latter is what they do anyway, with a warning
    if model.name.startswith("vit_"):  # positions are learnt for one size of image
        arguments["image_size"] = min(input_size)
    return arguments


def _user_class(name: str) -> type[nn.Module]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the import runs the user's code, which may raise anything
        raise UserError(f"model {name!r} could not be imported ({_first_line(error)}): mend the name, or put the "
                        "module where Python finds it, for instance by PYTHONPATH") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):  # nothing else is ever called
        raise UserError(f"model {name!r} is no torch.nn.Module class: name one that is")
    return found


def own_code(recipe: Recipe) -> list[str]:
    """'package.module:Class (file)' of every model of the user's own that a recipe names: the only code it can run."""
    names = sorted({model.name for model in models_of(recipe) if ":" in model.name})
    return [f"{name} ({inspect.getsourcefile(_user_class(name)) or 'built in'})" for name in names]


def _user_network(name: str, arguments: dict) -> nn.Module:
    kind = _user_class(name)
    try:
        network = kind(**arguments)
    except Exception as error:  # the user's code, too
        raise UserError(f"model {name!r} could not be called with num_classes={arguments['num_classes']} "
                        f"({_first_line(error)}): give the class such an argument") from error
    if next(network.parameters(), None) is None:
        raise UserError(f"model {name!r} has no parameters, so there is nothing to train: name another class")
    frozen = [key for key, parameter in network.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise UserError(f"model {name!r} has {len(frozen)} frozen parameters, such as {frozen[0]}, which DeepSpeed would "
                        "not keep: let them be trained, or register them as buffers")
    names: dict[int, str] = {}
    for key, tensor in network.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and names.setdefault(id(tensor), key) != key:
            raise UserError(f"model {name!r} holds one tensor under two names, {names[id(tensor)]} and {key}, which a file "
                            "of weights cannot: build a layer for each place")
    return network


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")


def _per_channel(model: Model, key: str, channels: int) -> tuple[float, ...]:
    """`key` ("mean" or "std") for each channel of the backbone."""
    values, weights = getattr(model, key), _named_weights(model)
    if values is None and weights is not None and model.name not in _AUXILIARY:
        values = getattr(weights.transforms(), key)
    if values is None and model.weights and weights is None:
        values = next((read_json(path).get(key) for path in described_by(Path(model.weights)) if path.is_file()), None)
    if values is None:
        values = (0.5,)  # the two in _AUXILIARY were trained on pixels in [-1, 1], which this gives
    if len(values) not in (1, channels):
        raise UserError(f"{key} of model {model.name!r} has {len(values)} numbers, and its images have {channels} "
                        f"channels: give 1 number or {channels}")
    return tuple(values) * (channels if len(values) == 1 else 1)


def _try(network: Network, model: Model, classes: int, channels: int, size: tuple[int, int]) -> None:
    """One forward of two images in eval mode.

    On the meta device, where it needs no memory, for networks known to work there; for real where it is the user's code.
    What was tried by this process is not tried again.
    """
    tried = model.model_dump_json(exclude={"weights"}), classes, channels, tuple(size)
    if tried in _tried:
        return
    network.eval()
    device, state = "cpu", {}
    if ":" not in model.name:
        device, tensors = "meta", [*network.named_parameters(), *network.named_buffers()]
        state = {key: torch.empty_like(tensor, device=device) for key, tensor in tensors}
    try:
        with torch.no_grad():
            images = torch.zeros(2, channels, *size, dtype=torch.uint8, device=device)
            logits = functional_call(network, state, (images,))
    except Exception as error:  # whatever a network says of its input: RuntimeError, AssertionError, ...
        height, width = network.input_size
        raise UserError(f"model {model.name!r} cannot take images of {height} x {width} pixels ({_first_line(error)}): "
                        "set input_size to the pixels a side that it needs, 224 for most of torchvision's") from error
    network.train()
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        found = f"{type(logits).__name__} {list(getattr(logits, 'shape', []))}"
        raise UserError(f"model {model.name!r} returned a {found} for 2 images and {classes} classes: it must return a "
                        f"tensor [2, {classes}]")
    _tried.add(tried)


def read_weights(model: Model) -> dict[str, Tensor]:
    """The backbone's tensors in `model.weights`."""
    named = _named_weights(model)
    if named is None:
        state = Weights(Path(model.weights)).all()
        whole = all(key.startswith("backbone.") for key in state)  # of a Network, not of its backbone
        return {key.removeprefix("backbone."): state[key] for key in state} if whole else state
    try:  # the builder, not the file alone, for it renames the keys of old files
        os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # nothing is unpickled, whatever lies in the cache
        with torch.random.fork_rng(devices=[]):
            trained = torchvision.models.get_model(model.name, weights=named, progress=False)
    except (OSError, RuntimeError, pickle.UnpicklingError, http.client.HTTPException) as error:
        raise UserError(f"weights {model.weights} of model {model.name!r} could not be had ({_first_line(error)}): "
                        f"download {named.url} where there is a network and put it into "
                        f"{Path(torch.hub.get_dir(), 'checkpoints')}") from error
    return {key: value for key, value in trained.state_dict().items() if not key.startswith(("aux", "AuxLogits"))}


def _load(backbone: nn.Module, state: dict[str, Tensor], model: Model, classes: int) -> None:
    """Loads every tensor; those of an output layer for another number of classes stay as they are.

    An output layer is known by its shape: a hidden layer of another width shows in the inputs of the next one.
    """
    own = backbone.state_dict()
    problem = f"weights {model.weights!r} do not fit model {model.name!r}"
    for key in [*own, *(key for key in state if key not in own)]:
        if key not in own or key not in state:
            raise UserError(f"{problem}: {key} is only in the {'weights' if key in state else 'network'}: use weights "
                            "of the same architecture")
        found, needed = list(state[key].shape), list(own[key].shape)
        if found != needed and (needed[:1] != [classes] or found[1:] != needed[1:]):
            raise UserError(f"{problem}: {key} has shape {found} and the network needs {needed}: use weights of the "
                            "same architecture, width and channels")
    backbone.load_state_dict({key: state[key] for key in own if state[key].shape == own[key].shape}, strict=False)
