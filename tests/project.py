"""Housekeeping that both the tests and the Makefile need: the README and the constraints are made, never typed.

    python tests/project.py --write-readme    README.md from nbs/index.ipynb
    python tests/project.py --constraints     constraints.txt from settings.ini and constraints.in
"""
import posixpath
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Every package, direct or not, that an install with any extras pulls, at the version that was tested (CPython 3.11).
# Made by `make constraints` from settings.ini and constraints.in; not edited by hand.
"""


def readme() -> str:
    "The front page as Markdown, from the notebook that is its source; of cells marked `echo: false` only the output is shown."
    import nbformat
    from nbconvert import MarkdownExporter
    nb = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code" and cell.source.startswith("#| echo: false"):
            cell.update(cell_type="markdown", source="\n".join(o["data"]["text/markdown"] for o in cell.pop("outputs")))
            cell.pop("execution_count")
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)\)", lambda m: f"]({posixpath.normpath('nbs/' + m[1])})", body)  # links start from nbs/ there
    return "<!-- made from nbs/index.ipynb by `make prepare`: edit that -->\n\n" + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def constraints() -> str:
    "All extras resolved by pip-compile around constraints.in."
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / "constraints.txt"
        subprocess.run([sys.executable, "-m", "piptools", "compile", "--quiet", "--all-extras", "--all-build-deps", "--allow-unsafe", "--strip-extras",
                        "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--constraint", str(ROOT / "constraints.in"),
                        "--output-file", str(out), str(ROOT / "setup.py")], check=True, cwd=ROOT)
        lines = [re.sub(r"\+[\w.]+$", "", line) for line in out.read_text().splitlines() if "==" in line]  # a local build tag is of one machine
    return HEAD + "\n".join(sorted(set(lines))) + "\n"


if __name__ == "__main__":
    if "--write-readme" in sys.argv: (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    if "--constraints" in sys.argv: (ROOT / "constraints.txt").write_text(constraints(), encoding="utf-8")
