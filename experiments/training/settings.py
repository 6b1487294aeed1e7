"""Help texts of the flags of all programs; their values are in `Config`."""

from __future__ import annotations

from experiments.training import config, family, methods, remedies, writers


def help_texts(examples: str, optimizers: tuple[str, ...]) -> dict[str, str]:
    """The help text of each flag; programs add those of their data and networks.

    Args:
      examples: the contents of a mini-batch, such as "Images".
      optimizers: the program's optimizers.

    Returns:
      Texts by flag name.
    """
    return {
        **HELP,
        **family.HELP,
        **remedies.help_texts(optimizers),
        "batch_size": f"{examples} a mini-batch.",
    }


HELP = {
    "warmup_steps": "Steps in which the learning rate rises linearly from 0; 0: none.",
    "workdir": "Folder for config.json, metrics.jsonl, summary.json, curves.png and checkpoints.",
    "num_stages": "K: the number of modules that the network is split into.",
    "devices_per_stage": "Devices that share every mini-batch of a stage, as many parts of it.",
    "shard_optimizer": "Whether a stage's devices share its optimizer's state out among them, "
    "where they would each keep all of it.",
    "message_dtype": "Of activations and gradients between stages, one of "
    f"{config.MESSAGE_DTYPES}; float32 sends them as they are.",
    "partition": "How to split: by time, measured once and kept in the cache; by flops, which "
    "repeats everywhere; or at the layer numbers given, such as 3,5.",
    "method": f"One of {', '.join(methods.METHODS)}.",
    "order": "What a stage of fdg, dsp, adl, petra and paci does first in a tick: one of "
    f"{config.ORDERS}.",
    "beta": "Gradient shrinking factor in (0, 1]; 1 does not shrink.",
    "gradient": "Gradient rule: which weights a delayed backward uses, and what is kept for it; "
    f"one of {config.GRADIENTS}; fr, dsp, petra, paci and pipemare have their own.",
    "microbatches": "Micro-batches per mini-batch in gpipe, one_f_one_b and zero_bubble.",
    "accumulate": "Backwards per update in adl, paci (default 2), petra (1) and pipedream_2bw (K).",
    "reduction": f"What adl applies of the accumulated gradients: one of {config.REDUCTIONS}.",
    "epochs": "Passes over the train split.",
    "steps": "Mini-batches in all; overrides epochs unless 0.",
    "eval_every_epochs": "Epochs between evaluations.",
    "eval_every_steps": "Steps between evaluations; overrides eval_every_epochs unless 0.",
    "log_every_steps": "Steps between lines of metrics.jsonl.",
    "max_ahead": "Ticks that the host may be ahead of the devices.",
    "on_nonfinite": "What becomes of a mini-batch whose loss or gradient is NaN or infinite: stop "
    "ends the run, with status 1, and names it; skip leaves it out in the stage concerned.",
    "checkpoint_every_steps": "Steps between checkpoints of the run, in the workdir, beside one "
    "after every evaluation that is the best so far; 0: none.",
    "checkpoint_every_minutes": "A checkpoint also after so many minutes without one; 0: none.",
    "keep_checkpoints": "How many of the newest checkpoints stay, beside the one of the best "
    "evaluation.",
    "timeline": "Ticks of which is recorded what ran when, as soon as all programs have been "
    "compiled: timeline.json (for Perfetto) and timeline.png; 0: none.",
    "profile": "Ticks after those that JAX's profiler traces, into the workdir's folder profile, "
    "for TensorBoard or XProf; 0: none.",
    "writers": f"Where metrics go beside metrics.jsonl: any of {', '.join(writers.WRITERS)}, with "
    "commas. wandb is offline unless WANDB_MODE says otherwise.",
    "resume": "Whether an unfinished run in the workdir goes on from its newest good checkpoint, "
    "as if it had never stopped; --noresume refuses a workdir that holds a run.",
    "overwrite": "Whether an earlier run in the workdir is replaced, finished or not.",
}
