"""Trains a network of the benchmark in PyTorch, in turns of as many steps as each input line says.

Run by `experiments.benchmarking.torch_row`, with any Python that has torch. Its argument is a line
of JSON. It writes a line of JSON when it is ready, and one after each turn; the end of the input
ends it.
"""

import json
import os
import pathlib
import sys
import time

SETTLE_SECONDS = 0.3  # after which no OpenMP thread spins any more, whichever library torch has


def main() -> None:
    settings = json.loads(sys.argv[1])
    if settings["core"] is not None:
        # Before torch counts the cores and starts its threads.
        os.sched_setaffinity(0, {settings["core"]})
        os.environ["OMP_NUM_THREADS"] = "1"
    # -I keeps this folder from shadowing other modules.
    sys.path.append(str(pathlib.Path(__file__).parent))
    import torch
    from network import initialise, layers, load
    from trainers import PIPELINES, Delayed, Pipelined, Trainer, Whole

    arrays = load(settings["folder"])
    first, end = settings["layers"]

    images = arrays["inputs"].ndim == 4

    def made(memory_format: torch.memory_format) -> Trainer:
        parts = layers(settings["network"])
        count = sum(p.numel() for part in parts for p in part.parameters())
        settings["parameters"] = count
        net = torch.nn.Sequential(*parts[first:end])
        initialise(net, first, arrays)
        inputs, labels = arrays["inputs"], arrays["labels"].long()
        if images:
            net = net.to(memory_format=memory_format)
            inputs = inputs.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
        kind = Whole
        if settings["name"] in PIPELINES:
            kind = Pipelined
        elif settings["name"] == "fdg_torch":
            kind = Delayed
        return kind(net, (inputs, labels), settings)

    if settings["processes"] > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{settings['port']}",
            rank=settings["rank"],
            world_size=settings["processes"],
        )
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    trial = {}
    if settings["processes"] == 1 and images:
        for name, chosen in formats.items():
            trainer = made(chosen)
            trainer.turn(2)
            trial[name] = min(trainer.turn(1) for _ in range(5))
    fastest = min(trial, key=trial.__getitem__, default="channels_last")
    trainer = made(formats[fastest])
    trainer.turn(1 if settings["name"] != "fdg_torch" else settings["processes"])
    ready = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "memory_format": fastest,
        "trial_seconds": trial,
        "parameters": settings["parameters"],
        "first_loss": trainer.loss,
    }
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        if settings["processes"] > 1:
            torch.distributed.barrier()
        seconds = trainer.turn(int(line))
        used = time.process_time()
        time.sleep(SETTLE_SECONDS)
        settling = time.process_time() - used
        answer = {"seconds": seconds, "loss": trainer.loss, "settling_cpu_seconds": settling}
        print(json.dumps(answer), flush=True)
    os._exit(0)  # the other processes may have gone already; nothing is left to do


if __name__ == "__main__":
    main()
