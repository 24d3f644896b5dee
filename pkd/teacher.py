"""Frozen teachers on the ranks that answer for them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from pkd.errors import LocalError
from pkd.models import Network
from pkd.row_format import RowFormat
from pkd.schedule import BLOCK, Routes
from pkd.sharded import ShardedNetwork
from pkd.transfer import OnItsWay, to_device
from pkd.views import Views


@dataclass(frozen=True)
class Question:
    """What is asked in one step."""

    routes: Routes
    ids: np.ndarray  # int64 [batch], the step's samples in global order
    flat: torch.Tensor  # fp16 on the host, where the answers belong
    images: torch.Tensor | None = None  # views of the samples that the source is asked about, if they need not be rebuilt

    def write(self, rows: np.ndarray, logits: torch.Tensor) -> None:
        """Put a teacher's answers, fp16 [routes, width], where routes `rows` of the step belong."""
        if len(rows) == 0:
            return
        offset, width = self.routes.offset[rows], logits.shape[1]
        apart = np.flatnonzero(np.diff(offset) != width) + 1  # where the rows of another part of the batch begin
        for first, last in pairwise([0, *apart.tolist(), len(rows)]):
            start = int(offset[first])
            self.flat[start:start + (last - first) * width].view(-1, width).copy_(logits[first:last])


class TeacherHost:
    """The teachers of one source.

    networks: index into pyramid.teachers -> network. Teachers always run in blocks of `block` rows, the last one padded:
    with other numbers of rows the same image's logits differ in their last bits, and placements would no longer agree.
    formats: how each teacher's rows are rounded beyond fp16; without any they are left as they are.
    sends: whether this rank's answers are used; of the ranks that hold a teacher together, the first one's are.
    works: told after each block of answers, which are progress. names: of teachers, for what is said about one.
    channels_last: of fp32 networks; None: as is faster on the device.
    """

    def __init__(self, source: int, networks: dict[int, Network | ShardedNetwork], views: Views, device: torch.device,
                 bf16: bool, formats: dict[int, RowFormat] | None = None, sends: bool = True,
                 works: Callable[[], None] = lambda: None, names: Sequence[str] = (), block: int = BLOCK,
                 channels_last: bool | None = None):
        self.formats = {index: form for index, form in (formats or {}).items() if not form.plain}
        self.source, self.views, self.device, self.sends, self.works = source, views, device, sends, works
        self.names, self.block = names, block
        self.networks, last = {}, images_last(channels_last, device)
        for index, network in networks.items():
            whole = isinstance(network, Network)
            self.networks[index] = as_it_answers(network, bf16, last).to(device).eval().requires_grad_(False) if whole \
                else network
        # DeepSpeed exchanges the data of parameters, which inference mode forbids, and chooses streams of its own.
        self.whole = all(isinstance(network, Network) for network in networks.values())
        # On a GPU teachers have a stream of their own, beside what the same rank trains. Images come from the host and
        # answers lie there at last: after the weights, nothing on the device crosses streams.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and self.whole else None
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def answer(self, questions: list[Question], epoch: int) -> None:
        """Write this source's soft targets of some steps of an epoch into its slices of their flat buffers."""
        with self._frozen():
            positions, images = self._seen(questions, epoch)
            first = np.cumsum([0, *map(len, positions)])  # of each question's images
            begun = []  # all teachers, before the first is waited for: a device has work as long as there is any
            for index in self.networks:
                rows = [np.flatnonzero((q.routes.source == self.source) & (q.routes.teacher == index)) for q in questions]
                asked = np.concatenate([start + np.searchsorted(there, q.routes.position[own])
                                        for q, own, start, there in zip(questions, rows, first, positions)])
                if len(asked):
                    begun.append((index, rows, self._begin(index, _rows(images, asked))))
        for index, rows, answers in begun:
            logits = self._finite(index, answers)
            if not self.sends:
                continue
            if index in self.formats:
                form = self.formats[index]
                logits = form.decode(form.encode(logits))
            for question, own, part in zip(questions, rows, logits.split([len(own) for own in rows])):
                question.write(own, part)

    def _seen(self, questions: list[Question], epoch: int) -> tuple[list[np.ndarray], torch.Tensor]:
        """Of each question the positions in its batch that this source is asked about, ascending, and all their views on
        the device, to which each crosses once, whatever the number of teachers that are asked about it.
        """
        positions = [np.unique(q.routes.position[q.routes.source == self.source]) for q in questions]
        views = []
        for question, own in zip(questions, positions):
            images = self.views.batch(torch.from_numpy(question.ids[own]), epoch) if question.images is None \
                else question.images[:len(own)]
            views.append(to_device(images, self.device))
            self.works()  # decoding may be slow, and here are many steps' images
        return positions, views[0] if len(views) == 1 else torch.cat(views)

    def forward(self, index: int, images: torch.Tensor) -> torch.Tensor:
        """Centred logits, fp16 [images, classes of the teacher] on the host, of any number of images, which are there too.

        Raises LocalError if not finite.
        """
        with self._frozen():
            answers = self._begin(index, to_device(images, self.device))
        return self._finite(index, answers)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        with torch.inference_mode() if self.whole else torch.no_grad(), torch.cuda.stream(self.stream):
            yield

    def _begin(self, index: int, images: torch.Tensor) -> OnItsWay:
        """A teacher's centred logits of images on the device, on their way to the host."""
        network, parts = self.networks[index], []
        for block in images.split(self.block):
            padding = block.new_zeros((self.block - len(block), *block.shape[1:]))
            padded = torch.cat([block, padding]) if len(padding) else block
            parts.append(centred(network(padded)[:len(block)]))
            self.works()
        return OnItsWay(torch.cat(parts))

    def _finite(self, index: int, answers: OnItsWay) -> torch.Tensor:
        logits = answers.wait()
        self.works()
        if not bool(torch.isfinite(logits).all()):
            name = self.names[index] if self.names else index
            raise LocalError(f"teacher {name} answers with logits that are not finite or beyond "
                             "what fp16 holds (65504): its training diverged, so train it again in another "
                             "--run-folder with a lower teachers.lr or with teachers.warmup_steps")
        return logits


