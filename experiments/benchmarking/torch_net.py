"""The network of the benchmark in PyTorch, trained in its own process.

Run by `experiments.benchmarking.torch_row`, with any Python that has torch; nothing else is
imported. Reads a number of steps per line and answers each with a line of JSON; ends at the end of
its input.
"""

import json
import sys
import time

import torch
from torch import nn

# After this time OpenMP threads have stopped spinning, in every library used by torch.
SETTLE_SECONDS = 0.3


class Trainer:
    """A plain convolutional network and its training loop in idiomatic PyTorch."""

    def __init__(self, settings: dict, memory_format: torch.memory_format) -> None:
        torch.manual_seed(settings["seed"])
        channels, width, size = settings["channels"], settings["width"], settings["image_size"]
        layers: list[nn.Module] = []
        for i in range(settings["depth"] + 1):
            layers += [
                nn.Conv2d(width if i else channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, settings["classes"])]
        self.net = nn.Sequential(*layers, *head).to(memory_format=memory_format)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(),
            lr=settings["learning_rate"],
            momentum=settings["momentum"],
            weight_decay=settings["weight_decay"],
        )
        images = torch.randn(settings["batch_size"], channels, size, size)
        self.images = images.to(memory_format=memory_format)
        self.labels = torch.randint(settings["classes"], (settings["batch_size"],))

    def turn(self, steps: int) -> tuple[float, float]:
        """Seconds, and the last loss."""
        loss = torch.zeros(())
        start = time.perf_counter()
        for _ in range(steps):
            loss = nn.functional.cross_entropy(self.net(self.images), self.labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        seconds = time.perf_counter() - start
        return seconds, loss.item()


def main() -> None:
    settings = json.loads(sys.argv[1])
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    trainers = {name: Trainer(settings, chosen) for name, chosen in formats.items()}
    trial = {}
    for name, trainer in trainers.items():
        trainer.turn(2)
        trial[name] = min(trainer.turn(1)[0] for _ in range(5))
    fastest = min(trial, key=trial.__getitem__)
    trainer = trainers.pop(fastest)
    trainers.clear()
    ready = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "memory_format": fastest,
        "trial_seconds": trial,
        "parameters": sum(p.numel() for p in trainer.net.parameters()),
    }
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        seconds, loss = trainer.turn(int(line))
        used = time.process_time()
        time.sleep(SETTLE_SECONDS)
        settling = time.process_time() - used
        answer = {"seconds": seconds, "loss": loss, "settling_cpu_seconds": settling}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
