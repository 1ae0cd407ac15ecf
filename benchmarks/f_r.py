"""Does the forward model beat the means, and which of its parts matter? -> f_r.md

Run from the root of a clone: OMP_NUM_THREADS=1 python benchmarks/f_r.py --cache FOLDER [--part main|ablations|sizes] [--write]
Simulated Tahoe data, size medium (seed 0), five seeds: each is the seed of a split and of the network. Every finished fit is kept in FOLDER and not repeated.
"""
import argparse
import hashlib
import json
import platform
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from perturbnb.data import tahoe
from perturbnb.data.audit import audit
from perturbnb.data.cell_features import controls_of
from perturbnb.data.demo import read_truth
from perturbnb.data.effects import effects, pseudobulk_halves
from perturbnb.data.schema import read, write
from perturbnb.data.simulate import simulate_tahoe
from perturbnb.data.split import split
from perturbnb.metrics.ceiling import perfect_score, spearman_brown
from perturbnb.metrics.effect import pearson_delta
from perturbnb.metrics.uncertainty import mean_interval, paired_difference
from perturbnb.models.baselines import baseline
from perturbnb.models.f_r import ForwardModel, SIZES

RULES, SEEDS = ("pair", "unseen_drug", "unseen_scaffold", "unseen_cell_line"), (0, 1, 2, 3, 4)
BY = ["pert", "cell_line", "dose_um", "batch"]
BASELINES = {"additive": ("additive", {}, False), "additive with dose": ("additive", dict(factors=["pert", "cell_line", "dose_um"]), False), "drug_mean": ("drug_mean", {}, False),
             "ridge_morgan": ("ridge_morgan", {}, False), "nearest_compound": ("nearest_compound", {}, False), "zeros_drug": ("zeros_drug", {}, False),
             "additive, told the plate": ("additive", {}, True), "ridge_morgan, told the plate": ("ridge_morgan", {}, True)}
ABLATIONS = {"no link": dict(link=False), "no control error": dict(control_error=False), "no gain of the line": dict(gain=False), "no dose curve": dict(dose="none"), "random programmes": dict(svd=False),
             "rows count alike": dict(weight_cells=0), "no drug dropout": dict(drug_dropout=0.0), "learned drug vector alone": dict(drug="zeros"), "learned line": dict(cell="learned"), "no features of the line": dict(cell="zeros"),
             "control genes not read": dict(sequence=False), "no transformer layer": dict(layers=0), "order: ratio": dict(order="ratio"), "order: difference": dict(order="difference"),
             "with rank loss (0.1)": dict(lambda_rank=0.1), "with alignment (0.05)": dict(lambda_align=0.05), "with cosine (0.3)": dict(lambda_cosine=0.3)}


def table(cache: Path, size: str):
    "(effects with the truth and halves as layers, controls), made once."
    root, file = cache / f"tahoe_{size}", cache / f"bulk_{size}.h5ad"
    if not root.exists(): simulate_tahoe(root, seed=0, size=size)
    if not file.exists():
        genes, samples = tahoe.read_genes(root / "metadata/gene_metadata.parquet"), tahoe.read_samples(root / "metadata/sample_metadata.parquet")
        cells = tahoe.read_cells(tahoe.shards(root), genes, samples=samples)
        drugs = tahoe.read_drugs(root / "metadata/drug_metadata.parquet").set_index("drug")
        o = cells.obs.rename(columns={"drug": "pert", "cell_line_id": "cell_line", "plate": "batch"})
        smiles = o.pert.map(drugs.canonical_smiles).astype(object)
        cells.obs = o.assign(pert_type=np.where(tahoe.is_control(o.pert), "control", "compound"), time_h=24.0, smiles=smiles.where(smiles.notna(), None))
        write(pseudobulk_halves(cells, BY, keep=["pert_type", "time_h", "smiles"]), file)
    bulk = read(file)
    e, truth = effects(bulk, min_control_cells=20), read_truth(root)
    key = lambda o: pd.MultiIndex.from_arrays([o.pert.astype(str), o.cell_line.astype(str), o.dose_um.astype(float)])
    e.layers["truth"] = np.asarray(truth[:, e.var_names].X, float)[key(truth.obs).get_indexer(key(e.obs))]
    return e, controls_of(bulk)


