"""The typed recipe: everything a run can be told, read from YAML, overridable as `key.sub=value`.

Two parts. *Identity* decides the result and is hashed into the run folder, the checkpoints and the teachers' files.
*Free* (class attribute FREE of each section) says how and where to run, and may change from start to start.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, model_validator

Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Whole = Annotated[int, Field(ge=1, lt=2**31)]
ClassId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]  # of YAML's yes and no neither is a number
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # numpy's and torch's generators take no negative seed
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]  # it becomes a file name


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())


class Data(Section):
    """The labelled images and how they are split. `seed` is apart from the run's, so that runs share a split."""

    FREE: ClassVar = ("path", "download", "workers", "cache_gib")
    name: Literal["digits", "fashion-mnist", "cifar10", "cifar100", "folder", "npz", "csv"]
    path: str | None = None  # a folder or a file; what it must hold is said in the README, data set by data set
    download: bool = False  # let torchvision fetch fashion-mnist, cifar10 or cifar100 into `path`
    seed: Seed = 40
    validation: Fraction = 0.1  # of what is left after the test data
    test: Fraction = 0.1  # only where the data set has no official test split; stratified
    image_size: Whole | None = None  # folder and csv: of decoded images the centre square, resized to this
    image_column: str = "image"  # csv only
    label_column: str = "label"  # csv only
    # csv only: a row whose label holds this has several labels; it is dropped and counted.
    label_separator: Annotated[str, Field(min_length=1)] = "|"
    # Students learn from images without a label as well, by what teachers say of them: npz: x_unlabelled; folder: those in
    # unlabelled/ beside train/; csv: rows without a label.
    unlabelled: bool = False
    workers: Whole = 4  # decoding threads
    cache_gib: NonNegative = 4.0  # of each rank: decode once at the start if all images fit in it, else batch by batch


class Affine(Section):
    degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    translate: Fraction = 0.0
    scale: Fraction = 0.0  # zoom drawn from [1 - scale, 1 + scale]
    shear: Annotated[float, Field(ge=0, lt=90)] = 0.0  # degrees


class RandAugment(Section):
    operations: Whole = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9


class Views(Section):
    """Augmentation of the training images; every draw is a function of (seed, epoch, sample)."""

    crop: Count = 0  # pixels of zero padding before a random crop back to size
    resized_crop: tuple[Positive, Positive] | None = None  # area fractions of torchvision's RandomResizedCrop
    flip: bool = False
    affine: Affine | None = None
    colour: NonNegative = 0.0  # strength of brightness, contrast and saturation jitter
    randaugment: RandAugment | None = None
    # Students see only so many different views of a sample, by epoch modulo this; teachers are trained without a limit.
    finite: Whole | None = None

    @property
    def different(self) -> int | None:
        """How many views of a sample students see before the first comes again; None: new ones in every epoch."""
        drawn = self.crop or self.resized_crop or self.flip or self.affine or self.colour or self.randaugment
        return self.finite if drawn else 1

    @model_validator(mode="after")
    def _range_is_in_order(self):
        if self.resized_crop and not self.resized_crop[0] <= self.resized_crop[1] <= 1:
            raise ValueError(f"resized_crop needs two fractions in ascending order up to 1, found {self.resized_crop}")
        return self


class Model(Section):
    """An architecture by name: pkd's small ones, any of torchvision's classifiers, or `package.module:Class`."""

    name: str
    width: Positive = 1.0  # pkd's own models only
    weights: str | None = None  # a torchvision weights name (such as IMAGENET1K_V1) or a safetensors file
    input_size: Whole | None = None  # pixels a side; None: as the views are
    # Per channel (or one for all) of pixels in [0, 1]; None: as named weights were trained, or as the JSON beside a file of
    # weights says, else 0.5.
    mean: tuple[Finite, ...] | None = None
    std: tuple[Positive, ...] | None = None


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


ModelField = Annotated[Model, BeforeValidator(_named)]


