"""Kills trainings repeatedly and checks that every run ends as without kills.

    python -m tests.kills --kills=192 --output=runs/kills

Trains each of `SETTINGS`, of experiments.cifar or experiments.lm, once undisturbed and once with
SIGKILL at its share of the moments: chosen ones, at which the program kills itself (watched.py),
and random times, from outside. After each kill the command is repeated. In the end summary.json
with the SHA-256 of the parameters, and metrics.jsonl, must equal those of the undisturbed run,
except times.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import random
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.common import command
from experiments.common.errors import UsageError
from tests.kills.plan import SETTINGS, Setting, plan
from tests.kills.run import make_data, torment

FLAGS = flags.FLAGS
SETTING = [field.name for field in dataclasses.fields(Setting)]


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Kills by setting and by phase, in Markdown."""
    mains = ("start", "fill", "steady", "evaluation", "drain", "end")
    saves = ("copies", "arrays", "manifest", "rename", "removing")
    lines = [
        f"| method | gradient | with | K | kills | {' | '.join(mains)} | in a save | "
        "back into the fill | runs equal |",
        "| --- | --- | --- " + "| ---: " * (len(mains) + 5) + "|",
    ]
    for result in results:
        kills = result["kills"]
        phases = [sum(k["main"] == name for k in kills) for name in mains]
        during = sum(k["save"] != "none" for k in kills)
        equal = sum(not found for found in result["differences"])
        setting = Setting(**{name: result[name] for name in SETTING})
        with_ = ", ".join(setting.extras)
        cells = [setting.method, setting.gradient, with_, setting.num_stages, len(kills), *phases]
        fill = setting.fill
        back = sum(0 < k["newest"] < fill for k in kills)
        cells += [during, back, f"{equal} of {len(result['differences'])}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    every = [kill for result in results for kill in result["kills"]]
    lines += ["", f"| the loop is in | kills | no save | {' | '.join(saves)} |"]
    lines += ["| --- " + "| ---: " * (len(saves) + 2) + "|"]
    for name in (*mains, "all"):
        found = collections.Counter(k["save"] for k in every if name in (k["main"], "all"))
        cells = [found.total(), found["none"], *(found[save] for save in saves)]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    aimed = sum(kill["how"] == "aimed" for kill in every)
    lines += ["", f"{len(every)} kills, {aimed} aimed, {len(every) - aimed} from outside."]
    if missed := sum(len(result["missed"]) for result in results):
        lines += [f"{missed} more were planned for moments that no run came to."]
    return "\n".join(lines)


def main() -> None:
    first, _, last = FLAGS.settings.partition(":")
    try:
        chosen = SETTINGS[int(first or 0) : int(last or len(SETTINGS))]
    except ValueError:
        raise UsageError(f"--settings={FLAGS.settings}: give first:last, such as 0:4") from None
    output = pathlib.Path(FLAGS.output)
    data = output / "data"
    try:
        shutil.rmtree(data, ignore_errors=True)
        make_data(data)
    except OSError as error:
        raise UsageError(f"--output={output}: cannot be written ({error}); name another") from error
    share = -(-FLAGS.kills // len(SETTINGS))
    for setting in chosen:
        folder = output / setting.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        # One seed per setting, so that its kills do not depend on the other settings.
        orders = plan(setting, share, random.Random(f"{FLAGS.seed} {setting.name}"))
        result = torment(setting, orders, data, folder)
        (folder / "kills.json").write_text(json.dumps(result, indent=2) + "\n")
    done = [output / setting.name / "kills.json" for setting in SETTINGS]
    results = [json.loads(path.read_text()) for path in done if path.exists()]
    print(tables(results))
    if any(found for result in results for found in result["differences"]):
        sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 192, "In all; every setting gets an equal share.", lower_bound=1)
    flags.DEFINE_string("output", None, "Folder for runs and results.", required=True)
    flags.DEFINE_string("settings", "", "first:last of the settings; empty: all.")
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    command.run(main)
