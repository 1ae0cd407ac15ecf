"""The report `tcell`: on simulated plates, on the real targets, with a model that is loaded, and with tables that are wrong"""
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from perturbnb.core import real_file
from perturbnb.data.simulate_drugseq import simulate_drugseq
from perturbnb.models.base import load_model
from perturbnb.report.results import read_result
from perturbnb.report.run import run

FAST = dict(epochs=2, seeds=[0, 1], rules=["metabolite", "replicate", "published"], n_boot=200, n_perm=199, n_jobs=1)
CLI = [sys.executable, "-c", "from perturbnb.cli import main; main()"]
FILES = {"gene_scaler.csv": "gene mean std", "history_loss_detailed.csv": "epoch train_total val_total train_mse train_bce train_reg val_mse val_bce val_reg",
         "metabolite_activation_scores.csv": "Metabolite mean std N", "gene_importance_gradinput.csv": "Gene GradInputImportance", "latent_scores.csv": "Well Meta Latent_Euclid Latent_Cosine",
         "well_activation_socres.csv": " ".join(["Well", "Metabolite", *(f"Latent_{i}" for i in range(32)), "LatentScore"]),
         "well_predictions_results.csv": "well_id metabolite label_cls Tscore_z CytoTRACE_z Pseudotime_z pred_Tscore pred_CytoTRACE pred_Pseudotime pred_activation latent_vector"}


@pytest.fixture(scope="module")
def plates(tmp_path_factory): return simulate_drugseq(tmp_path_factory.mktemp("sim") / "plates", seed=3, size="tiny")


@pytest.fixture(scope="module")
def report(plates, tmp_path_factory):
    out = tmp_path_factory.mktemp("reports") / "tcell"
    run("tcell", {**FAST, "wells": str(plates)}, out, progress=False)
    return out


def test_result_is_whole(report):
    r = read_result(report)
    assert r["facts"]["demo_data"] is False
    models = {m["model"] for m in r["metrics"]}
    assert {"tcell", "ridge", "pca50_ridge", "place", "plate_mean", "mean", "as_published"} <= models
    assert len(r["split"]) == 6 and all(any(line.startswith("proved") for line in s["audit"]) for s in r["split"] if not s["name"].startswith("published"))
    assert len(r["verdict"]) >= 4


def test_files_of_the_published_pipeline(report, plates):
    place = report / "published_files"
    for name, columns in FILES.items(): assert pd.read_csv(place / name, nrows=1).columns.tolist() == columns.split(), name
    assert (place / "well_activation_scores.csv").read_bytes() == (place / "well_activation_socres.csv").read_bytes()
    assert {"model.pt", "model_best.pt", "model_last.pt", "loss_curve.png"} <= {p.name for p in place.iterdir()}
    t = pd.read_csv(place / "well_predictions_results.csv")
    scores = pd.read_csv(plates / "scores_3_z.csv")
    np.testing.assert_allclose(t[["Pseudotime_z", "CytoTRACE_z", "Tscore_z"]], scores[["pseudotime_z", "cytoscore_z", "Tscore_z"]])  # by name, not exchanged


def test_saved_model_scores_new_plates(report, plates, tmp_path):
    done = subprocess.run([*CLI, "predict", str(report / "model"), "--wells", str(plates), "--out", str(tmp_path / "s.csv")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    t = pd.read_csv(tmp_path / "s.csv")
    assert len(t) == 192 and t.columns[:4].tolist() == ["Well", "Metabolite", "Pred_Tscore", "Pred_CytoTRACE"] and t.columns[-1] == "Latent_Selected"
    mine = pd.read_csv(report / "published_files/well_predictions_results.csv").set_index("well_id").pred_Tscore
    np.testing.assert_allclose(t.set_index("Well").Pred_Tscore, mine[t.Well].to_numpy(), atol=1e-6)


def test_no_dmso_no_distance(report, plates, tmp_path):
    bare = shutil.copytree(plates, tmp_path / "bare")
    expr, meta, wells = (pd.read_csv(bare / f"{n}.csv") for n in ("expr_mat", "meta_id", "well_id"))
    keep = (meta.x != "DMSO").to_numpy()
    for p in [*bare.glob("*.csv"), bare / "SHA256SUMS"]: p.unlink()
    for n, t in (("expr_mat", expr), ("meta_id", meta), ("well_id", wells)): t[keep].to_csv(bare / f"{n}.csv", index=False)
    ask = [*CLI, "predict", str(report / "model"), "--wells", str(bare)]
    done = subprocess.run(ask, capture_output=True, text=True)
    assert done.returncode != 0 and "no DMSO well" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert subprocess.run([*ask, "--reference", "training"], capture_output=True).returncode == 0


def test_model_that_is_loaded(report, plates, tmp_path):
    run("tcell", {**FAST, "wells": str(plates), "rules": ["metabolite"], "skip_train": True, "model": str(report / "model")}, tmp_path / "again", progress=False)
    a, b = (load_model(p / "model") for p in (report, tmp_path / "again"))
    for k in a.arrays: np.testing.assert_array_equal(a.arrays[k], b.arrays[k])
    assert not (tmp_path / "again/published_files/history_loss_detailed.csv").exists()


def test_real_targets(tmp_path):
    folder = real_file("drugseq_tcell/dpf/well_id.csv")
    if folder is None: pytest.skip("skipped: the real DRUG-seq tables are not on this machine")
    run("tcell", {"wells": str(folder.parent), "n_boot": 200, "n_perm": 999, "n_jobs": 1}, tmp_path / "real", progress=False)
    r = read_result(tmp_path / "real")
    said = " ".join(v["answer"] for v in r["verdict"])
    assert "no expression matrix" in said
    assert not any(m["model"] == "tcell" for m in r["metrics"])
    place = next(m for m in r["metrics"] if m["id"] == "r2@1" and m["model"] == "place" and m["split"] == "metabolite" and m["stratum"] == "pseudotime_z, all")
    assert place["value"] > .8  # metabolites never seen: their pseudotime is told by the place alone
    facts = r["facts"]
    assert (facts["labels_1"], facts["labels_0"], facts["n_control"], facts["replicate_label_n_agree"], facts["replicate_label_n"]) == (484, 284, 40, 263, 364)
    assert abs(facts["old_minus_sum"]) < 1e-9 and "layout B2" in said


BAD = {"swapped": ("scores_3_z.csv", lambda t: t.rename(columns={"Tscore_z": "Tscore"}), "Tscore_z"), "short": ("labels_cls.csv", lambda t: t.iloc[:-1], "labels_cls.csv"),
       "text": ("expr_mat.csv", lambda t: t.astype(object).assign(**{t.columns[3]: "high"}), "expr_mat.csv")}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_get_one_line(case, plates, tmp_path):
    name, change, word = BAD[case]
    bad = shutil.copytree(plates, tmp_path / "bad")
    change(pd.read_csv(bad / name)).to_csv(bad / name, index=False)
    (bad / "SHA256SUMS").unlink()
    done = subprocess.run([*CLI, "run", "tcell", "-p", f"wells={bad}", "--out", str(tmp_path / "out")], capture_output=True, text=True, env={**os.environ})
    lines = [l for l in done.stderr.strip().splitlines() if l.startswith("perturbnb:")]
    assert done.returncode != 0 and len(lines) == 1 and word in lines[0] and not (tmp_path / "out").exists(), done.stderr
