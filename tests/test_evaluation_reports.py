"The reports `doubles` and `calibration` from the command line: equal bytes, real cells, and bad input on one line."
import json
import os
import subprocess
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import CLI, ROOT, tree

REAL = Path(os.environ.get("PERTURBNB_REAL_DATA") or ROOT.parent / "shared" / "data") / "norman2019/norman19_subset_3375x500.h5ad"
real = pytest.mark.skipif(not REAL.is_file(), reason="skipped: the real Norman cells are not on this machine")
FAST = {"doubles": ["-p", "n_boot=200", "-p", "seeds=[1, 2]", "-p", "n_divisions=2"], "calibration": ["-p", "n_boot=200", "-p", "n_splits=5", "-p", "metrics=[mse, pearson_delta, pds_cosine]"]}


@pytest.fixture(scope="session")
def norman(tmp_path_factory):
    "A simulated screen of single and double perturbations."
    out = tmp_path_factory.mktemp("norman") / "screen"
    subprocess.run([*CLI, "simulate", "norman", str(out), "--size", "tiny"], check=True, capture_output=True)
    return out


def result_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_simulation_repeats(cli, norman, tmp_path):
    assert cli("simulate", "norman", tmp_path / "again", "--size", "tiny").returncode == 0
    assert tree(tmp_path / "again") == tree(norman)


