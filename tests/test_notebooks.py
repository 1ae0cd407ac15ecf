"Every notebook, run from top to bottom by nbdev's own runner, in this process and in the working folder that nbdev gives it."
import os

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

CFG = get_config()
NOTEBOOKS = sorted(nbglob(CFG.nbs_path, as_path=True))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(CFG.nbs_path).as_posix())
def test_notebook(path, capfd, monkeypatch):
    before = dict(os.environ)
    ok, _ = run_nb(path, skip_flags=CFG.tst_flags.split(), basepath=CFG.config_path)
    assert ok, capfd.readouterr().err[-4000:]
    changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}
    changed -= {"JUPYTER_PATH", "PYTEST_CURRENT_TEST", "RDBASE", "TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}  # a run offers its kernel to its own process; RDKit, PyTorch, Lightning and scikit-learn set theirs when they are imported
    assert not changed, f"{path.name} leaves the environment changed: {changed}"
