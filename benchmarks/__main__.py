"""Run benchmarks, each in a process of its own: ``python -m benchmarks [NAME ...]``.

Each prints what it finds and writes NAME.json to the folder of ``--out``, where one page (index.md)
and, for those that measure time against length, NAME.html follow from these files. ``--render``
runs nothing: it makes the tables of benchmarks/README.md and README.md anew from
benchmarks/results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks._pages import documents, fill, page, scaling
from goatviz import save_html

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
READMES = (FOLDER / "README.md", FOLDER.parent / "README.md")
#: In this order: those that measure most first.
NAMES = (
    "attention",
    "precision",
    "diagnostics",
    "evaluation",
    "priors",
    "transport",
    "real_models",
    "plots",
    "imports",
    "explorers",
)
ON_A_GPU = ("attention", "precision", "diagnostics", "evaluation")


def run(name: str, options: argparse.Namespace) -> bool:
    """Run one benchmark; whether it succeeded."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--out", str(options.out)]
    command += ["--device", options.device] + (["--quick"] if options.quick else [])
    print(f"# {name}", flush=True)
    done = subprocess.run(command, check=False)
    print(flush=True)
    return done.returncode == 0


def write_pages(folder: Path) -> None:
    """The page and the figures of the documents in a folder."""
    found = documents(folder)
    (folder / "index.md").write_text(page(found), encoding="utf-8")
    for name, document in found.items():
        figure = scaling(document)
        if figure is not None:
            save_html(figure, folder / f"{name}.html")


def render() -> None:
    """Make the blocks of the READMEs anew from the committed results."""
    found = documents(RESULTS)
    for path in READMES:
        path.write_text(fill(path.read_text(encoding="utf-8"), found), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: do they run?")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--render", action="store_true", help="make README's tables anew")
    options = parser.parse_args(argv)
    if options.render:
        render()
        return 0
    able = NAMES if options.device == "cpu" else ON_A_GPU
    for name in options.names:
        if name not in able:
            parser.error(f"NAME must be of {', '.join(able)}, got {name!r}")
    failed = [name for name in options.names or able if not run(name, options)]
    write_pages(options.out)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