@pytest.mark.parametrize("name", FAST)
def test_equal_runs_give_equal_bytes(cli, norman, tmp_path, name):
    for out in ("one", "two"):
        done = cli("run", name, "-p", f"cells={norman / 'norman.h5ad'}", *FAST[name], "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "one/results.json").read_bytes() == (tmp_path / "two/results.json").read_bytes()
    found = result_of(tmp_path / "one")
    assert found["split"] and all(s["audit"] for s in found["split"]) and found["comparisons"]
    assert {"ceiling", "control"} <= {m["kind"] for m in found["metrics"]}
    page = (tmp_path / "one/report.html").read_text()
    assert str(tmp_path) not in page and "PosixPath" not in page


@real
def test_doubles_on_real_cells(cli, tmp_path):
    done = cli("run", "doubles", "-p", f"cells={REAL}", *FAST["doubles"], "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = result_of(tmp_path / "out")
    assert (found["facts"]["n_singles"], found["facts"]["n_pairs"], found["facts"]["n_control_cells"]) == (18, 15, 100)
    pairs = pd.read_parquet(tmp_path / "out/tables/pairs.parquet")
    of = pairs[(pairs.model == "additive_genes") & (pairs.protocol == "as published")].dropna(subset=["pearson_delta@1"])
    assert set(of.pert) <= {"KLF1+MAP2K6", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2", "MAPK1+TGFBR2"} and of["pearson_delta@1"].between(.70, .99).all()
    r = {m["split"]: m["value"] for m in found["metrics"] if m["model"] == "additive_genes" and m["id"] == "pearson_delta@1"}
    assert r["doubles, half control, shared"] > r["doubles, leak-free"]
    n, held = found["facts"]["n_sum_predicts"], found["facts"]["n_held_out"]
    assert n == 5 < held == n + found["facts"]["n_lack_a_single"]  # of all 15 pairs, 10 lack a single
    first, second = (v["answer"] for v in found["verdict"])
    assert f"5 of {held} held-out pairs" in first and "over 5 pairs" in second and "cannot be told from 0" in second
    assert all(c["p"] is None for c in found["comparisons"] if c["ci95"] is None)
    page = (tmp_path / "out/report.html").read_text()
    assert f"5 of {held}" in page.replace("\xa0", " ") and "no held-out pair could be predicted: bilinear" in page and "PosixPath" not in page


@real
def test_calibration_on_real_cells(cli, tmp_path):
    done = cli("run", "calibration", "-p", f"cells={REAL}", *FAST["calibration"], "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    top = {m["model"]: m for m in result_of(tmp_path / "out")["metrics"] if m["kind"] == "ceiling" and m["id"] == "pearson_delta@1"}
    assert all(m["ci95"] for m in result_of(tmp_path / "out")["metrics"])
    assert top["correlation of halves"]["ci95"][0] > 0 and .7 < top["perfect model"]["value"] < 1


def cells_with(norman, path, change):
    "A copy of the simulated cells after `change`."
    a = ad.read_h5ad(norman / "norman.h5ad")
    a = change(a)
    a = a if isinstance(a, ad.AnnData) else ad.read_h5ad(norman / "norman.h5ad")
    a.write_h5ad(path)
    return path


BAD = {
    "no label column": (lambda a: ad.AnnData(a.X, a.obs.drop(columns="perturbation_name"), a.var), ["perturbation"]),
    "no control": (lambda a: a[a.obs.perturbation_name != "control"].copy(), ["control"]),
    "negative counts": (lambda a: ad.AnnData(-a.X, a.obs, a.var), ["negative"]),
    "no lane": (lambda a: ad.AnnData(a.X, a.obs.drop(columns="gemgroup").set_axis([f"c{i}" for i in range(a.n_obs)]), a.var), ["lane"]),
    "a missing label": (lambda a: ad.AnnData(a.X, a.obs.assign(perturbation_name=a.obs.perturbation_name.astype(object).mask(np.arange(a.n_obs) == 3)), a.var), ["no perturbation"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_cells_get_one_line(fails, norman, tmp_path, what):
    change, words = BAD[what]
    path = cells_with(norman, tmp_path / "bad.h5ad", change)
    for name in FAST: fails("run", name, "-p", f"cells={path}", *FAST[name], "--out", tmp_path / "out", words=words)
    assert not (tmp_path / "out").exists()


def test_bad_parameters_get_one_line(fails, norman, tmp_path):
    singles = cells_with(norman, tmp_path / "singles.h5ad", lambda a: a[~a.obs.perturbation_name.str.contains("+", regex=False).to_numpy(bool)].copy())
    fails("run", "doubles", "-p", f"cells={singles}", *FAST["doubles"], "--out", tmp_path / "out", words=["combinations"])
    fails("run", "doubles", "-p", f"cells={tmp_path / 'none.h5ad'}", "--out", tmp_path / "out", words=["none.h5ad"])
    fails("run", "doubles", "-p", "seeds=[1, 1]", "--out", tmp_path / "out", words=["each once"])
    fails("run", "doubles", "-p", "seeds=[99999999999]", "--out", tmp_path / "out", words=["99999999999"])
    fails("run", "calibration", "-p", "cell_line= ", "--out", tmp_path / "out", words=["cell_line"])
    fails("run", "calibration", "-p", "metrics=[pearson_dleta]", "--out", tmp_path / "out", words=["did you mean 'pearson_delta"])
    fails("run", "calibration", "-p", "metrics=[roc_auc]", "--out", tmp_path / "out", words=["roc_auc"])
    fails("run", "calibration", "-p", "n_splits=2", "--out", tmp_path / "out", words=["n_splits"])
    fails("run", "calibration", "-p", f"cells={norman / 'norman.h5ad'}", "-p", "min_cells=100000", "--out", tmp_path / "out", words=["100000"])
    assert not (tmp_path / "out").exists()


def test_simulated_data_never_replace_real_ones(cli, fails, norman, tmp_path):
    run = lambda out, *given: ("run", "calibration", *given, *FAST["calibration"], "--out", tmp_path / out)
    real_run = cli(*run("mine", "-p", f"cells={norman / 'norman.h5ad'}"))  # a file that was given counts as real
    assert real_run.returncode == 0 and "SIMULATED" not in real_run.stderr
    before = tree(tmp_path / "mine")
    fails(*run("mine"), words=["SIMULATED DATA", "a report on real data", "another --out"])
    assert tree(tmp_path / "mine") == before
    done = cli(*run("demo"))
    assert done.returncode == 0 and done.stdout.splitlines() == [str(tmp_path / "demo/report.html")]
    assert [line for line in done.stderr.splitlines() if line.startswith("SIMULATED DATA: calibration")]
    assert cli(*run("demo")).returncode == 0  # simulated over simulated
    said = cli("check", tmp_path / "mine/results.json")
    assert said.returncode == 0 and said.stdout == cli("check", tmp_path / "mine").stdout


def test_check_names_a_screen(cli, fails, norman, tmp_path):
    said = cli("check", norman / "norman.h5ad")
    assert said.returncode == 0 and "cells of a Perturb-seq screen" in said.stdout and said.stdout.rstrip().endswith("not a signature table; use run calibration or run doubles")
    bad = cells_with(norman, tmp_path / "bad.h5ad", BAD["no label column"][0])
    fails("check", bad, words=["problem"])


@real
def test_check_names_the_real_screen(cli):
    assert "33 perturbations, 100 control cells; not a signature table" in cli("check", REAL).stdout


def test_compare_keeps_analyses_apart(cli, norman, tmp_path):
    for name in FAST: assert cli("run", name, "-p", f"cells={norman / 'norman.h5ad'}", *FAST[name], "--out", tmp_path / name).returncode == 0
    said = cli("compare", tmp_path / "doubles", tmp_path / "calibration").stdout
    assert said.startswith("Runs of 2 different analyses (doubles, calibration): nothing is comparable") and "Difference to group" not in said
    means = [m for m in result_of(tmp_path / "calibration")["metrics"] if m["part"] == "all" and "leaves out the error" in m.get("note", "")]
    assert len(means) == 12 and all(m["ci95"] for m in means)
