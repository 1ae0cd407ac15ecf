"Packaging: everything that can be said of the package is read from settings.ini, the version from perturbnb/__init__.py."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
version = re.search(r'__version__\s*=\s*"([^"]+)"', (here / "perturbnb" / "__init__.py").read_text(encoding="utf-8")).group(1)
packages = sorted({".".join(p.parent.relative_to(here).parts) for p in (here / "perturbnb").rglob("*.py")})

setup(
    name=cfg["lib_name"],
    version=version,
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license=cfg["license"],
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    # the papermill templates are notebooks under nbs/: a wheel carries them as perturbnb/analysis/*.ipynb
    packages=[*packages, "perturbnb.analysis"],
    package_dir={"perturbnb": "perturbnb", "perturbnb.analysis": "nbs/analysis"},
    package_data={"perturbnb.analysis": ["*.ipynb"]},
    install_requires=cfg["requirements"].split(),
    extras_require={k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["perturbnb=perturbnb._modidx:d"]},
)
