"Packaging: everything that can be said of the package is read from settings.ini, the version from perturbnb/__init__.py."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
version = re.search(r'__version__\s*=\s*"([^"]+)"', (here / "perturbnb" / "__init__.py").read_text(encoding="utf-8")).group(1)
packages = sorted({".".join(p.parent.relative_to(here).parts) for p in (here / "perturbnb").rglob("*.py")})



class BuildWithTemplates(build_py):
    "The papermill templates are notebooks under nbs/: a wheel carries them as perturbnb/analysis/*.ipynb."
    def run(self):
        super().run()
        target = Path(self.build_lib) / "perturbnb" / "analysis"
        for notebook in [] if self.editable_mode else sorted((here / "nbs" / "analysis").glob("*.ipynb")):
            self.mkpath(str(target))
            self.copy_file(str(notebook), str(target / notebook.name))


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
    packages=packages,
    package_dir={"": "."},
    cmdclass={"build_py": BuildWithTemplates},
    install_requires=cfg["requirements"].split(),
    extras_require={k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["perturbnb=perturbnb._modidx:d"]},
)
