"""Figures that documents quote equal the committed results they come from."""

import json
import pathlib
import re
import statistics

import pytest

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "results"
# Studies whose tables stand in EXPERIMENTS.md as the program wrote them.
STUDIES = ("family_cifar10", "staleness_cifar10", "staleness_text", "staleness_text_long")
CONTENDERS = {
    "backprop": "backprop, one device, both cores",
    "backprop_one_core": "backprop, one core",
    "engine_k1": "engine, K = 1",
    "data_parallel": "data parallel",
    "gpipe": "GPipe, 4 micro-batches",
    "one_f_one_b": "1F1B with flush, 4 micro-batches",
    "ddg": "DDG",
    "fdg_recompute_stale": "FDG, recompute_stale",
    "fdg_recompute": "FDG, recompute",
    "backprop_torch": "PyTorch 2.13, both cores",
}
PEERS = {
    "backprop": "JAX, one device, both cores",
    "backprop_one_core": "JAX, one core",
    "data_parallel": "JAX, data parallel",
    "one_f_one_b": "1F1B",
    "fdg": "FDG",
    "fdg_two_processes": "FDG, two processes",
    "backprop_torch": "PyTorch, two threads",
    "backprop_torch_one_core": "PyTorch, one core",
    "ddp_torch": "PyTorch, DistributedDataParallel",
    "gpipe_torch": "PyTorch, GPipe",
    "one_f_one_b_torch": "PyTorch, 1F1B",
    "zero_bubble_torch": "PyTorch, zero-bubble",
    "fdg_torch": "PyTorch, FDG",
}


def text(document: str) -> str:
    """A document with single spaces for all white space and without emphasis."""
    found = (ROOT / document).read_text(encoding="utf-8").replace("**", "")
    if document.endswith(".ipynb"):
        cells = json.loads(found)["cells"]
        found = "\n".join("".join(cell["source"]) for cell in cells)
    return " ".join(found.split())


def contender(benchmark: str, name: str) -> dict:
    results = json.loads((RESULTS / benchmark / "benchmark.json").read_text())
    return next(each for each in results["contenders"] if each["name"] == name)


def speedups(benchmark: str, name: str, of: str = "fdg") -> list[float]:
    """How many times as fast ``of`` is, round by round."""
    return [1 / ratio for ratio in contender(benchmark, name)["over"][of]["rounds"]]


def speedup(benchmark: str, name: str, of: str = "fdg") -> float:
    return statistics.median(speedups(benchmark, name, of))


def ended(study: str, row: str, percent: bool = False) -> tuple[float, float]:
    """Mean and sample standard deviation of a row's last error or loss."""
    rows = json.loads((RESULTS / study / "results.json").read_text())["rows"]
    last = next(each for each in rows if each["name"] == row)["last"]
    factor = 100 if percent else 1
    return factor * statistics.mean(last), factor * statistics.stdev(last)


def cifar(row: str) -> tuple[float, float]:
    return ended("staleness_cifar10", row, percent=True)


def quickstart(field: str) -> str | float:
    return json.loads((RESULTS / "quickstart" / "summary.json").read_text())[field]


