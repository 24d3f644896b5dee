"""torchvision, also where its compiled library does not fit the installed torch (a CPU torch beside a CUDA torchvision).

Import it from here: `from pkd.vision import torchvision`. Its models, data sets and transforms are plain Python; on import
it only registers shapes for two compiled operators, which must therefore exist, if only as declarations. One operator for
boxes asks torch's compiler a question when it is called, and imports all of it beforehand, 1.5 s of every rank's start: here
it is imported when it is asked.
"""

import importlib
import sys
import types

import torch

COMPILER = "torch._dynamo.utils"
_declared = []  # the library object must outlive this function, or its operators vanish again


def _ask(kind: str) -> bool:
    return importlib.import_module(COMPILER).is_compile_supported(kind)


def _import():
    late = COMPILER not in sys.modules
    if late:
        sys.modules[COMPILER] = types.ModuleType(COMPILER)
        sys.modules[COMPILER].is_compile_supported = _ask
    try:
        return _import_as_installed()
    finally:
        if late:
            del sys.modules[COMPILER]


def _import_as_installed():
    try:
        import torchvision
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision
    return torchvision


torchvision = _import()
