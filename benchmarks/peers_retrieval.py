"""Agreement of the retrieval metrics with copairs; needs the `peers` extra.

    python benchmarks/peers_retrieval.py            print the page
    python benchmarks/peers_retrieval.py --write    and write benchmarks/peers_retrieval.md
"""
import sys
import tempfile
import unittest.mock
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from copairs.map import average_precision, mean_average_precision
from copairs.map.average_precision import p_values

from perturbnb.core import rng
from perturbnb.metrics.relevance import relevance
from perturbnb.metrics.retrieval import evaluate
from perturbnb.metrics.retrieve import retrieve
from perturbnb.metrics.retrieval_null import ap_p_values, group_p_values

N_SETS, N_WELLS, N_DRAWS = 25, 60, 10_000
RULES = {"same class, any plate": (dict(pos_sameby=["moa"], pos_diffby=[], neg_sameby=[], neg_diffby=["moa"]), dict(same="moa", plate=None)),
         "same class, another plate": (dict(pos_sameby=["moa"], pos_diffby=["batch"], neg_sameby=[], neg_diffby=["moa", "batch"]), dict(same="moa", plate="batch")),
         "same class, another drug": (dict(pos_sameby=["moa"], pos_diffby=["pert"], neg_sameby=[], neg_diffby=["moa"]), dict(same="moa", differ="pert", plate=None)),
         "same class, candidates of the same line": (dict(pos_sameby=["moa", "cell_line"], pos_diffby=[], neg_sameby=["cell_line"], neg_diffby=["moa"]), dict(same="moa", within="cell_line", plate=None))}


def screen(seed: int) -> tuple:
    "Metadata and profiles of one random screen: 15 drugs of 5 classes, 4 plates, 2 lines."
    draw = rng(seed, "benchmark.peers.retrieval")
    drug = draw.integers(0, 15, N_WELLS)
    obs = pd.DataFrame({"pert": [f"d{i}" for i in drug], "moa": [f"class {i % 5}" for i in drug], "batch": draw.choice(list("ABCD"), N_WELLS), "cell_line": draw.choice(["A549", "K562"], N_WELLS)},
                       index=[f"w{i}" for i in range(N_WELLS)])
    return obs, (draw.normal(size=(15, 30))[drug] * .5 + draw.normal(size=(5, 30))[drug % 5] * .5 + draw.normal(size=(N_WELLS, 30)))


def agreement() -> tuple:
    "Largest differences by rule, and everything needed for p-values."
    rows, kept = [], []
    for name, (theirs, ours) in RULES.items():
        gaps, n, counts = {"ap@1": [], "ap_normalised@1": []}, 0, True
        for seed in range(N_SETS):
            obs, x = screen(seed)
            a = average_precision(obs, x, **theirs, progress_bar=False)
            for distance, similarity in (("cosine", "cosine"), ("correlation", "pearson"), ("euclidean", "neg_l2")) if seed < 5 else (("cosine", "cosine"),):
                a = average_precision(obs, x, **theirs, distance=distance, progress_bar=False)
                r = retrieve(x, x, relevance(obs, **ours), metrics=list(gaps), similarity=similarity, dtype="float64", index=obs.index)
                has = (a.n_pos_pairs > 0).to_numpy()
                counts &= (a.n_pos_pairs.to_numpy() == r.counts.n_relevant).all() and (a.n_total_pairs.to_numpy() == r.counts.n_candidates)[has].all()
                for column, i in (("average_precision", "ap@1"), ("normalized_average_precision", "ap_normalised@1")): gaps[i].append(np.abs(a[column].to_numpy()[has] - r.values[i].to_numpy()[has]))
                n += has.sum()
            if seed == 0: kept.append((name, obs, average_precision(obs, x, **theirs, progress_bar=False), retrieve(x, x, relevance(obs, **ours), metrics=["ap"], dtype="float64")))
        gaps = {i: np.concatenate(g) for i, g in gaps.items()}
        rows.append((name, n, counts, gaps["ap@1"].max(), gaps["ap_normalised@1"].max()))
    return rows, kept


def chances(kept: list) -> list:
    "Largest difference of p-values in standard errors of the draws, per query and per group."
    rows = []
    for name, obs, a, r in kept:
        mine = ap_p_values(r.values["ap@1"], r.counts.n_relevant, r.counts.n_candidates, n_draws=N_DRAWS)
        with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.dict("os.environ", HOME=tmp):  # copairs keeps its draws in the home folder
            groups = mean_average_precision(a, ["moa"], N_DRAWS, 0.05, 0, progress_bar=False).set_index("moa")
            theirs = p_values(a, N_DRAWS, 0, progress_bar=False).astype(float)
        ok = ~np.isnan(mine)
        z = lambda p, q: np.max(np.abs(p - q) / np.sqrt(2 * np.maximum(q * (1 - q), 1 / N_DRAWS) / N_DRAWS))
        g = group_p_values(r.values["ap@1"], r.counts.n_relevant, r.counts.n_candidates, obs.moa, n_draws=N_DRAWS).set_index("group").loc[groups.index]
        rows.append((name, z(theirs[ok], mine[ok]), np.abs(g.mean_ap - groups.mean_average_precision).max(), z(groups.p_value.to_numpy(), g.p.to_numpy())))
    return rows


