"""The report: rows as measured, and their tables. A loss is a row like any other."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.gate import ALWAYS, Gate
from bench.harness import Contestant, Timing, ratio
from bench.machine import slug
from bench.setting import CPU, Setting

Row = dict[str, Any]
TORCH_KINDS = ("eager", "compile")
OPS = ("conv_lstm", "conv1d_lstm", "lstm_gates")
ORIGIN = ("commit", "isa_convfast")  # what rows say themselves: those of several runs may be put together
DRAWN = {"conv_lstm": "convfast.ConvLSTM", "conv1d_lstm": "convfast.Conv1dLSTM"}  # ops with a picture, their modules


def race_row(
    op: str,
    case: Case,
    mode: str,
    contestants: list[Contestant],
    timings: dict[str, Timing],
    errors: dict[str, float],
    work: float,
    peak: float,
    least: float | None,
    headline: str,
    absent: dict[str, str],
) -> Row:
    """Every contestant's figures. `ratio`: median over the rounds of (best torch opponent's time / this one's);
    `least`: seconds of the paper floor."""
    torch_ones = [c.name for c in contestants if c.kind in TORCH_KINDS]
    best = min(torch_ones, key=lambda name: timings[name].median)
    figures = {}
    for contestant in contestants:
        timing = timings[contestant.name]
        figures[contestant.name] = {
            "kind": contestant.kind,
            "ms": 1e3 * timing.median,
            "ratio": ratio(timings[best], timing),
            "rate": 1e-9 * work / timing.median,
            "of_peak": 1e-9 * work / timing.median / peak,
            "frames_per_s": case.frames / timing.median,
            "error_of_bound": errors[contestant.name],
        }
        if least is not None:
            figures[contestant.name]["of_floor"] = least / timing.median
    return {
        "op": op,
        "case": case.id,
        "mode": mode,
        "unit": case.unit,
        "rounds": len(timings[best].rounds),
        "best_opponent": best,
        "headline": headline,
        "contestants": figures,
        "absent": absent,
    }


def refused_row(op: str, case: Case, mode: str, reason: str) -> Row:
    return {"op": op, "case": case.id, "mode": mode, "refused": reason}


class Report:
    """`machine`: what machine.describe() says, and the peaks; `rows` of races; `memory` rows of training steps.
    `gate`: when rounds of the races to come count."""

    def __init__(
        self,
        machine: dict[str, Any],
        rows: list[Row] | None = None,
        memory: list[Row] | None = None,
        gate: Gate = ALWAYS,
    ) -> None:
        self.machine, self.rows, self.memory, self.gate = machine, rows or [], memory or [], gate

    @classmethod
    def load(cls, path: Path) -> "Report":
        return cls(**json.loads(path.read_text()))

    def add(self, row: Row) -> None:
        """A race's row."""
        self.rows.append(row | self._origin())

    def add_memory(self, case: Case, setting: Setting, figures: dict[str, dict[str, float]]) -> None:
        precision = {} if setting == CPU else {"precision": setting.precision}
        self.memory.append({"case": case.id, **precision, "contestants": figures} | self._origin())

    def _origin(self) -> Row:
        return {key: self.machine[key] for key in ORIGIN if key in self.machine}

    def _origins(self, key: str) -> list[str]:
        """What the machine and the rows have, each once; a row without is the machine's."""
        return list(dict.fromkeys(row[key] for row in (self.machine, *self.rows, *self.memory) if key in row))

    def save(self, folder: Path) -> list[str]:
        """Writes report.json, report.md and, with matplotlib, the picture of each op that was run; their names."""
        folder.mkdir(parents=True, exist_ok=True)
        kept = {"machine": self.machine, "rows": self.rows, "memory": self.memory}
        (folder / "report.json").write_text(json.dumps(kept, indent=1) + "\n")
        (folder / "report.md").write_text(self.markdown())
        names = ["report.json", "report.md"]
        if importlib.util.find_spec("matplotlib"):
            from bench import picture

            for op in filter(self.races, DRAWN):
                names.append(f"{op}.png")
                picture.save(self, op, folder / names[-1])
        return names

    def folder(self) -> Path:
        return Path(__file__).parent / "results" / slug(self.machine)

    def markdown(self) -> str:
        parts = ["# convfast throughput", self.machine_line(), self.summary()]
        if self.memory:
            parts += ["## Memory of a training step", self.memory_table()]
        parts += ["## Every contestant", self.details()]
        return "\n\n".join(parts) + "\n"

    def machine_line(self, command: bool = True) -> str:
        m = self.machine
        how = f"; `{m['command']}`" if command else ""
        commits = [commit or "no commit" for commit in self._origins("commit")]
        if len(commits) > 3:
            commits[2:] = [f"{len(commits) - 2} more"]
        by = ("commits " if len(commits) > 1 else "") + listed(commits)
        if "gpu" in m:
            peaks = ", ".join(f"{rate:.0f} {unit}" for unit, rate in m["peaks"].items())
            return (
                f"{m['gpu']} ({m['gpu_memory']}, compute capability {m['capability']}), CUDA {m['cuda']}, cuDNN "
                f"{m['cudnn']}, torch {m['torch']}, triton {m['triton']}, convfast {m['convfast']} "
                f"({by}), Python {m['python']}; {m['date']}{how}. "
                f"Measured peaks of matmul and copy: {peaks}."
            )
        isa = f"{m['isa_torch']} (torch), {listed(self._origins('isa_convfast'))} (convfast)"
        if m.get("limits"):
            isa += f" by {' '.join(m['limits'])}"
        narrow = "".join(f"{m['peaks'][key]:.0f} in bfloat16, " for key in m["peaks"] if key.endswith("bfloat16"))
        gate = f" Rounds count while a matmul reaches {m['gate']:.0f} GFLOP/s." if m.get("gate") else ""
        return (
            f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {isa}; torch {m['torch']}, "
            f"convfast {m['convfast']} ({by}), Python {m['python']}, {m['system']}; {m['date']}{how}. Measured peaks: "
            f"{m['peaks']['GFLOP/s']:.0f} GFLOP/s float32 matmul or convolution, {narrow}"
            f"{m['peaks']['GB/s']:.1f} GB/s copy, {m['peaks']['L2 GB/s']:.0f} GB/s from a core's L2.{gate}"
        )

    def summary(self) -> str:
        """Per op and mode: the best torch opponent against the backend that convfast picks by itself."""
        parts = []
        for op in OPS:
            for mode, races in self.races_by_mode(op).items():
                parts += [f"## {op}, {mode}", _summary_table(races)]
        refused = [
            f"- {row['op']} {row['case']} {row['mode']}: {row['refused']}" for row in self.rows if "refused" in row
        ]
        if refused:
            parts += ["## Refused: convfast failed or disagrees with the float64 reference", "\n".join(refused)]
        return "\n\n".join(parts)

    def memory_table(self) -> str:
        """A line per case: the peak of the step, the others' as parts of the first contestant's; in parentheses the
        tensors kept, in units of the layers' outputs. A table for each set of contestants."""
        tables: dict[tuple[str, ...], list[list[str]]] = {}
        for row in self.memory:
            figures = row["contestants"]
            first, *others = figures
            line = [" ".join([row["case"], *filter(None, [row.get("precision")])])]
            line.append(f"{figures[first]['peak_mb']:.1f} MB ({figures[first]['saved_tensors']:.2f})")
            for name in others:
                part = figures[name]["peak_mb"] / figures[first]["peak_mb"]
                line.append(f"{part:.2f} ({figures[name]['saved_tensors']:.2f})")
            tables.setdefault((first, *others), []).append(line)
        return "\n\n".join(markdown_table(["case", *names], lines) for names, lines in tables.items())

    def details(self) -> str:
        lines = []
        for row in self.rows:
            start = [row["case"], row["mode"]]
            for name, f in row.get("contestants", {}).items():
                figures = [
                    f"{f['ms']:.3f}",
                    f"{f['ratio']:.2f}",
                    f"{f['rate']:.1f} {row['unit']}",
                    f"{f['of_peak']:.0%}",
                    f"{f['of_floor']:.0%}" if "of_floor" in f else "",
                ]
                lines.append([*start, name, *figures, f"{f['frames_per_s']:.0f}", f"{f['error_of_bound']:.2f}"])
            lines += [[*start, name, reason, *[""] * 6] for name, reason in row.get("absent", {}).items()]
        rates = ["rate", "of peak", "floor/this", "frames/s"]
        return markdown_table(["case", "mode", "contestant", "ms", "best/this", *rates, "error/bound"], lines)

    def races(self, op: str) -> list[Row]:
        return [row for row in self.rows if row["op"] == op and "refused" not in row]

    def races_by_mode(self, op: str) -> dict[str, list[Row]]:
        """Inference before training, else in the order of the rows."""
        races: dict[str, list[Row]] = {}
        for row in sorted(self.races(op), key=lambda row: row["mode"].startswith("training")):
            races.setdefault(row["mode"], []).append(row)
        return races