def scores(e, rows, pred, clean) -> pd.DataFrame:
    "Pearson delta of each row: against the measured effect, and of the plate-free prediction against the truth."
    value = lambda layer, p: np.nan_to_num(pearson_delta(np.asarray(e.X if layer is None else e.layers[layer], float)[rows], p))
    return pd.DataFrame({"row": e.obs_names[rows], "pert": e.obs.pert.astype(str).to_numpy()[rows], "cell_line": e.obs.cell_line.astype(str).to_numpy()[rows],
                         "measured": value(None, pred), "truth": value("truth", clean)})


def one(e, controls, s, kind, options, seed, size):
    "Row scores of one model on the test rows of one split; seconds of processor time of the fit."
    part = {p: np.flatnonzero(s.mask(e, p)) for p in ("train", "val", "test")}
    t = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "f_r": m = ForwardModel(controls, **{"size": "demo", "seed": seed, **options})
        else:
            name, options, plate = BASELINES[kind]
            m = baseline(name, **options)
            if plate: e = e.copy(); e.obs["cell_line_"] = e.obs.cell_line; e.obs["cell_line"] = e.obs.cell_line.astype(str) + "|" + e.obs.batch.astype(str)
        m.fit(e[part["train"]], e[part["val"]])
        ask = e.obs.iloc[part["test"]]
        pred = m.predict(ask)
        clean = m.predict(ask.assign(batch=None)) if kind == "f_r" else pred
    seconds = time.process_time() - t
    if kind != "f_r" and BASELINES[kind][2]: e.obs["cell_line"] = e.obs["cell_line_"]
    return scores(e, part["test"], pred, clean).assign(seconds=seconds, best=getattr(getattr(m, "history", None), "best", None))


def kept(cache: Path, e, controls, kind, options, rules, seeds, size) -> pd.DataFrame:
    "The scores of a model on all splits; from the cache where they are there."
    out = []
    for rule in rules:
        for seed in seeds:
            s = split(rule, e, seed)
            tag = hashlib.sha256(json.dumps([kind, options, s.hash, seed, size, SIZES if kind == "f_r" else BASELINES.get(kind)], sort_keys=True).encode()).hexdigest()[:16]
            file = cache / "fits" / f"{tag}.parquet"
            file.parent.mkdir(exist_ok=True)
            if not file.exists():
                audit(s, e)
                one(e, controls, s, kind, options, seed, size).to_parquet(file)
                print(kind, options, rule, seed, "done", flush=True)
            out.append(pd.read_parquet(file).assign(rule=rule, seed=seed))
    return pd.concat(out, ignore_index=True).assign(id=lambda t: t.seed.astype(str) + "|" + t.row).set_index("id")


def groups_of(t: pd.DataFrame, rule: str):
    "Rows of one drug share their luck over lines and seeds; where lines are held out, rows of one line do."
    return t["cell_line"] if rule == "unseen_cell_line" else t["pert"] if rule.startswith("unseen") else t[["pert", "cell_line"]]


def compare(a: pd.DataFrame, b: pd.DataFrame, rule: str, column: str) -> str:
    a, b = a[a.rule == rule], b[b.rule == rule]
    d = paired_difference(a[column], b[column], groups_of(a, rule))
    return f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"


def mean(t: pd.DataFrame, rule: str, column: str) -> float: return float(t.loc[t.rule == rule, column].mean())


def markdown(rows: list, columns: list) -> str:
    return "\n".join(["| " + " | ".join(map(str, r)) + " |" for r in (columns, ["---"] * len(columns), *rows)])