class Optimisation(Section):
    """How one network's weights move."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.05  # never scaled by ranks or batch
    momentum: Fraction = 0.9
    nesterov: bool = False
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: NonNegative = 5e-4
    clip: Positive | None = None  # norm of this network's own gradient
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    warmup_steps: Count = 0
    patience: Count = 3  # plateau: validations without a better loss before lr is multiplied by `factor`; students have one
    # an epoch, teachers one every evaluate_every steps
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    label_smoothing: Fraction = 0.0
    ema: Fraction = 0.0  # decay of the averaged weights that are evaluated and kept; 0: none

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self):
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0: set momentum: 0.9 or nesterov: false")
        return self


class Level(Section):
    """One level of the pyramid: so many teachers by a partition, or explicit lists of classes (ids or names)."""

    model: ModelField
    teachers: Whole | None = None
    # By confusion: groups of classes that the trained top teacher takes for each other; not for the top itself.
    partition: Literal["contiguous", "random", "confusion"] = "contiguous"
    slack: NonNegative = 0.25  # confusion: a group may have so much more or less than its even share of the classes
    classes: tuple[tuple[ClassId | str, ...], ...] | None = None
    steps: Whole | None = None  # of the training of each teacher here; left out: teachers.steps

    @model_serializer(mode="wrap")
    def _as_before_there_were_steps(self, dump):  # so that runs of then keep their identity
        return {key: value for key, value in dump(self).items() if key != "steps" or value is not None}

    @model_validator(mode="after")
    def _one_way(self):
        if (self.teachers is None) == (self.classes is None):
            raise ValueError("a level needs either teachers (a count) or classes (lists), and not both")
        if self.classes is not None and self.partition != "contiguous":
            raise ValueError(f"a level with classes is what they say, and its partition is {self.partition}: leave one out, "
                             "or set teachers and classes: null")
        return self


class Teachers(Optimisation):
    """How every teacher is trained; specialists take as many steps as the top, not as many epochs, unless their level says
    otherwise.
    """

    FREE: ClassVar = ("forward_channels_last",)
    steps: Whole = 1000
    batch: Whole = 64
    evaluate_every: Whole = 200  # steps; the best validation accuracy is what is kept
    forward: Literal["fp32", "bf16"] = "fp32"  # arithmetic of the frozen teacher while students train
    # Layout of its images and weights then, in fp32 (bf16 is always channels last): other last bits. Left out: channels last
    # on GPUs and on CPUs of AVX2 (a ResNet-101 takes 0.84 of the time on an H100, 0.75 with AVX2; 1.15 times with AVX-512).
    forward_channels_last: bool | None = None


class Student(Optimisation):
    name: Name
    model: ModelField


class Objective(Section):
    """The loss. A constant left out takes the kind's own value; pkd/objective.py says which."""

    kind: Literal["composed", "paper", "top", "alone"] = "composed"
    temperature: Positive | None = None
    weights: tuple[NonNegative, ...] | None = None  # paper: one a level from the top down; composed, top: one
    ensemble: tuple[NonNegative, ...] | None = None  # one a student: the pull of the ensemble's cross-entropy
    routes: Literal["own", "all"] | None = None  # paper only: which samples a specialist is asked about
    # paper only: what a teacher's sum over its routes is divided by, their number or the batch's
    denominator: Literal["teacher", "batch"] | None = None


class Archive(Section):
    """Coarser soft targets than fp16, to be stored in less room; students are trained from them online as well."""

    dtype: Literal["fp16", "int8"] = "fp16"  # int8: 256 values from each row's least to its greatest
    top_k: Whole | None = None  # keep so many logits of a row; the other classes share the rest of its probability


class Distill(Section):
    epochs: Whole = 20
    batch: Whole = 64  # samples per optimizer step over all student ranks together
    sync_batch_norm: bool = False
    # torch.compile of the students' forward and backward: other kernels, which the first step makes for a minute or more.
    compile: bool = False


class Placement(Section):
    """Who is where. `auto`: one process is `single`; more are what the planner finds fastest, or `dedicated` where
    student_ranks says how many train, or shards which teachers several ranks hold together. `dedicated` without
    student_ranks gives half of the ranks to the students.
    """

    kind: Literal["auto", "single", "co-located", "dedicated"] = "auto"
    student_ranks: Whole | None = None  # dedicated only
    replicas: dict[str, Whole] = {}  # teacher -> ranks that share its routes; others get spare ranks by cost
    # teacher -> ranks that hold its weights together; others are whole, or on dedicated ranks over as few as hold them
    shards: dict[str, Whole] = {}
    accumulation: Whole = 1  # micro batches per optimizer step on each student rank
    # Islands that students and their ranks are dealt to, each with an engine of its own and the whole batch: no gradients
    # cross between them, and batch statistics are of 1/n as many ranks. As many as students: each has ranks of its own.
    # Left out: one, or with kind auto and neither student_ranks nor shards the number with the shortest predicted step.
    student_groups: Whole | None = None
    memory_gib: Positive | None = None  # of each rank, to be planned with where its device has more


class DeepSpeed(Section):
    """Names of files in ds_configs/, or paths of your own. auto: zero1 on GPUs, zero0 on a CPU, which it is faster on."""

    students: str = "auto"
    teachers: str = "auto"  # while they are trained
    shards: str = "teacher-zero3"  # of frozen teachers that several ranks hold together


class Timeouts(Section):
    start: Positive = 600.0  # seconds without progress before the first step
    step: Positive = 60.0  # the same, in the steady state
    group: Positive = 7200.0  # of the process groups themselves; the watchdog is meant to be first