def _summary_table(races: list[Row]) -> str:
    columns = ["case", "best torch opponent", "its ms", "convfast ms", "ratio"]
    lean = races[0]["headline"].removesuffix("fast") + "lean"
    has_lean = all(lean in row["contestants"] for row in races)
    columns += ["lean ms", "lean ratio"] if has_lean else []
    direct = races[0]["headline"] + " direct"
    has_direct = all(direct in row["contestants"] for row in races)
    columns += ["direct ms", "direct ratio"] if has_direct else []
    has_floor = all("of_floor" in row["contestants"][row["headline"]] for row in races)
    columns += ["floor ms"] if has_floor else []
    lines = []
    for row in races:
        best, ours = row["contestants"][row["best_opponent"]], row["contestants"][row["headline"]]
        line = [
            row["case"],
            row["best_opponent"],
            f"{best['ms']:.3f}",
            f"{ours['ms']:.3f}",
            f"**{ours['ratio']:.2f}×**",
        ]
        if has_lean:
            figures = row["contestants"][lean]
            line += [f"{figures['ms']:.3f}", f"{figures['ratio']:.2f}×"]
        if has_direct:
            figures = row["contestants"][direct]
            line += [f"{figures['ms']:.3f}", f"{figures['ratio']:.2f}×"]
        if has_floor:
            line.append(f"{ours['ms'] * ours['of_floor']:.3f}")
        lines.append([*line, f"{ours['rate']:.1f}", f"{ours['of_peak']:.0%}", f"{ours['frames_per_s']:.0f}"])
    return markdown_table([*columns, races[0]["unit"], "of peak", "frames/s"], lines)


def listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def markdown_table(head: Sequence[str], lines: Any) -> str:
    """Markdown, padded so that it reads on a terminal too."""
    lines = [list(head), *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    padded = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    padded.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(padded)
