"""Agreement with other packages on random cases, and the cases that show where definitions differ.

    python benchmarks/peers.py              print the tables
    python benchmarks/peers.py --write      also write benchmarks/peers.md

Needs the extra `peers` (cell-eval, pertpy): pip install 'perturbnb[peers]'. Every number in peers.md comes from a run of this file.
"""
import logging
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np

from perturbnb.core import rng
from perturbnb.metrics import discrimination, distribution, effect

N_CASES = 1000


# ------------------------------------------------------------------ cell-eval

def pair(levels_real, levels_pred, control_real, control_pred, genes=None):
    "cell-eval's input: one cell for each perturbation and one control cell on each side."
    import anndata as ad
    import pandas as pd
    from cell_eval._types import PerturbationAnndataPair
    names = [f"P{i:03d}" for i in range(len(levels_real))]
    genes = genes or [f"g{i}" for i in range(levels_real.shape[1])]
    make = lambda x, c: ad.AnnData(np.vstack([x, c]), obs=pd.DataFrame({"pert": [*names, "ctrl"]}, index=[str(i) for i in range(len(x) + 1)]), var=pd.DataFrame(index=genes))
    return PerturbationAnndataPair(real=make(levels_real, control_real), pred=make(levels_pred, control_pred), pert_col="pert", control_pert="ctrl")