def main_part(cache, e, controls, size):
    f = kept(cache, e, controls, "f_r", {}, RULES, SEEDS, size)
    base = {k: kept(cache, e, controls, k, {}, RULES, SEEDS, size) for k in BASELINES}
    text = []
    r = np.nan_to_num(pearson_delta(e.layers["half_a"][(have := ~np.isnan(e.layers["half_a"] + e.layers["half_b"]).any(1))], e.layers["half_b"][have]))
    r = pd.Series(r, e.obs_names[have]); half = pd.Series(np.sign(r) * perfect_score(spearman_brown(r.abs())), r.index)
    true = pd.Series(np.nan_to_num(pearson_delta(np.asarray(e.X, float), e.layers["truth"])), e.obs_names)
    for rule in RULES:
        mine = f[f.rule == rule]
        both = mine[mine.row.isin(half.index)]
        best = lambda s, t: s.loc[t.row].mean()
        rows = [["f_r", f"{mean(f, rule, 'measured'):.3f}", "", f"{mean(f, rule, 'truth'):.3f}", ""]]
        rows += [[k, f"{mean(b, rule, 'measured'):.3f}", compare(f, b, rule, "measured"), f"{mean(b, rule, 'truth'):.3f}", compare(f, b, rule, "truth")] for k, b in base.items()]
        rows += [["the truth itself", f"{best(true, mine):.3f}", f"share reached {mine.measured.mean() / best(true, mine):.2f}", "1", ""],
                 ["from halves of the cells", f"{best(half, both):.3f}", f"share reached {both.measured.mean() / best(half, both):.2f}", "", f"{len(both)} of {len(mine)} rows have two halves"]]
        text += [f"## {rule}\n", f"{len(mine)} test rows over five seeds, {mine.pert.nunique()} drugs, {mine.cell_line.nunique()} lines. Seconds of a fit (processor time, one thread): {mine.groupby('seed').seconds.first().median():.0f}.\n",
                 markdown(rows, ["model", "measured", "f_r minus it", "truth", "f_r minus it"]), ""]
    return "\n".join(text)


def ablation_part(cache, e, controls, size, rules=("pair", "unseen_drug"), seeds=SEEDS, names=ABLATIONS):
    f, rows = kept(cache, e, controls, "f_r", {}, rules, seeds, size), []
    for name in names:
        a = kept(cache, e, controls, "f_r", ABLATIONS[name], rules, seeds, size)
        rows.append([name, *(compare(a, f, rule, c) for rule in rules for c in ("measured", "truth"))])
        print(rows[-1], flush=True)
    return "## What each part does\n\nChanged model minus the model above, Pearson delta; below 0 means that the part helps.\n\n" + markdown(rows, ["change", *(f"{r}, {c}" for r in rules for c in ("measured", "truth"))]) + "\n"


HEAD = """# The forward model beside the means

Made by `python benchmarks/f_r.py`, not edited by hand. Simulated Tahoe data of {n_drugs} drugs, {n_lines} cell lines and {n_genes} genes, {n} effects; five seeds, each the seed of a split and of
the network. Size `demo` of the model. Every split was audited. {machine}

*measured*: Pearson delta against the effect as measured. *truth*: Pearson delta of the prediction without a plate against the true effect of the simulation. Intervals
are 95 %, paired over rows; rows of a drug (of a line where lines are held out, of both where pairs are) share their luck.

**Read the two columns together.** All effects of a plate are taken against one control mean and share its error. A model that is told the plate can predict that error, and f_r does, from the controls
and from the other drugs of the plate: this raises *measured* above what the true effects reach, and says nothing about drugs. The baselines "told the plate" have the same chance. *truth* is free of it.

"""

if __name__ == "__main__":
    args = argparse.ArgumentParser()
    args.add_argument("--cache", required=True); args.add_argument("--part", default="main"); args.add_argument("--size", default="medium"); args.add_argument("--write", action="store_true")
    args.add_argument("--seeds", type=int, default=5); args.add_argument("--only", default="")
    args = args.parse_args()
    import torch
    torch.set_num_threads(1)
    cache = Path(args.cache); cache.mkdir(exist_ok=True, parents=True)
    e, controls = table(cache, args.size)
    parts = {"main": lambda: main_part(cache, e, controls, args.size), "ablations": lambda: ablation_part(cache, e, controls, args.size, seeds=SEEDS[:args.seeds], names=[n for n in ABLATIONS if args.only in n])}
    text = "\n".join(parts[p]() for p in args.part.split(","))
    head = HEAD.format(n_drugs=e.obs.pert.nunique(), n_lines=e.obs.cell_line.nunique(), n_genes=e.n_vars, n=e.n_obs, machine=f"Python {platform.python_version()}, PyTorch {torch.__version__.split('+')[0]}, one thread.")
    print(text)
    if args.write: Path(__file__).with_suffix(".md").write_text(head + text)
