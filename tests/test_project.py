"The repository itself: notebooks clean, exports in sync, one module for each, README and pins up to date, a wheel that works."
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from project import ROOT, readme

BIN = Path(sys.executable).parent
PAGES = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.fixture
def copy(tmp_path):
    "The project in another folder, so that a check can write without touching this one."
    for name in ("nbs", "perturbnb"): shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "settings.ini", "setup.py", "README.md", "LICENSE"): shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def same(a: Path, b: Path, pattern: str) -> list:
    "Names of the files of that pattern whose bytes differ, or that only one side has."
    read = lambda root: {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob(pattern) if "__pycache__" not in p.parts and ".ipynb_checkpoints" not in p.parts}
    x, y = read(a), read(b)
    return sorted(n for n in x.keys() | y.keys() if x.get(n) != y.get(n))


def test_notebooks_are_clean(copy):
    subprocess.run([BIN / "nbdev-clean"], cwd=copy, check=True)
    assert same(ROOT / "nbs", copy / "nbs", "*.ipynb") == []


def test_exports_are_in_sync(copy):
    for p in (copy / "perturbnb").rglob("*.py"):
        if p.name not in ("__init__.py", "_modidx.py"): p.unlink()
    subprocess.run([BIN / "nbdev-export"], cwd=copy, check=True)
    assert same(ROOT / "perturbnb", copy / "perturbnb", "*.py") == []


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_exporting_notebook_has_its_module(path):
    code = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    module = next((m[1] for s in code if (m := re.search(r"#\|\s*default_exp\s+(\S+)", s))), None)
    exports = any(re.search(r"^#\|\s*export", s, re.M) for s in code)
    assert (module is not None) == exports
    if module: assert (ROOT / "perturbnb" / f"{module.replace('.', '/')}.py").is_file()
    if "analysis" in path.parts: assert module is None


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_saved_outputs_hold_no_machine_and_no_error(path):
    outputs = [o for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not outputs or "analysis" not in path.parts  # the outputs of an analysis are its report
    text = json.dumps([{k: v for k, v in o.get("data", o).items() if not k.startswith("image/")} for o in outputs])
    assert not re.search(r"(?<![\w.])/(home|root|tmp|Users|work)/[\w./-]+", text)


def test_readme_is_up_to_date():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme()


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?![a-z]+:|#)([^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 10 and not [v for v in links if not (ROOT / v).is_file()]


def test_install_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    canonical = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    have = {canonical(d.metadata["Name"]): d.version.partition("+")[0] for d in metadata.distributions() if d.metadata["Name"]}
    have.pop("perturbnb")
    loose = {n: v for n, v in have.items() if not n.startswith(("nvidia-", "cuda-", "triton")) and pins.get(n) != v}  # PyTorch pins its own CUDA parts
    assert loose == {}


def test_version_is_stated_once():
    import perturbnb
    assert metadata.version("perturbnb") == perturbnb.__version__
    assert f"version: {perturbnb.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {perturbnb.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert "version" not in (ROOT / "settings.ini").read_text() and "version" not in (ROOT / "pyproject.toml").read_text()


def test_wheel_carries_the_analyses(copy):
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", copy / "dist", copy], check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "zipfile", "-e", next((copy / "dist").glob("*.whl")), copy / "site"], check=True)
    assert same(ROOT / "perturbnb", copy / "site" / "perturbnb", "*.py") == []
    code = "import perturbnb; from perturbnb.report.template import templates; print(perturbnb.__file__, *templates())"
    shown = subprocess.run([sys.executable, "-c", code], cwd=copy / "site", env={"PYTHONPATH": str(copy / "site")}, capture_output=True, text=True, check=True)
    file, *names = shown.stdout.split()
    assert Path(file).is_relative_to(copy / "site")
    assert names == [re.sub(r"^\d+[a-z]?_", "", p.stem) for p in sorted((ROOT / "nbs/analysis").glob("*.ipynb"))]