def profiles(n_cases: int):
    "Tables of 50 perturbations and 40 genes: levels, controls, and the column of each target gene (five perturbations are named like no gene)."
    for k in range(n_cases // 50):
        draw = rng(k, "peers.profiles").normal
        control, shared = np.abs(draw(size=(2, 40))), draw(size=40)
        real = control[0] + shared + draw(size=(50, 40))
        pred = control[1] + shared + .5 * (real - control[0] - shared) + draw(size=(50, 40))
        yield real, pred, control[0], control[1], np.where(np.arange(50) < 40, np.arange(50), -1)


def cell_eval_effect(n_cases: int = N_CASES) -> dict:
    "Largest difference for each metric that cell-eval takes from mean profiles."
    from cell_eval.metrics import _anndata as peer
    worst = {}
    def note(name, ours, theirs): worst[name] = max(worst.get(name, 0.0), float(np.abs(np.asarray(ours) - np.array(list(theirs.values()))).max()))
    for real, pred, c_real, c_pred, target in profiles(n_cases):
        genes = [f"P{i:03d}" if i in target else f"g{i}" for i in range(40)]  # gene i is the target of perturbation i
        data, d_real, d_pred = pair(real, pred, c_real, c_pred, genes), real - c_real, pred - c_pred
        note("pearson_delta", effect.pearson_delta(d_real, d_pred), peer.pearson_delta(data))
        note("mse (levels)", effect.mse(real, pred), peer.mse(data))
        note("mae (levels)", effect.mae(real, pred), peer.mae(data))
        note("mse_delta", effect.mse(d_real, d_pred), peer.mse_delta(data))
        note("mae_delta", effect.mae(d_real, d_pred), peer.mae_delta(data))
        for d in ("l1", "l2", "cosine"):
            score, as_theirs = getattr(discrimination, f"pds_{d}"), lambda x: discrimination.pds_as_cell_eval(x, len(real))
            note(f"discrimination_score_{d}, target gene left out", as_theirs(score(d_real, d_pred, target_index=target)), peer.discrimination_score(data, metric=d))
            note(f"discrimination_score_{d}, all genes", as_theirs(score(d_real, d_pred)), peer.discrimination_score(data, metric=d, exclude_target_gene=False))
    return worst


def de_tables(real, pred, fdr_real, fdr_pred):
    "cell-eval's differential-expression input from effects and false discovery rates, perturbations by genes."
    import polars as pl
    from cell_eval._types import initialize_de_comparison
    n, g = real.shape
    names = {"target": [f"P{i:03d}" for i in range(n) for _ in range(g)], "feature": [f"g{j}" for _ in range(n) for j in range(g)]}
    frame = lambda lfc, fdr: pl.DataFrame({**names, "log2_fold_change": lfc.ravel(), "abs_log2_fold_change": np.abs(lfc).ravel(), "p_value": fdr.ravel(), "fdr": fdr.ravel()})
    return initialize_de_comparison(frame(real, fdr_real), frame(pred, fdr_pred))


def cell_eval_de(n_cases: int = N_CASES) -> dict:
    "Largest difference for the metrics on lists of genes, in the setting where both definitions mean the same."
    from cell_eval.metrics import _de as peer
    worst = {}
    def note(name, ours, theirs):
        theirs = np.array([theirs[f"P{i:03d}"] for i in range(len(ours))], dtype=float)
        worst[name] = max(worst.get(name, 0.0), float(np.nanmax(np.abs(ours - theirs))))
        assert (np.isnan(ours) == np.isnan(theirs)).all()
    for k in range(n_cases // 50):
        stream = rng(k, "peers.de")
        real, noise = stream.normal(size=(2, 50, 40))
        pred, deg = real + noise, stream.random((50, 40)) < .3
        deg[:, 0] = True
        everything = de_tables(real, pred, np.zeros((50, 40)), np.zeros((50, 40)))
        note("overlap_at_10 (all genes significant)", effect.overlap_at_n(real, pred, n_top=10), peer.de_overlap_metric(everything, k=10))
        note("de_direction_match (all genes significant)", effect.sign_agreement(real, pred, n_top=40), peer.DEDirectionMatch()(everything))
        fdr_pred = 10.0 ** -(np.abs(pred) / np.abs(pred).max() * 9)  # significance that orders the genes like |pred|
        tested = de_tables(real, pred, np.where(deg, 0.0, 1.0), fdr_pred)
        note("pr_auc", effect.de_auprc(real, pred, deg=deg), peer.compute_pr_auc(tested))
        as_many = np.where(effect.top_share(np.abs(pred), deg.sum(1)) > .5, 0.0, 1.0)  # as many genes called as are true
        called = de_tables(real, pred, np.where(deg, 0.0, 1.0), as_many)
        note("de_sig_genes_recall (as many called as true)", effect.de_recall(real, pred, deg=deg), peer.DESigGenesRecall()(called))
    return worst


# --------------------------------------------------------------------- pertpy

def clouds(n_cases: int):
    "Pairs of clouds of 2 to 14 cells and genes."
    for k in range(n_cases):
        draw = rng(k, "peers.cells")
        n, m, genes = (int(v) for v in draw.integers(2, 15, 3))
        yield draw.normal(size=(n, genes)), draw.normal(size=(m, genes)) * draw.uniform(.5, 2) + draw.normal()


def pertpy_distances(n_cases: int = N_CASES) -> dict:
    "Largest difference for each distance of pertpy that has a counterpart here."
    from pertpy.tools import Distance
    peers = {k: Distance(k, obsm_key="X_pca") for k in ("edistance", "mmd", "euclidean", "mse", "mean_absolute_error", "pearson_distance", "spearman_distance", "cosine_distance", "r2_distance")}
    worst = {}
    def note(name, ours, theirs): worst[name] = max(worst.get(name, 0.0), abs(float(ours) - float(theirs)))
    for x, y in clouds(n_cases):
        note("edistance", distribution.energy_v(x, y), peers["edistance"](x, y))
        note("mmd, linear", distribution.mmd2_linear_v(x, y), peers["mmd"](x, y))
        note("mmd, rbf, gamma 0.3", distribution.mmd2_rbf_v(x, y, gamma=.3), peers["mmd"](x, y, kernel="rbf", gamma=.3))
        a, b = x.mean(0)[None], y.mean(0)[None]
        for key, f in (("euclidean", effect.l2), ("mse", effect.mse), ("mean_absolute_error", effect.mae)): note(key, f(a, b)[0], peers[key](x, y))
        note("cosine_distance", 1 - effect.cosine_delta(a, b)[0], peers["cosine_distance"](x, y))
        if x.shape[1] > 2:
            note("pearson_distance", 1 - effect.pearson_delta(a, b)[0], peers["pearson_distance"](x, y))
            note("spearman_distance", 1 - effect.spearman_delta(a, b)[0], peers["spearman_distance"](x, y))
            note("r2_distance", 1 - effect.r2(a, b)[0], peers["r2_distance"](x, y))
    return worst


# ---------------------------------------------------------------- differences

def differences() -> list:
    "Cases in which the definitions part: (what, ours, theirs, why)."
    from cell_eval.metrics import _anndata as ce, _de
    from pertpy.tools import Distance
    rows = []
    draw = rng(0, "peers.differences").normal
    control, real = np.zeros(6), draw(size=(4, 6)).round(1)
    wrong = np.roll(real, 1, axis=0)
    data = pair(real, wrong, control, control)
    rows.append(("discrimination_score_l2, four perturbations, mean over rows that are all wrong by one place", discrimination.pds_l2(real, wrong).mean(), np.mean(list(ce.discrimination_score(data, "l2").values())),
                 "cell-eval divides the rank by N, we by N-1 (`pds_as_cell_eval` converts exactly)"))
    zeros = np.zeros((50, 6))
    truths = draw(size=(50, 6))
    tie = pair(truths, zeros, control, control)
    theirs = list(ce.discrimination_score(tie, "cosine").values())
    rows.append(("discrimination_score_cosine of a prediction of zeros: first and last perturbation", f"{discrimination.pds_cosine(truths, zeros)[0]:.2f}, {discrimination.pds_cosine(truths, zeros)[-1]:.2f}", f"{theirs[0]:.2f}, {theirs[-1]:.2f}",
                 "all distances tie; cell-eval takes the order of the rows, we give every row one half"))
    noisy = zeros[:1] + .3
    noisy[0, ::2] = .1 + .2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows.append(("pearson_delta of a constant with rounding noise (0.3 and 0.1 + 0.2)", effect.pearson_delta(truths[:1], noisy)[0], ce.pearson_delta(pair(truths[:1], noisy, control, control))["P000"],
                     "we call a spread below 1e-12 of the size constant"))
    one = np.array([[3., 2, 1, 0]])
    some = de_tables(one, one, np.array([[0, 0, 1., 1]]), np.array([[0, 1., 1, 1]]))
    rows.append(("overlap_at_3 of a perfect prediction, two of four genes truly significant, one called", effect.overlap_at_n(one, one, n_top=3)[0], _de.de_overlap_metric(some, k=3)["P000"],
                 "cell-eval ranks significant genes only and shortens N to what is truly significant; ours ranks all genes"))
    none = de_tables(one, one, np.ones((1, 4)), np.ones((1, 4)))
    rows.append(("overlap when no gene is significant", effect.overlap_at_n(one, one, n_top=3)[0], _de.de_overlap_metric(none, k=3)["P000"], "cell-eval returns 0"))
    rows.append(("direction match of a no-change prediction", effect.sign_agreement(one, 0 * one, n_top=3)[0], _de.DEDirectionMatch()(de_tables(one, 0 * one, np.array([[0, 0, 0, 1.]]), np.ones((1, 4))))["P000"],
                 "a predicted 0 counts one half here, and as a wrong sign in cell-eval"))
    x, y = next(clouds(1))
    rows.append(("edistance against the unbiased energy distance", distribution.energy_u(x, y), Distance("edistance")(x, y), "pertpy 1.0 counts each cell paired with itself: `energy_v`"))
    rows.append(("edistance against squared distances (scPerturb's paper, pertpy from 2023 to 2025)", distribution.energy_squared_v(x, y), Distance("edistance")(x, y), "another quantity: twice the squared distance of the means"))
    rows.append(("mmd, rbf, defaults", distribution.mmd2_rbf_v(x, y), Distance("mmd")(x, y, kernel="rbf"), "pertpy's default gamma is 1, ours the median heuristic; pertpy's default kernel is linear"))
    return rows


# ---------------------------------------------------------------------- report

def table(title: str, found: dict, n: int) -> str:
    lines = [f"{title}: {n} cases each.", "", "| metric there | largest difference |", "|---|---|"]
    return "\n".join(lines + [f"| {k} | {v:.1e} |" for k, v in found.items()])


def report(n: int = N_CASES) -> str:
    show = lambda v: v if isinstance(v, str) else "NaN" if np.isnan(v) else f"{v:.4f}"
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("cell-eval", "pertpy", "scikit-learn", "numpy"))
    parts = ["# Agreement with other packages", "Made by `benchmarks/peers.py --write`, not edited by hand. " + versions + ".",
             "## Where the definitions are the same",
             table("cell-eval, mean profiles (differences of the discrimination scores after `pds_as_cell_eval`)", cell_eval_effect(n), n),
             table("cell-eval, lists of genes (it keeps significance in single precision)", cell_eval_de(n), n), table("pertpy", pertpy_distances(n), n),
             "## Where they are not",
             "\n".join(["| case | here | there | why |", "|---|---|---|---|", *(f"| {w} | {show(o)} | {show(t)} | {y} |" for w, o, t, y in differences())])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"  # cell-eval draws a bar for each call
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable(logging.WARNING)
    text = report()
    print(text)
    if "--write" in sys.argv[1:]: (Path(__file__).parent / "peers.md").write_text(text, encoding="utf-8")
