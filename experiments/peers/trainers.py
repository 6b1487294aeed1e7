"""Training loops in PyTorch: one process, data parallel, pipelines, FDG."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining
from torch.func import functional_call
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

Batch = tuple[torch.Tensor, torch.Tensor]
# A transfer under way, and its buffer.
Message = tuple[Any, torch.Tensor]
PIPELINES = {
    "gpipe_torch": pipelining.ScheduleGPipe,
    "one_f_one_b_torch": pipelining.Schedule1F1B,
    "zero_bubble_torch": pipelining.ScheduleInterleavedZeroBubble,
}


def loss_of(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, the mean over images or tokens."""
    return functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())


class Trainer:
    """A loop that is told how many steps to train.

    Args:
      net: the network, or the part of it that this process trains.
      batch: inputs and labels, of the whole mini-batch.
      settings: of the optimizer, the number of processes and this one's rank.
    """

    def __init__(self, net: nn.Module, batch: Batch, settings: dict[str, Any]) -> None:
        self.net, self.settings = net, settings
        self.inputs, self.labels = batch
        self.rank, self.size = settings["rank"], settings["processes"]
        self.loss: float | None = None

    def optimizer(self) -> torch.optim.Optimizer:
        names = ("momentum", "weight_decay")
        options = {name: self.settings[name] for name in names}
        return torch.optim.SGD(self.net.parameters(), lr=self.settings["learning_rate"], **options)

    def turn(self, steps: int) -> float:
        """Trains; returns the seconds."""
        start = time.perf_counter()
        loss = None
        for _ in range(steps):
            loss = self.step()
        seconds = time.perf_counter() - start
        self.loss = None if loss is None else loss.item()
        return seconds

    def step(self) -> torch.Tensor | None:
        """One step; the loss where this process has it."""
        raise NotImplementedError


class Whole(Trainer):
    """The whole network in this process; data parallel if there are several."""

    def __init__(self, net: nn.Module, batch: Batch, settings: dict[str, Any]) -> None:
        super().__init__(net, batch, settings)
        if self.size > 1:
            self.inputs = self.inputs.chunk(self.size)[self.rank].clone()
            self.labels = self.labels.chunk(self.size)[self.rank].clone()
            # As published, with its defaults; running statistics need not be the same everywhere.
            self.net = DistributedDataParallel(net, broadcast_buffers=False)
        self.sgd = self.optimizer()

    def step(self) -> torch.Tensor:
        loss = loss_of(self.net(self.inputs), self.labels)
        self.sgd.zero_grad(set_to_none=True)
        loss.backward()
        self.sgd.step()
        return loss


class Layout(torch.autograd.Function):
    """Images in another memory format, and their gradient back in the first."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, to: torch.memory_format, back: torch.memory_format
    ) -> torch.Tensor:
        ctx.back = back
        return x.contiguous(memory_format=to)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.contiguous(memory_format=ctx.back), None, None


class ContiguousMessages(nn.Module):
    """A stage of images with the last axis of channels; only contiguous tensors can be sent."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside, outside = torch.channels_last, torch.contiguous_format
        y = self.net(Layout.apply(x, inside, outside) if x.ndim == 4 else x)
        return Layout.apply(y, outside, inside) if y.ndim == 4 else y


class Pipelined(Trainer):
    """A schedule of torch.distributed.pipelining, one stage a process."""

    def __init__(self, net: nn.Module, batch: Batch, settings: dict[str, Any]) -> None:
        super().__init__(net, batch, settings)
        whole = ContiguousMessages(net)
        stage = pipelining.PipelineStage(whole, self.rank, self.size, torch.device("cpu"))
        kind = PIPELINES[settings["name"]]
        single = issubclass(kind, pipelining.schedules.PipelineScheduleSingle)
        self.schedule = kind(
            stage if single else [stage], settings["microbatches"], loss_fn=loss_of
        )
        self.sgd = self.optimizer()

    def step(self) -> torch.Tensor | None:
        self.sgd.zero_grad(set_to_none=True)
        inputs = (self.inputs,) if self.rank == 0 else ()
        if self.rank < self.size - 1:
            self.schedule.step(*inputs)
            loss = None
        else:
            losses: list[torch.Tensor] = []
            self.schedule.step(*inputs, target=self.labels, losses=losses)
            loss = torch.stack(losses).mean().detach()
        self.sgd.step()
        return loss


class Delayed(Trainer):
    """FDG: stage k learns from the mini-batch of 2 (K - 1 - k) ticks ago, at its forward's weights.

    A tick's messages are used in the next tick. New weights are new tensors, since what a backward
    needs of the old ones is kept.
    """

    def __init__(self, net: nn.Module, batch: Batch, settings: dict[str, Any]) -> None:
        super().__init__(net, batch, settings)
        own = net.named_parameters()
        self.params = {name: p.detach().clone().requires_grad_() for name, p in own}
        self.momentum = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.first, self.last = self.rank == 0, self.rank == self.size - 1
        self.delay = 2 * (self.size - 1 - self.rank)
        self.flights: dict[int, tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]] = {}
        self.ticks = 0
        self.sent: list[Message] = []
        self.activation: Message | None = None
        self.cotangent: Message | None = None

    def step(self) -> torch.Tensor | None:
        """One tick: forward of one mini-batch, backward and update of another."""
        n = self.ticks - self.rank  # that goes forward
        self.ticks += 1
        if n < 0:
            if n == -1:
                self.activation = self.receive(self.rank - 1, self.settings["shapes"][self.rank])
            return None
        for work, _ in self.sent:
            work.wait()
        self.sent = []
        x = self.inputs if self.first else self.arrived(self.activation).requires_grad_()
        params = self.params
        y = functional_call(self.net, params, (x,))
        loss = loss_of(y, self.labels) if self.last else None
        self.flights[n] = params, x, y if loss is None else loss
        if not self.last:
            self.send(y.detach(), self.rank + 1)
        old = n - self.delay
        if old >= 0:
            down = self.backward(old, None if self.last else self.arrived(self.cotangent))
            if down is not None:
                self.send(down, self.rank - 1)
        if not self.first:
            self.activation = self.receive(self.rank - 1, x.shape)
        if not self.last and old >= -1:
            self.cotangent = self.receive(self.rank + 1, y.shape)
        return None if loss is None else loss.detach()

    def backward(self, n: int, cotangent: torch.Tensor | None) -> torch.Tensor | None:
        """Applies the gradient of a mini-batch; returns that of its input, but in stage 0."""
        params, x, y = self.flights.pop(n)
        wanted = [*params.values()] + ([] if self.first else [x])
        found = torch.autograd.grad(y, wanted, cotangent)
        rate, decay = self.settings["learning_rate"], self.settings["weight_decay"]
        new = {}
        with torch.no_grad():
            for (name, p), gradient in zip(self.params.items(), found, strict=False):
                m = self.momentum[name].mul_(self.settings["momentum"])
                m.add_(gradient).add_(p, alpha=decay)
                new[name] = torch.add(p, m, alpha=-rate).requires_grad_()
        self.params = new
        return None if self.first else found[-1]

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        tensor = tensor.contiguous()
        self.sent.append((dist.isend(tensor, rank), tensor))

    def receive(self, rank: int, shape: Sequence[int]) -> Message:
        buffer = torch.empty(shape)
        return dist.irecv(buffer, rank), buffer

    def arrived(self, message: Message | None) -> torch.Tensor:
        assert message is not None
        message[0].wait()
        return message[1]