class Recipe(Section):
    FREE: ClassVar = ("name", "placement", "deepspeed", "window", "answer_steps", "answer_rows", "ballot_every", "exchange",
                      "teacher_views", "timeouts", "threads", "trace", "checkpoint_minutes", "compare_views",
                      "teachers_from", "soft_targets", "tracker")
    name: Name
    seed: Seed = 0
    data: Data
    views: Views = Views()
    pyramid: Annotated[tuple[Level, ...], Field(min_length=1)]
    teachers: Teachers = Teachers()
    students: Annotated[tuple[Student, ...], Field(min_length=1)]
    objective: Objective = Objective()
    archive: Archive = Archive()
    distill: Distill = Distill()
    # Layout of images and weights while training, and on a CPU another way to train depthwise convolutions of low images:
    # kernels (tests/bench/RESULTS-kernels-*). Weights keep the layout in fp32 and ZeRO 0 only.
    channels_last: bool = True
    deterministic: bool = False  # on GPUs: kernels that repeat to the last bit, slower; a CPU always does
    placement: Placement = Placement()
    deepspeed: DeepSpeed = DeepSpeed()
    window: Annotated[int, Field(ge=1, le=64)] = 4  # steps that soft targets may travel ahead of the students
    # Steps that teachers answer together, so that fewer blocks of rows are padded: at most the window, beyond which students
    # would wait, and one where views are sent.
    answer_steps: Annotated[int, Field(ge=1, le=64)] = 4
    # Rows of every teacher forward. More take less time each (128 of a ResNet on a CPU: 0.7 to 0.85 of it) where so many
    # are asked in answer_steps; replicas of a teacher share a batch in whole blocks. Another number: other last bits.
    answer_rows: Annotated[int, Field(ge=16, le=1024, multiple_of=16)] = 32
    ballot_every: Annotated[int, Field(ge=1, le=1000)] = 1  # steps between votes
    # broadcast: every student rank gets all soft targets; direct: only those of its own samples; auto: by size.
    exchange: Literal["auto", "broadcast", "direct"] = "auto"
    # Whether teacher ranks make the views themselves, or are sent those of the student ranks: where decoding is dear.
    teacher_views: Literal["rebuilt", "sent"] = "rebuilt"
    timeouts: Timeouts = Timeouts()
    teachers_from: str | None = None  # a run folder whose teachers are used in place of this run's own
    soft_targets: Literal["online", "archive", "auto"] = "online"  # asked of teachers, or read from what pkd archive wrote
    threads: Whole = 1  # of each process on a CPU; another number changes the last bits of the losses
    trace: bool = False  # write every step's losses to steps.jsonl; costs a reduction a step
    # Write each whole epoch's figures there as well, inside the run folder; its package must be installed; wandb is offline.
    tracker: Literal["tensorboard", "wandb", "mlflow"] | None = None
    checkpoint_minutes: Positive = 10.0
    compare_views: bool = True  # teacher and student ranks compare hashes of their views at each epoch's start

    @property
    def together(self) -> int:
        """Steps that teachers do answer at once."""
        return 1 if self.teacher_views == "sent" else min(self.answer_steps, self.window)

    def training(self, level: int) -> Teachers:
        """How the teachers of a level are trained."""
        steps = self.pyramid[level].steps
        return self.teachers.model_copy(update={"steps": steps}) if steps else self.teachers

    @model_validator(mode="after")
    def _counts_fit(self):
        names = [student.name for student in self.students]
        if len(set(names)) < len(names):
            raise ValueError(f"students' names must differ, found {names}")
        for name, why in (("ensemble", "all of them together are"), ("students", "the list of them is"),
                          ("run", "a run folder's recipe is")):
            if name in names:
                raise ValueError(f"a student is named {name}, as {why} called: give it another name")
        if self.pyramid[0].partition == "confusion":
            raise ValueError("pyramid.0 is the top, which knows every class, but its partition is confusion: leave it out")
        objective, levels = self.objective, len(self.pyramid)
        wanted = {"paper": levels, "composed": 1, "top": 1, "alone": 0}[objective.kind]
        if objective.weights is not None and len(objective.weights) != wanted:
            raise ValueError(f"objective.weights needs {wanted} numbers for the {objective.kind} objective of "
                             f"{levels} levels, found {len(objective.weights)}")
        if objective.ensemble is not None and len(objective.ensemble) != len(names):
            raise ValueError(f"objective.ensemble needs one number a student ({len(names)}), "
                             f"found {len(objective.ensemble)}")
        for key in ("routes", "denominator"):
            if getattr(objective, key) is not None and objective.kind != "paper":
                raise ValueError(f"objective.{key} is a choice of the paper objective only; {objective.kind} fixes it")
        if self.soft_targets == "archive" and self.views.different is None:
            raise ValueError("soft_targets is archive, but views are drawn anew in every epoch: set views.finite to a "
                             "number of views, leave the augmentation out, or set soft_targets to online")
        return self


def part(section: Section, free: bool) -> dict:
    """The identity part (free=False) or the free part (free=True) of a section, as plain JSON data, sections within."""
    out = {}
    for key in type(section).model_fields:
        value = getattr(section, key)
        if key in getattr(section, "FREE", ()):
            if free:
                out[key] = section.model_dump(mode="json", include={key})[key]
        elif isinstance(value, Section) and hasattr(value, "FREE"):
            out[key] = part(value, free)
        elif not free:
            out[key] = section.model_dump(mode="json", include={key})[key]
    return out
