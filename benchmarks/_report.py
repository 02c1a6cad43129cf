"""What a benchmark found, as records: printed while it runs, kept as JSON, rendered from there.

`Report` is what a benchmark fills; a document is what it wrote. Pages and README's tables, made in
`_pages`, come from documents alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "goatviz", "goat-attention")
Document = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One metric of a table: its unit, how its numbers are written, and its heading."""

    metric: str
    unit: str = ""
    digits: str = ".2f"
    heading: str = ""

    @property
    def title(self) -> str:
        return self.heading or self.metric

    @property
    def width(self) -> int:
        """Characters, the same while a benchmark runs and when its file is rendered."""
        return max(len(self.title), len(self.unit) + 8 if self.unit else 7)

    def cell(self, value: float | str | None) -> str:
        if value is None:
            return "-"
        text = value if isinstance(value, str) else format(value, self.digits)
        return f"{text} {self.unit}" if self.unit else text


RATIO = Column("ratio", "", ".2f")
PEAK = Column("peak", "MiB", ",.0f")


@dataclass(frozen=True)
class Layout:
    """A table: one line for each length and case, one column for each metric.

    The ratio and the peak of a line are those of its first metric.
    """

    title: str
    columns: tuple[Column, ...]
    lengths: bool = True
    ratio: bool = True
    peak: bool = False
    width: int = 24
    length: str = "length"

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Layout:
        columns = tuple(Column(**column) for column in entry["columns"])
        return cls(**{**entry, "columns": columns})

    def _line(self, length: str, case: str, cells: Sequence[str]) -> str:
        head = f"{length:>9}  " if self.lengths else ""
        body = "  ".join(
            f"{cell:>{column.width}}" for cell, column in zip(cells, self._columns(), strict=True)
        )
        return f"{head}{case:<{self.width}}  {body}".rstrip()

    def _columns(self) -> list[Column]:
        after = [RATIO] if self.ratio else []
        after += [PEAK] if self.peak else []
        return [self.columns[0], *after, *self.columns[1:]]

    def header(self) -> str:
        return self._line(self.length, "case", [column.title for column in self._columns()])

    def line(self, records: Sequence[Mapping[str, Any]]) -> str:
        """The line of one length and case from its records."""
        by_metric = {record["metric"]: record for record in records}
        first = by_metric[self.columns[0].metric]
        cells = [self.columns[0].cell(first["value"])]
        if self.ratio:
            cells.append("-" if first["ratio"] is None else f"{first['ratio']:.2f}x")
        if self.peak:
            cells.append(PEAK.cell(first["peak"]))
        cells += [column.cell(by_metric[column.metric]["value"]) for column in self.columns[1:]]
        length = "-" if first["length"] is None else f"{first['length']:,}"
        return self._line(length, first["case"], cells)


class Table:
    """A table that prints its lines as they come, and saves them."""

    def __init__(self, layout: Layout, report: Report) -> None:
        self.layout = layout
        self._report = report
        print(f"\n{layout.title}\n{layout.header()}", flush=True)

    def add(
        self,
        case: str,
        *values: float | str | None,
        length: int | None = None,
        ratio: float | None = None,
        peak: float | None = None,
    ) -> None:
        """One line: the values of the columns in their order; the peak is in MiB."""
        records = [
            {
                "table": self.layout.title,
                "case": case,
                "length": length,
                "metric": column.metric,
                "value": value,
                "unit": column.unit,
                "ratio": None if index else ratio,
                "peak": None if index else peak,
            }
            for index, (column, value) in enumerate(zip(self.layout.columns, values, strict=True))
        ]
        self._report.rows.extend(records)
        self._report.save()
        print(self.layout.line(records), flush=True)


