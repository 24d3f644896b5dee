"""Batch normalisation (Ioffe and Szegedy 2015) that survives 16-bit parameters, CPU tensors and uneven batches.

torch's own fails with bf16 parameters beside fp32 running statistics, and torch's SyncBatchNorm refuses the CPU.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pkd.errors import UserError


class Float32Buffers(nn.Module):
    """A module whose own floating-point buffers stay float32, with their exact values, through every cast.

    Moves between devices (the meta device too) and integer buffers are as in any module. Submodules are not concerned.
    """

    def _apply(self, fn, recurse=True):
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after.is_floating_point() and after.dtype != torch.float32:
                self._buffers[name] = buffer.to(after.device, torch.float32)
        return self


class _SumOverGroup(torch.autograd.Function):
    """Sum of a tensor over the ranks of a group.

    Every rank's loss sees the sum, hence the gradient of the ranks' added losses is the sum of the ranks' gradients.
    """

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class BatchNorm(Float32Buffers, nn.BatchNorm2d):
    """Batch normalisation of [n, features, ...] over all dimensions but the second; state_dict as nn.BatchNorm2d's.

    The input may have any floating dtype and the output has the same; parameters may have another; running statistics
    and arithmetic are float32. In training, statistics are those of this rank's batch (`group` None), or those of all
    ranks of `group`, a process group of any backend; batches may then differ in size from rank to rank, even be empty,
    but every rank of the group must take part in each forward and backward. In eval mode there is never a collective.

    A deep copy or a pickle has group None, for a process group cannot be copied.

    Raises UserError when training on one value per channel without a group: it has no variance.
    """

    group: dist.ProcessGroup | None = None

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
                 track_running_stats: bool = True, device=None):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "group"}

    def forward(self, input: Tensor) -> Tensor:
        if input.is_meta:  # only shapes matter there, and torch would go through dozens of operators for them
            return torch.empty_like(input)
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        if self.training and self.group is not None:
            return self._over_group(input.float(), weight, bias).to(input.dtype)
        count = input.numel() // self.num_features
        if self.training and count == 1:
            raise UserError(f"batch normalisation in training was given 1 value per channel (input "
                            f"{list(input.shape)}), which has no variance: use micro batches of at least 2 images, a "
                            "larger input_size or distill.sync_batch_norm: true")
        learns = self.training and count > 0  # an empty batch has no statistics, and must not move the running ones
        # torch's kernels take 16-bit values beside float32 parameters and statistics, and reckon in float32.
        return F.batch_norm(input, self.running_mean, self.running_var, weight, bias,
                            learns or self.running_mean is None, self._factor() if learns else 0.0, self.eps)

    def _factor(self) -> float:
        """Weight of this batch in the running statistics; counts the batch."""
        if self.num_batches_tracked is None:
            return 0.0
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _over_group(self, values: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Two passes, mean first and squared deviations from it second: one pass loses digits where |mean| >> std."""
        dims = [0, *range(2, values.dim())]
        shape = [1, -1] + [1] * (values.dim() - 2)
        count = values.new_full((1,), values.numel() // self.num_features)  # made on the device: no synchronisation
        total = _SumOverGroup.apply(torch.cat([values.sum(dims), count]), self.group)
        count = total[-1].detach().clamp(min=1)
        mean = total[:-1] / count
        centred = values - mean.view(shape)
        squares = _SumOverGroup.apply(centred.square().sum(dims), self.group)
        self._track(mean.detach(), squares.detach(), count)
        scale = torch.rsqrt(squares / count + self.eps)
        if weight is not None:
            scale = scale * weight
        out = centred * scale.view(shape)
        return out if bias is None else out + bias.view(shape)

    def _track(self, mean: Tensor, squares: Tensor, count: Tensor) -> None:
        """Running mean and unbiased running variance; a batch of fewer than two values in all changes neither."""
        if self.running_mean is None:
            return
        factor = self._factor() * (count > 1)
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(squares / (count - 1).clamp(min=1), factor)


def _converted(norm: nn.Module) -> BatchNorm:
    new = BatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta")
    new.weight, new.bias = norm.weight, norm.bias
    for name in ("running_mean", "running_var"):
        statistic = getattr(norm, name)
        setattr(new, name, None if statistic is None else statistic.float())
    new.num_batches_tracked = norm.num_batches_tracked
    return new.train(norm.training)


def convert(module: nn.Module) -> nn.Module:
    """`module` with every BatchNorm1d, 2d, 3d and SyncBatchNorm in it replaced by BatchNorm, in place.

    Parameters stay the same objects; statistics, eps, momentum, affine, track_running_stats and the mode are kept. A
    norm used in several places stays one norm. Returns `module`, or the new norm if `module` itself was one.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    new = {norm: _converted(norm) for norm in module.modules() if isinstance(norm, kinds)
           and not isinstance(norm, BatchNorm)}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():  # named_children() would name a shared norm only once
            if child in new:
                setattr(parent, name, new[child])
    return new.get(module, module)


def set_group(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Makes every BatchNorm in `module` share statistics over `group`, or (None) keep to this rank's own."""
    for norm in module.modules():
        if isinstance(norm, BatchNorm):
            norm.group = group
