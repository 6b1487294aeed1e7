"""The networks of the benchmark in PyTorch, with given initial weights."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.norm(self.conv(x)), inplace=True)


class Pooled(nn.Module):
    """Mean over all pixels and a dense layer."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(x.mean((2, 3)))


class Embedding(nn.Module):
    """Token and position embedding."""

    def __init__(self, vocabulary: int, width: int, context: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(vocabulary, width))
        self.position = nn.Parameter(torch.empty(context, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.embedding(tokens, self.token) + self.position


class Block(nn.Module):
    """Causal attention and a perceptron, each with a layer norm before and a sum after it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(x.shape))
        hidden = functional.gelu(self.expand(self.mlp_norm(x)), approximate="tanh")
        return x + self.contract(hidden)


class Logits(nn.Module):
    """Layer norm and a dense layer."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(self.norm(x))


def layers(network: dict[str, Any]) -> list[nn.Module]:
    """The layers of a network, input first, without their weights."""
    if network["model"] == "transformer":
        width, vocabulary = network["width"], network["classes"]
        blocks = [Block(width, network["heads"]) for _ in range(network["blocks"])]
        first = Embedding(vocabulary, width, network["context"])
        return [first, *blocks, Logits(width, vocabulary)]
    width = network["width"]
    inner = [ConvNorm(width, width) for _ in range(network["depth"])]
    return [ConvNorm(network["channels"], width), *inner, Pooled(width, network["classes"])]


def load(folder: str) -> dict[str, torch.Tensor]:
    """The arrays of a folder, by name: index.json and one file of raw numbers each."""
    path = pathlib.Path(folder)
    found = {}
    for name, (kind, shape) in json.loads((path / "index.json").read_text()).items():
        raw = bytearray((path / name).read_bytes())
        found[name] = torch.frombuffer(raw, dtype=getattr(torch, kind)).reshape(shape)
    return found


def initialise(net: nn.Sequential, first: int, arrays: dict[str, torch.Tensor]) -> None:
    """Sets the parameters of a part of the network that begins with layer ``first``.

    Raises:
      KeyError: a parameter has no array.
    """
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            layer, _, rest = name.partition(".")
            owner, _, kind = rest.rpartition(".")
            if kind == "weight":
                kind = "scale" if owner.endswith("norm") else "kernel"
            value = arrays[".".join(filter(None, (str(first + int(layer)), owner, kind)))]
            if kind == "kernel":
                value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.t()
            parameter.copy_(value)
