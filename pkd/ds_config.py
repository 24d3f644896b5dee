"""DeepSpeed configurations by name (ds_configs/) or path, checked against what pkd needs and what DeepSpeed can do."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

from pkd.errors import UserError, nearest
from pkd.shipped import is_file, shipped_file, shipped_names

# Set by pkd for every engine, and refused in a file if it says otherwise. pkd steps once per optimizer step of its own
# counting and averages over the true number of samples, so DeepSpeed's batch sizes are only bookkeeping.
OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler")


NUMBERS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size", "sub_group_size")

# What `auto` stands for: fp32 on every device, for the dtype is part of what a run is, and runs move. On a CPU a step under
# ZeRO 1 takes 1.2 to 1.5 times as long; on a GPU 1.01 to 1.15, where memory soon lacks (tests/bench/RESULTS-kernels-*).
AUTO = {"cpu": "zero0", "cuda": "zero1"}


def load_ds_config(name: str, kind: str | None = None) -> dict:
    """The JSON object of ds_configs/<name>.json or of the file `name`; kind: of device, by default this machine's.

    Raises UserError.
    """
    if name == "auto":
        name = AUTO[kind or _kind()]
    path = Path(name) if Path(name).suffix == ".json" else shipped_file("ds_configs", name + ".json")
    if path is None or not is_file(path):
        raise UserError(f"DeepSpeed configuration {name} was asked for, but there is no such file in ds_configs/"
                        f"{nearest(name, shipped_names('ds_configs'))}: there are auto, "
                        f"{', '.join(shipped_names('ds_configs'))}, or give a path ending in .json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"DeepSpeed configuration {name} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise UserError(f"DeepSpeed configuration {name} must be a JSON object with an object zero_optimization")
    _check(config, name)
    return config


def _kind() -> str:
    import torch  # here, because recipes are checked before it is loaded

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _missing(module: str):
    """Within, an import of a module fails that was not imported before."""
    absent = module not in sys.modules
    if absent:
        sys.modules[module] = None
    try:
        yield
    finally:
        if absent:
            del sys.modules[module]


def import_deepspeed():
    """The module, told not to compile the shared-memory operator of its CPU back end, which takes a minute and a C++
    compiler and is never used by training or gathering; nor Muon, which pkd does not use: the first engine imports it, and
    to decorate it loads all of torch's compiler, seconds of every rank's start. Its autotuner, never used either,
    does without MLflow where that is not installed, and takes another second where it is."""
    with _missing("mlflow"):
        import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    with contextlib.suppress(ImportError):
        import deepspeed.runtime.zero.muon.original_muon
    del os.environ["TORCHDYNAMO_DISABLE"]
    if before is not None:
        os.environ["TORCHDYNAMO_DISABLE"] = before
    return deepspeed


def precision(config: dict) -> str:
    """'bf16', 'fp16' or 'fp32': the dtype of the weights that forward and backward use."""
    return next((kind for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled")), "fp32")


def arithmetic(config: dict) -> str:
    """In what forward and backward reckon: what precision() says, or 'bf16 autocast' over fp32 weights."""
    return "bf16 autocast" if config.get("torch_autocast", {}).get("enabled") else precision(config)


def stage(config: dict) -> int:
    """The ZeRO stage, 0 to 3."""
    return config.get("zero_optimization", {}).get("stage", 0)


def _check(config: dict, name: str) -> None:
    owned = [key for key in OWNED if key in config]
    if owned:
        raise UserError(f"DeepSpeed configuration {name} sets {owned[0]}, which the recipe decides: remove it there")
    for kind in ("bf16", "fp16", "torch_autocast"):
        if not isinstance(config.get(kind, {}), dict):
            raise UserError(f"DeepSpeed configuration {name}: {kind} must be an object such as {{\"enabled\": true}}")
    if stage(config) not in (0, 1, 2, 3):
        raise UserError(f"DeepSpeed configuration {name}: zero_optimization.stage must be 0, 1, 2 or 3, "
                        f"found {stage(config)!r}")
    if config.get("gradient_clipping", 0):
        raise UserError(f"DeepSpeed configuration {name} sets gradient_clipping, which would clip all students by one "
                        "common norm: remove it and set clip for each student in the recipe")
    if precision(config) == "fp16" and stage(config) == 0:
        raise UserError(f"DeepSpeed configuration {name} asks for fp16 with ZeRO 0, whose loss scaling is unsound: "
                        "use ZeRO 1, 2 or 3, or bf16")
    for key, value in config.get("zero_optimization", {}).items():
        if key in NUMBERS and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1):
            raise UserError(f"DeepSpeed configuration {name}: zero_optimization.{key} must be a number above 0, found "
                            f"{value!r}: give one, or leave it out for pkd's own")
    wide = config.get("data_types", {})
    if isinstance(wide, dict) and wide.get("grad_accum_dtype") and precision(config) == "bf16" and stage(config) == 1:
        raise UserError(f"DeepSpeed configuration {name} sets data_types.grad_accum_dtype for bf16 with ZeRO 1, for which "
                        "DeepSpeed takes an optimizer whose states pkd cannot save: remove it, or use ZeRO 2 or 3")
    enabled = [kind for kind in ("bf16", "fp16", "torch_autocast") if config.get(kind, {}).get("enabled")]
    if len(enabled) > 1:
        raise UserError(f"DeepSpeed configuration {name} enables both {enabled[0]} and {enabled[1]}: choose one")
    if enabled == ["torch_autocast"] and config["torch_autocast"].get("dtype") != "bfloat16":
        raise UserError(f"DeepSpeed configuration {name} asks for torch_autocast in "
                        f"{config['torch_autocast'].get('dtype')!r}, whose loss scale pkd cannot keep: set its dtype to "
                        "bfloat16")


def check_device(name: str, device: str) -> None:
    """Raises UserError where a kind of device ("cpu", "cuda") cannot run the dtype of the configuration of that name."""
    config = load_ds_config(name)
    if precision(config) == "fp16" and device != "cuda":
        raise UserError(f"DeepSpeed configuration {name} asks for fp16, which DeepSpeed runs on CUDA only, and there is "
                        "no GPU here: use its bf16 or fp32 sibling")
    if "bf16" not in arithmetic(config) or device != "cuda":
        return
    import torch  # slow, and not needed for reading a recipe

    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"DeepSpeed configuration {name} asks for bf16, in which {torch.cuda.get_device_name()} does not "
                        "reckon: use its fp16 or fp32 sibling")


def check_compiler(wanted: bool) -> None:
    """Raises UserError where torch.compile is wanted and there is no compiler of C++, which it calls for every device."""
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))), None)
    if wanted and found is None:
        raise UserError("distill.compile is true, but torch.compile needs a C++ compiler, and there is no g++ or clang++ "
                        "here: install one, name it in CXX, or set distill.compile=false")


def check_shards(config: dict, name: str) -> None:
    """Raises UserError where a configuration cannot serve frozen teachers that several ranks hold together."""
    if stage(config) != 3:
        raise UserError(f"deepspeed.shards is {name}, of ZeRO {stage(config)}, which leaves a teacher's weights whole on "
                        "every rank: name a configuration of ZeRO 3, such as teacher-zero3")
    if arithmetic(config) != "fp32":
        raise UserError(f"deepspeed.shards is {name}, which sets {arithmetic(config)}, but teachers.forward decides in what "
                        "dtype teachers answer: remove it there")


def check_clip(config: dict, clipped: bool, elements: int) -> None:
    """Raises UserError where parts of a network of `elements` parameters would each be clipped by itself."""
    most = config.get("zero_optimization", {}).get("sub_group_size", elements)
    if clipped and stage(config) == 3 and most < elements:
        raise UserError(f"the DeepSpeed configuration's zero_optimization.sub_group_size is {most}, fewer than the "
                        f"{elements} parameters that are trained, so that clip would limit parts of a network each by "
                        "itself: leave sub_group_size or clip out")


def engine_config(config: dict, ranks: int, accumulation: int, elements: int) -> dict:
    """`config` completed for an engine of `elements` parameters over `ranks` ranks, `accumulation` micro batches a step.

    Buckets larger than the model are cut to its size: DeepSpeed allocates them whole, whatever the model.
    """
    zero = dict(config.get("zero_optimization", {}))
    if stage(config):
        even = elements + elements % 2  # ZeRO 1 and 2 align their buckets
        buckets = ["reduce_bucket_size", "stage3_prefetch_bucket_size" if stage(config) == 3 else "allgather_bucket_size"]
        zero.update({bucket: min(zero.get(bucket, even), even) for bucket in buckets})
    if stage(config) in (1, 2) and not (zero.get("offload_optimizer") or zero.get("zenflow")):
        # Nobody reads the norm of all gradients together; and in fp32 one that is not finite would leave out the step of
        # every student without a word.
        zero.setdefault("compute_grad_norm", False)
    if stage(config) == 3:
        zero.setdefault("stage3_param_persistence_threshold", 0)  # else small tensors stay whole on every rank
        # Else torch's linear layer is replaced in the whole process, whole teachers' included, by one with other last bits.
        zero.setdefault("memory_efficient_linear", False)
        # DeepSpeed steps once for each of these parts of a network, and clip needs the norm of all of it.
        zero.setdefault("sub_group_size", max(10**9, elements))
    return {
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
        "timers": {"throughput": {"enabled": False}},  # else host and device wait for each other twice a step
        **config,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": ranks * accumulation,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
