"Fixtures of the tests that need a process of their own."
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))
CLI = [sys.executable, "-c", "from perturbnb.cli import main; main()"]


@pytest.fixture
def cli():
    "The command line as a process: cli('run', 'imbalance') -> finished process with text output."
    return lambda *args, **kw: subprocess.run([*CLI, *map(str, args)], capture_output=True, text=True, **kw)


@pytest.fixture
def fails(cli):
    "Runs a command that must fail: exit status 1, nothing on standard output, one line that holds every given word."
    def check(*args, words=(), **kw):
        done = cli(*args, **kw)
        assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("perturbnb: "), done.stderr
        for word in words: assert word in lines[0], lines[0]
        return lines[0]
    return check


def write_toy(folder: Path):
    "An analysis that counts lines: write_toy(folder)('toy', work='code of its middle cell') -> path of the notebook."
    def make(name="toy", work="", parameters='counts: "Path" = ""  # a text file\nseed: int = 0  # [0, inf) seed'):
        def cell(i, source, *tags):
            return dict(cell_type="code", id=f"c{i}", metadata=dict(tags=list(tags)), source=source, outputs=[], execution_count=None)
        last = f"""result = Result("{name}", dict(counts=counts), seeds=[seed])
result.data(counts, n_obs=len(lines))
result.split("none", {{"all": len(lines)}}, ["nothing is split"])
result.fact("n_lines", len(lines))
result.verdict("How many lines?", f"It has {{len(lines)}} lines.")
result.write()"""
        first = "from pathlib import Path\nfrom perturbnb.report.results import Result\nlines = Path(counts).read_text().splitlines()"
        cells = [dict(cell_type="markdown", id="m0", metadata={}, source="# Toy\n> How many lines?"),
                 cell(1, parameters, "parameters"), cell(2, first), cell(3, work), cell(4, last)]
        path = folder / f"{name}.ipynb"
        path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
        return path
    return make


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path)


@pytest.fixture
def counts(tmp_path):
    path = tmp_path / "counts.txt"
    path.write_text("a\nb\n")
    return path


def tree(folder: Path) -> dict:
    "Every file below a folder with its bytes."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