def ties() -> tuple:
    "AP of the first two wells of two classes when all profiles are equal: copairs, ours."
    obs = pd.DataFrame({"moa": list("AABBBB")}, index=[f"w{i}" for i in range(6)])
    a = average_precision(obs, np.ones((6, 3)), ["moa"], [], [], ["moa"], progress_bar=False)
    r = retrieve(np.ones((6, 3)), np.ones((6, 3)), relevance(obs, same="moa", plate=None), metrics=["ap"])
    return a.average_precision[0], r.values["ap@1"][0], r.chance["ap@1"][0]


def several() -> tuple:
    "AP of a well with two classes against wells with one each: copairs for each class, ours for any."
    from copairs.map.multilabel import average_precision as multilabel
    obs = pd.DataFrame({"moa": ["A|B", "A", "B", "C"]}, index=list("wxyz"))
    x = np.array([[1., 0], [1, .1], [1, .9], [1, .5]])
    lists = obs.assign(moa=obs.moa.str.split("|")).reset_index(drop=True)
    a = multilabel(lists, x, ["moa"], [], [], ["moa"], multilabel_col="moa", progress_bar=False)
    r = evaluate(x @ x.T / np.outer(*[np.linalg.norm(x, axis=1)] * 2), relevance(obs, same="moa", plate=None), metrics=["ap"])
    return a[["moa", "average_precision", "n_pos_pairs", "n_total_pairs"]].head(2).to_dict("records"), r.values["ap@1"].iloc[0]


def refused() -> list:
    "What copairs says to a missing label, and to labels of which no two are equal."
    rule, out = dict(pos_sameby=["moa"], pos_diffby=[], neg_sameby=[], neg_diffby=["moa"], progress_bar=False), []
    for moa in (["A", "A", "B", None], list("ABCD")):
        try: average_precision(pd.DataFrame({"moa": moa}, index=list("wxyz")), np.eye(4) + .1, **rule)
        except Exception as e: out.append(f"{type(e).__name__}: {e}")  # its own kinds of error; printed on the page
    assert len(out) == 2
    return out


def page() -> str:
    rows, kept = agreement()
    missing, unpaired = refused()
    p, (tie_theirs, tie_ours, tie_chance), (many, one) = chances(kept), ties(), several()
    assert all(r[2] and max(r[3:]) < 1e-6 for r in rows), rows
    assert all(max(r[1], r[3]) < 6 and r[2] < 1e-6 for r in p), p
    return f"""# Agreement with copairs

Made by `benchmarks/peers_retrieval.py --write`, not edited by hand. copairs {version("copairs")}, numpy {np.__version__}. {N_SETS} random screens of {N_WELLS} wells; cosine in all of them, Pearson correlation and
Euclidean distance in five.

## The same

Average precision (`ap@1`), normalised average precision (`ap_normalised@1`), and which pairs are compared (number of right candidates and of all candidates of each query).

| rule | queries | same pairs | largest difference of AP | of normalised AP |
|---|---|---|---|---|
{chr(10).join(f"| {n} | {q} | {'yes' if c else 'NO'} | {x:.1e} | {y:.1e} |" for n, q, c, x, y in rows)}

AP depends on ranks alone, so what remains is the rounding of sums.

P-values rest on {N_DRAWS:,} random draws on each side, so they agree up to the error of the draws: the largest difference in standard errors of that error.

| rule | p of a query (`ap_p_values`) | largest difference of a group's mAP | p of a group (`group_p_values`) |
|---|---|---|---|
{chr(10).join(f"| {n} | {x:.1f} | {y:.1e} | {z:.1f} |" for n, x, y, z in p)}

## Different on purpose

- **Ties.** Six equal profiles, classes A A B B B B. For the first well the second is right and four are wrong, and nothing can tell them apart. copairs gives AP {tie_theirs:.3f}, which is the order of the file; `ap@1` gives {tie_ours:.3f}, the mean over all orders, which is its chance, {tie_chance:.3f}.
- **Several labels.** A well of classes A and B among wells of A, B and C. copairs gives one AP for each class of the query ({"; ".join(f"{m['moa']}: {m['average_precision']:.3f}, {m['n_pos_pairs']} right of {m['n_total_pairs']}" for m in many)}); here any shared class is right and the query has one AP ({one:.3f}).
- **p of a group.** copairs counts draws that are strictly better than what was seen, we count those at least as good, so that p cannot come out too small where AP takes few values.
- **Unknown labels.** copairs refuses a missing label (`{missing}`), and a word such as *unclear* is a class like any other. Here both match nothing, and such wells remain as wrong candidates unless `drop_unknown=True`.
- **Undefined.** Where no pair is right copairs raises (`{unpaired}`); here the value of such a query is NaN, and it is counted.
"""


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    text = page()
    print(text)
    if "--write" in sys.argv: Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