@dataclass
class Report:
    """One benchmark's results: tables of records, what the targets say, and remarks.

    `about` says in a line what was measured; `packages` are further versions to note.
    """

    name: str
    about: str
    options: argparse.Namespace
    packages: tuple[str, ...] = ()
    tables: list[Layout] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    targets: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = describe_machine(getattr(self.options, "device", "cpu"))
        self.versions = describe_versions(self.packages)
        self.date = datetime.datetime.now(datetime.UTC).date().isoformat()
        print("\n".join(heading(self.document())), flush=True)

    def table(self, title: str, columns: Sequence[Column], **layout: Any) -> Table:
        """Begin a table; keyword arguments as in `Layout`."""
        self.tables.append(Layout(title, tuple(columns), **layout))
        return Table(self.tables[-1], self)

    def target(self, text: str, value: float, limit: float, *, least: bool = False) -> bool:
        """Whether a number is at most (or, with `least`, at least) what was wanted."""
        met = value >= limit if least else value <= limit
        self.targets.append(
            {"text": text, "value": value, "limit": limit, "least": least, "met": bool(met)}
        )
        return met

    def note(self, text: str) -> None:
        """A remark below the tables."""
        self.notes.append(text)

    def document(self) -> Document:
        """Everything, ready for JSON."""
        hidden = ("out", "alone", "quick")
        options = {k: v for k, v in vars(self.options).items() if k not in hidden}
        return {
            "name": self.name,
            "about": self.about,
            "date": self.date,
            "arguments": options,
            "machine": self.machine,
            "versions": self.versions,
            "tables": [asdict(layout) for layout in self.tables],
            "rows": self.rows,
            "targets": self.targets,
            "notes": self.notes,
        }

    def save(self) -> None:
        """Write NAME.json where `--out` says, so that a run that is stopped leaves what it has."""
        if self.options.out is not None:
            self.options.out.mkdir(parents=True, exist_ok=True)
            write(self.options.out / f"{self.name}.json", self.document())

    def finish(self) -> None:
        """Print what the targets say, and save."""
        lines = closing(self.document())
        if lines:
            print("\n".join(lines), flush=True)
        self.save()


def write(path: Path, document: Document) -> None:
    """A document as JSON, one record to a line, so that a change of a number is a line's change."""
    parts = []
    for key, value in document.items():
        if isinstance(value, list) and value:
            inner = ",\n".join(f"    {json.dumps(each)}" for each in value)
            parts.append(f'  "{key}": [\n{inner}\n  ]')
        else:
            parts.append(f'  "{key}": {json.dumps(value)}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def read(path: Path) -> Document:
    return json.loads(path.read_text(encoding="utf-8"))


def arguments(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    *,
    quick: Mapping[str, Any],
    devices: Sequence[str] = ("cpu",),
) -> argparse.Namespace:
    """Parse, with the options that all benchmarks share; `quick` are defaults of `--quick`."""
    parser.add_argument("--out", type=Path, help="folder for NAME.json (default: print only)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--device", default="cpu", choices=tuple(devices))
    if "--quick" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**quick)
    return parser.parse_args(argv)


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads of torch (if it is loaded) and GPU."""
    torch = sys.modules.get("torch")
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "gpu": torch.cuda.get_device_name() if torch and device == "cuda" else None,
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {platform.machine()}"
    return platform.processor() or platform.machine()


def describe_versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Python and the packages that are installed."""
    versions = {"Python": platform.python_version()}
    for name in (*PACKAGES, *packages):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    torch = sys.modules.get("torch")
    if torch:
        versions["torch"] = torch.__version__
    return versions


# --- rendering: from a document alone ---


def heading(document: Document) -> list[str]:
    """What was measured, on what, and when."""
    machine = document["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores"
    if machine["threads"]:
        where += f", {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    if machine["gpu"]:
        where = f"{machine['gpu']}; {where}"
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    return [document["about"], f"{document['date']}; {where}", versions]


def closing(document: Document) -> list[str]:
    """Remarks, then what the targets say."""
    lines = [f"\n{note}" for note in document["notes"]]
    if document["targets"]:
        lines += ["\ntargets:", *(f"  {verdict(target)}" for target in document["targets"])]
    return lines


def verdict(target: Mapping[str, Any]) -> str:
    """One target in a line."""
    sense = "at least" if target["least"] else "at most"
    said = "met" if target["met"] else "MISSED"
    return f"{said:<6}  {target['text']}: {target['value']:.3g} ({sense} {target['limit']:g})"


def lines_of(document: Document, layout: Layout) -> Iterator[str]:
    """The lines of one table, in the order in which they were measured."""
    grouped: dict[tuple[Any, str], list[dict[str, Any]]] = {}
    for row in document["rows"]:
        if row["table"] == layout.title:
            grouped.setdefault((row["length"], row["case"]), []).append(row)
    yield from (layout.line(records) for records in grouped.values())


def render_text(document: Document) -> str:
    """What the benchmark printed."""
    lines = heading(document)
    for layout in map(Layout.read, document["tables"]):
        lines += ["", layout.title, layout.header(), *lines_of(document, layout)]
    return "\n".join([*lines, *closing(document)])