def quotes() -> list[tuple[str, str]]:
    """Documents, and what stands in them, white space and emphasis aside."""
    one, both, new = "backprop_one_core", "backprop", "_jax012"
    cpu, resnet = "benchmark_cpu", "benchmark_resnet56"
    three = cpu, resnet, "benchmark_peers_transformer"
    gains = [
        ("on one core", *(speedup(each, one) for each in three)),
        ("on both cores, jax 0.10", *(speedup(each, both) for each in three)),
        ("on both cores, jax 0.12", speedup(cpu + new, both), speedup(resnet + new, both)),
    ]
    found = []
    for words, *values in gains:
        cells = " | ".join(f"{value:.2f}" for value in values)
        found.append(("README.md", f"| back-propagation {words} | {cells} |"))
    sgd = [cifar(row)[0] for row in ("backprop, SGD", "FDG, K = 4, SGD", "FDG, K = 4, SGD recipe")]
    muon = [cifar(row)[0] for row in ("backprop, Muon", "FDG, K = 4, Muon recipe")]
    adamw, short, long = (
        [ended(study, f"{row}{optimizer}{recipe}")[0] for row, recipe in ROWS]
        for study, optimizer in (
            ("staleness_text", "AdamW"),
            ("staleness_text", "Muon"),
            ("staleness_text_long", "Muon"),
        )
    )
    found += [
        ("README.md", "(JPEG) | " + " | ".join(f"{value:.2f}" for value in sgd) + " |"),
        ("README.md", "the same setting | {:.2f} | | {:.2f} |".format(*muon)),
        ("README.md", "AdamW, 1,000 steps on text | {:.3f} | {:.3f} | {:.3f} |".format(*adamw)),
        ("README.md", "Muon, 1,000 steps | {:.3f} | {:.3f} | {:.3f} |".format(*short)),
        ("README.md", "Muon, 4,000 steps | {:.3f} | {:.3f} | {:.3f} |".format(*long)),
    ]
    rounded = [f"{speedup(*which):.1f}" for which in ((cpu, one), (cpu, both), (cpu + new, both))]
    found += [
        ("docs/index.md", "one core is {}. Over".format(*rounded)),
        ("docs/index.md", "cores it is {1} with jax 0.10 and {2} with jax 0.12".format(*rounded)),
        ("docs/faq.md", "the speedup over one core is {}.".format(*rounded)),
        ("docs/faq.md", "both cores it is {1} with jax 0.10.2 and {2} with".format(*rounded)),
        ("notebooks/quickstart.ipynb", "{} over back-propagation on one core".format(*rounded)),
        ("notebooks/quickstart.ipynb", "{1} over back-propagation on both".format(*rounded)),
        ("notebooks/quickstart.ipynb", "({2} with jax 0.12)".format(*rounded)),
    ]
    slower = speedup("benchmark_memory", "fdg_recompute_stale")
    plain, again = (held(name) for name in ("fdg", "fdg_recompute_stale"))
    found += [
        ("docs/guides/memory.md", f"holds {100 * again / plain:.0f} % of the memory"),
        ("docs/guides/memory.md", f"a step takes {slower:.2f} times as long"),
        ("BENCHMARKS.md", f"| recompute_stale | {again / 1e6:.1f} | {again / plain:.3f} |"),
        ("BENCHMARKS.md", f"| stale | {plain / 1e6:.1f} | 1 |"),
        ("BENCHMARKS.md", f"| {slower:.2f} | 1.19 to 1.39 |"),
    ]
    error, digest = 100 * quickstart("test_error"), quickstart("params_sha256")[:16]
    found += [
        (
            "EXPERIMENTS.md",
            f"the test error is {error:.2f} % and `params_sha256` begins with {digest}",
        ),
        ("README.md", f"a test error of {error:.1f} to 10.5 %"),
        ("experiments/flags/quickstart.cfg", f"Test error expected: {error:.1f} to 10.5 %"),
    ]
    guide = "docs/guides/closing_the_gap.md"
    for name, values in {
        "back-propagation": [cifar("backprop, SGD"), None, cifar("backprop, Muon"), None],
        "FDG, K = 2": [
            *(cifar(f"FDG, K = 2, {each}") for each in ("SGD", "SGD recipe")),
            *(None, cifar("FDG, K = 2, Muon recipe")),
        ],
        "FDG, K = 4": [
            *(cifar(f"FDG, K = 4, {each}") for each in ("SGD", "SGD recipe")),
            *(None, cifar("FDG, K = 4, Muon recipe")),
        ],
    }.items():
        found.append((guide, row(name, values, 2)))
    for study in ("staleness_text", "staleness_text_long"):
        base = [ended(study, f"backprop, {each}") for each in ("AdamW", "Muon")]
        late = [
            ended(study, f"FDG, K = 4, {each}")
            for each in ("AdamW", "AdamW recipe", "Muon", "Muon recipe")
        ]
        found.append((guide, row("back-propagation", [base[0], None, base[1], None], 3)))
        found.append((guide, row("FDG, K = 4", late, 3)))
    return found


ROWS = (("backprop, ", ""), ("FDG, K = 4, ", ""), ("FDG, K = 4, ", " recipe"))


def held(name: str) -> float:
    """Bytes that all stages hold in the benchmark of memory."""
    stages = contender("benchmark_memory", name)["memory"]
    return sum(each["measured"] for each in stages)


def row(name: str, values: list[tuple[float, float] | None], digits: int) -> str:
    """A row of a table, mean and spread in each cell."""
    cells = (f" {v[0]:.{digits}f} ± {v[1]:.{digits}f} |" if v else " |" for v in values)
    return f"| {name} |" + "".join(cells)


@pytest.mark.parametrize(("document", "quote"), quotes())
def test_quoted_figures_are_those_of_the_results(document, quote):
    assert quote in text(document)


@pytest.mark.parametrize("study", STUDIES)
def test_tables_of_studies_are_those_of_the_results(study):
    document = (ROOT / "EXPERIMENTS.md").read_text(encoding="utf-8")
    table = (RESULTS / study / "table.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 2
    assert [line for line in rows if line not in document] == []


@pytest.mark.parametrize(
    ("benchmark", "section", "labels"),
    [
        ("benchmark_cpu", "Two stages on two devices: 16 equal convolutions", CONTENDERS),
        ("benchmark_resnet56", "Two stages on two devices: ResNet-56", CONTENDERS),
        ("benchmark_peers", "16 equal convolutions, batch 32", PEERS),
        (
            "benchmark_peers_transformer",
            "Transformer: 8 blocks of width 256, 128 tokens, batch 16",
            PEERS,
        ),
    ],
)
def test_tables_of_benchmarks_are_those_of_the_results(benchmark, section, labels):
    document = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8").replace("**", "")
    part = re.split(r"\n###? ", document.split(f"# {section}\n")[1])[0]
    names = [each["name"] for each in json.loads(results(benchmark))["contenders"]]
    for name in set(names) & set(labels):
        cells = re.search(rf"^\| {re.escape(labels[name])} \|(.*)$", part, re.MULTILINE)
        assert cells, name
        milliseconds, spread, *_ = (cell.strip() for cell in cells[1].split("|"))
        seconds = contender(benchmark, name)["seconds"]
        low, high = (f"{1e3 * seconds[bound]:.0f}" for bound in ("min", "max"))
        assert (milliseconds, spread) == (f"{1e3 * seconds['median']:.0f}", f"{low} to {high}")
        gains = speedups(benchmark, name)
        quoted = f"{statistics.median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})"
        assert name == "fdg" or quoted in cells[1]


def results(benchmark: str) -> str:
    return (RESULTS / benchmark / "benchmark.json").read_text(encoding="utf-8")
