"""A student, or the ensemble as one network, as an ONNX file that is written only if it says what the original says.

The whole of a Network is inside, so that whoever runs the file hands over uint8 images: division by 255, resizing,
repetition of grey, normalisation. The mean over students is inside too.
"""

import contextlib
import importlib
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from pkd.console import Console
from pkd.data import load_data
from pkd.ensemble import Ensemble
from pkd.errors import UserError
from pkd.evaluate import recipe_of
from pkd.files import write_bytes
from pkd.models import Network
from pkd.run_folder import RunFolder

IMAGES, LOGITS = "images", "logits"  # names of the graph's input and output
LIMIT = 1e-4  # of the difference to the original's logits
CHECKED = 64  # images
MOST = 2**31 - 2**24  # bytes of weights: a file cannot have 2 GiB, and the graph takes some
PREPROCESSING = ("inside the graph: uint8 pixels / 255, resized bilinearly with antialiasing where a network takes another "
                 "size, grey repeated over its channels, normalised; outside: image files decoded to grey or RGB, "
                 "their centre of view_size's shape resized to it bilinearly, as Pillow's ImageOps.fit does")


class _Mean(nn.Module):
    def __init__(self, ensemble: Ensemble):
        super().__init__()
        self.ensemble = ensemble

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [samples, channels, height, width] -> the mean of the students' logits, fp32 [samples, classes]."""
        return self.ensemble(images).mean(0)


def export_onnx(run: RunFolder, students: list[tuple[Network, dict]], folder: Path, console: Console,
                overrides: Sequence[str] = (), random_images: bool = False) -> None:
    """Write <student>.onnx or ensemble.onnx: uint8 [batch, channels, height, width] -> logits [batch, classes], any batch.

    onnxruntime and the original are compared on validation images of the run, whose recipe overrides change, or on random
    ones where that is asked for. Raises UserError where a logit differs by more than LIMIT, where the packages or the
    images are missing, and for networks that ONNX cannot express.
    """
    need("onnx", "onnxruntime", "onnxscript")
    size = sum(parameter.nbytes for network, _ in students for parameter in network.parameters())
    if size > MOST:
        raise UserError(f"the students have {size / 2**30:.2f} GiB of weights, and an ONNX file holds less than 2: export "
                        "them one by one with --student, or with --format safetensors")
    whole = _Mean(Ensemble({facts["name"]: network for network, facts in students})).eval()
    first = students[0][1]
    images, which = _random_images(first) if random_images else _validation_images(run, first, overrides)
    content = _file(whole, first, _metadata(students, f"{len(images)} {which}"))
    error, largest = _difference(content, whole, images)
    if not error <= LIMIT:
        raise UserError(f"the ONNX file's logits differ from the original's by up to {error:.1e} (of {largest:.1f}) "
                        f"on {len(images)} {which}, but at most {LIMIT:g} is right: use --format safetensors")
    name = first["name"] if len(students) == 1 else "ensemble"
    write_bytes(folder / f"{name}.onnx", content)
    console.say(f"{name}.onnx: logits by onnxruntime differ from the original's by {error:.1e} at most (logits up to "
                f"{largest:.1f}) on {len(images)} {which}")


def need(*packages: str) -> None:
    """UserError for what the extra `onnx` would bring and is not there."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            raise UserError(f"ONNX files need {package}, which is not installed: run pip install onnx onnxruntime "
                            "onnxscript") from None


def session(content: bytes, where: Path):
    """An onnxruntime session on the CPU. Raises UserError for what is no ONNX file; where: for that sentence."""
    need("onnxruntime")
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a kind of its own for everything
        raise UserError(f"{where} cannot be read as ONNX ({str(error).splitlines()[0]}): export it again") from None


def _metadata(students: list[tuple[Network, dict]], checked: str) -> dict[str, str]:
    """All values are JSON. checked: on which images the file is compared with the original."""
    first = students[0][1]
    networks = {facts["name"]: {key: facts[key] for key in ("architecture", "input_channels", "input_size", "mean", "std")}
                for _, facts in students}
    tree = {"classes": first["classes"], "channels": first["channels"], "view_size": first["view_size"],
            "preprocessing": PREPROCESSING, "students": networks,
            "checked": f"against the original to {LIMIT:g} on {checked}"}
    return {key: json.dumps(value, ensure_ascii=False) for key, value in tree.items()}


def _file(whole: nn.Module, facts: dict, metadata: dict[str, str]) -> bytes:
    # By torch's dynamo exporter: the tracing one takes a tenth of the time, but cannot resize with antialiasing.
    example = torch.zeros(2, facts["channels"], *facts["view_size"], dtype=torch.uint8)
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(whole, (example,), dynamo=True, input_names=[IMAGES], output_names=[LOGITS],
                                        dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False)
    except Exception as error:  # whatever the exporter says of a network that it cannot express
        line = next(iter(str(error).strip().splitlines()), "")
        raise UserError(f"this network cannot be written as ONNX ({type(error).__name__}: {line}): use --format safetensors "
                        "or another --student") from None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where the sources lie on this machine
    program.model.metadata_props.update(metadata)
    return program.model_proto.SerializeToString()


def _validation_images(run: RunFolder, facts: dict, overrides: Sequence[str]) -> tuple[torch.Tensor, str]:
    """uint8 [at most CHECKED, channels, *view_size], spread over the validation split, and what they are."""
    shape = (facts["channels"], *facts["view_size"])
    try:
        data = load_data(recipe_of(run, ["data.cache_gib=0", "data.download=false", *overrides]).data)
        if (data.channels, *data.size) != shape:
            raise UserError(f"its images are {(data.channels, *data.size)} and were {shape}")
    except UserError as error:
        raise UserError(f"an ONNX file is checked on the run's validation images, which cannot be read here ({error}): add "
                        "data.path= and where they are, or --random-images to do without them") from None
    ids = data.splits["validation"]
    return data.images[ids[torch.linspace(0, len(ids) - 1, min(CHECKED, len(ids))).long()]], "validation images"


def _random_images(facts: dict) -> tuple[torch.Tensor, str]:
    shape = (CHECKED, facts["channels"], *facts["view_size"])
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), "random images"


def _difference(content: bytes, whole: nn.Module, images: torch.Tensor) -> tuple[float, float]:
    """The largest difference of a logit, and the largest logit; on a batch of one image and on one of the others."""
    run = session(content, Path("the new file"))
    batches = [batch for batch in (images[:1], images[1:]) if len(batch)]
    with torch.inference_mode():
        wanted = torch.cat([whole(batch) for batch in batches])
    found = torch.cat([torch.from_numpy(run.run([LOGITS], {IMAGES: batch.numpy()})[0]) for batch in batches])
    return (found - wanted).abs().max().item(), wanted.abs().max().item()