def _rows(images: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """images[rows], without a copy where these are all."""
    if np.array_equal(rows, np.arange(len(images))):
        return images
    return images[to_device(torch.from_numpy(rows), images.device)]


def as_it_answers(network: Network, bf16: bool, channels_last: bool, whole: bool = True) -> Network:
    """The network in its arithmetic and layout; whole: whether its weights keep a layout that they are given."""
    network = network.to(torch.bfloat16) if bf16 else network
    if not (bf16 or channels_last):
        return network
    network.use_channels_last(weights=whole)
    for layer in network.modules() if network.channels_last and not whole else ():
        if type(layer) is nn.Conv2d:
            layer.__class__ = LaidOut
    return network


class LaidOut(nn.Conv2d):
    """A convolution that lays its weights out channels last at each call: kernels, and so last bits, go by that."""

    def _conv_forward(self, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # Not contiguous(): to it weights of one channel or pixel lie so already, but kernels go by the very strides.
        return super()._conv_forward(images, weight.to(memory_format=torch.channels_last), bias)


def images_last(wish: bool | None, device: torch.device) -> bool:
    """Whether images of fp32 teachers lie channels last; without a wish by the kind of device alone, so that it is the same
    at every start (tests/bench/RESULTS-kernels-*.md).
    """
    if wish is not None:
        return wish
    return device.type == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX2"


def centred(logits: torch.Tensor) -> torch.Tensor:
    """Rows minus their mean, in fp16: a softmax does not see the shift, and fp16 keeps 11 bits of what is left."""
    exact = logits.double()  # a mean in float32 may differ in its last bit with the number of rows beside it
    return (exact - exact.mean(1, keepdim=True)).half()
