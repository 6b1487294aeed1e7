"""A table of predictions and a recommendation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fdg_jax.analysis.layer_times import Setting
from fdg_jax.analysis.prediction import Measured, Row, costs_of, crossing, predict

# Rows that differ by less count as equally fast; predictions are not more accurate.
TOLERANCE = 0.05
NAMES = {
    "backprop": "back-propagation",
    "data_parallel": "data parallelism",
    "one_f_one_b": "1F1B",
    "ddg": "DDG",
    "fdg": "FDG",
}


@dataclass(frozen=True)
class Advice:
    """Measurements, predictions and a recommendation; ``str`` formats all of it.

    Args:
      measured: the measurements.
      rows: a prediction per method and number of devices.
      notes: methods left out, with reasons.
    """

    measured: Measured
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(measured: Measured, notes: Sequence[str] = ()) -> Advice:
        """Makes the advice from measurements.

        Args:
          measured: the measurements.
          notes: methods left out, with reasons.

        Returns:
          The advice.
        """
        return Advice(measured, predict(measured), tuple(notes))

    def row(self, method: str, devices: int) -> Row:
        """Returns one row.

        Args:
          method: the method's name.
          devices: number of devices.

        Returns:
          The row.

        Raises:
          KeyError: there is no such row.
        """
        for row in self.rows:
            if (row.method, row.devices) == (method, devices):
                return row
        raise KeyError(f"{method} on {devices} devices: was not predicted")

    @property
    def choice(self) -> Row:
        """The least stale row within 5 % of the highest throughput; ties are broken by fewer
        devices, then by less memory on the fullest device. Back-propagation with K > 1 is excluded,
        because it only saves memory."""
        most = max(row.throughput for row in self._candidates)
        near = [row for row in self._candidates if row.throughput >= (1 - TOLERANCE) * most]
        return min(near, key=lambda row: (max(row.staleness), row.devices, max(row.bytes)))

    @property
    def crossing(self) -> float | None:
        """`fdg_jax.analysis.crossing` for the stages of `choice`, or of the largest K."""
        costs = costs_of(self.measured, "fdg", self._pipeline)
        return None if costs is None or self._pipeline < 2 else crossing(costs, TOLERANCE)

    @property
    def message_share(self) -> float:
        """Time of the slowest message relative to the slowest stage, for the same stages."""
        costs = costs_of(self.measured, "fdg", self._pipeline)
        hops = self.measured.hops.get(self._pipeline, ())
        if costs is None or not hops:
            return 0.0
        return max(hops) / max(f + b for f, b in zip(costs.forward, costs.backward, strict=True))

    @property
    def _candidates(self) -> list[Row]:
        return [row for row in self.rows if row.method != "backprop" or row.devices == 1]

    @property
    def _pipeline(self) -> int:
        own = self.choice.devices if self.choice.method in ("ddg", "fdg") else 1
        return own if own > 1 else max((1, *self.measured.cuts))

    @property
    def recommendation(self) -> str:
        """Recommended method and K, gain, cost, and when DDG is preferable."""
        choice, one = self.choice, self.rows[0]
        if choice is one:
            text = [
                "Stay with back-propagation on one device: nothing here is more than 5 % faster."
            ]
        else:
            text = [
                f"Take {_name(choice)}: {choice.speedup:.2f} times the speed of back-propagation "
                "on one device."
            ]
            text.append(
                f"The fullest device holds {_size(max(choice.bytes))}, where back-propagation "
                f"holds {_size(max(one.bytes))}."
            )
        text += self._of_staleness()
        text += self._of_ddg()
        return " ".join(text)

    def _of_staleness(self) -> list[str]:
        choice = self.choice
        exact = [row for row in self._candidates if not max(row.staleness)]
        best = max(exact, key=lambda row: row.throughput)
        if not max(choice.staleness):
            return ["Its gradients are not stale."] if choice is not self.rows[0] else []
        over = choice.throughput / best.throughput
        late = max(choice.staleness)
        return [
            f"Its gradients are up to {late} update{'s' * (late > 1)} late.",
            f"Of what is not stale {_name(best)} is the fastest, {best.speedup:.2f} times one "
            f"device; so {NAMES[choice.method]} pays where its staleness costs less than "
            f"{100 * (over - 1):.0f} % more steps.",
        ]

    def _of_ddg(self) -> list[str]:
        stages, point = self._pipeline, self.crossing
        if stages < 2:
            return []
        fdg, ddg = self.row("fdg", stages), self.row("ddg", stages)
        ratio = fdg.throughput / ddg.throughput
        text = [
            f"With K = {stages} a message takes {100 * self.message_share:.1f} % of the slowest "
            f"stage's time, and FDG is {ratio:.2f} times as fast as DDG."
        ]
        if point is None:
            text.append("However long messages are, DDG is as fast here, with half the staleness.")
        else:
            text.append(
                f"FDG overtakes DDG, by more than 5 %, where a message takes {100 * point:.1f} % "
                "or more; below that DDG is the better choice, with half the staleness."
            )
        return text

    def __str__(self) -> str:
        measured, several = self.measured, max((1, *self.measured.cuts))
        alone = measured.layers[Setting()]
        beside = measured.layers.get(Setting(pipelines=several), alone)
        settings = [("alone", alone)]
        if beside is not alone:
            settings.append((f"{several} devices at work", beside))
        blocks = []
        for title, times in settings:
            columns = {name: values for name, values in times._asdict().items() if values}
            lines = [
                [span, *(f"{1e3 * value:.3f}" for value in values)]
                for span, values in _spans(list(zip(*columns.values(), strict=True)))
            ]
            total = [f"{1e3 * sum(values):.3f}" for values in columns.values()]
            table = _table([["layers", *columns], *lines, ["all", *total]])
            blocks.append(f"Milliseconds of a layer, {title}:\n{table}")
        if measured.hops:
            lines = [["K", "milliseconds of a message over each hop"]]
            lines += [
                [str(k), ", ".join(f"{1e3 * hop:.3f}" for hop in hops)]
                for k, hops in sorted(measured.hops.items())
            ]
            lines.append(["", f"{1e3 * measured.latency:.3f} of the smallest"])
            blocks.append(_table(lines))
        heads = [
            "method",
            "devices",
            "batches/s",
            "x one device",
            "MB held",
            "updates late",
            "cuts",
        ]
        lines = [
            [
                row.method,
                str(row.devices),
                f"{row.throughput:.4g}",
                f"{row.speedup:.2f}",
                ", ".join(f"{size / 1e6:.4g}" for size in row.bytes),
                ", ".join(map(str, row.staleness)),
                ", ".join(map(str, row.cuts)) or "-",
            ]
            for row in self.rows
        ]
        blocks.append(f"Predicted; MB and updates stage by stage:\n{_table([heads, *lines])}")
        blocks += [f"Left out: {note}." for note in self.notes]
        return "\n\n".join([*blocks, self.recommendation])


def _name(row: Row) -> str:
    """A method with its number of stages or devices."""
    if row.method == "data_parallel":
        return f"data parallelism on {row.devices} devices"
    if row.devices == 1:
        return "back-propagation on one device"
    return f"{NAMES[row.method]} with K = {row.devices}"


def _size(size: float) -> str:
    return f"{size / 1e6:.4g} MB"


def _spans(rows: Sequence[tuple[float, ...]]) -> list[tuple[str, tuple[float, ...]]]:
    """Joins neighbouring rows with equal values (equal layers), such as "1-16"."""
    found, start = [], 0
    for values, group in itertools.groupby(rows):
        end = start + len(list(group)) - 1
        found.append((f"{start}-{end}" if end > start else str(start), values))
        start = end + 1
    return found


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *rest = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)
