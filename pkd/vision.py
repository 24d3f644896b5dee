"""torchvision, also where its compiled library does not fit the installed torch (a CPU torch beside a CUDA torchvision).

Import it from here: `from pkd.vision import torchvision`. Its models, data sets and transforms are plain Python; on import
it only registers shapes for two compiled operators, which must therefore exist, if only as declarations.
"""

import torch

_declared = []  # the library object must outlive this function, or its operators vanish again


def _import():
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
