"""Coverage of the intervals of perturbnb.metrics.uncertainty, ceiling and calibration on simulated data with a known truth -> intervals.md.

Run from the root of a clone: python benchmarks/intervals.py   (a few minutes on one core; no data needed)
"""
import platform
from pathlib import Path

import numpy as np
import pandas as pd

from perturbnb.core import rng
from perturbnb.metrics.calibration import calibrate
from perturbnb.metrics.ceiling import ceiling, screen
from perturbnb.metrics.registry import Metric
from perturbnb.metrics.uncertainty import METHODS, bootstrap, coverage_of, mean_interval, over_seeds, permutation_test, simulate_crossed, simulate_groups

REPEATS, DRAWS = 2000, 2000
ALONE = dict(sizes=(1, 1), icc=1)
GROUPED = {
    "60 rows, log-normal 0.5": (60, dict(ALONE, skew=.5)), "60 rows, log-normal 0.75": (60, dict(ALONE, skew=.75)),
    "60 rows, log-normal 1": (60, dict(ALONE, skew=1.)), "60 rows, log-normal 1.5": (60, dict(ALONE, skew=1.5)),
    "30 rows, normal": (30, ALONE), "8 rows, normal": (8, ALONE), "5 rows, normal": (5, ALONE), "5 rows, log-normal 0.75": (5, dict(ALONE, skew=.75)),
    **{f"{g} drugs, icc {i}": (g, dict(icc=i)) for g in (5, 6, 8, 12, 20, 40) for i in (.3, .5)},
    **{f"{g} drugs, icc 0.4, log-normal 0.75": (g, dict(icc=.4, skew=.75)) for g in (6, 12, 20, 40)}}
CROSSED = {
    "40 x 20, drug 0.3, line 0.2": (40, 20, {}), "40 x 20, 40 % of the pairs": (40, 20, dict(kept=.4)), "40 x 20, drugs alone differ": (40, 20, dict(shares=(.3, 0, .7))),
    "40 x 20, lines alone differ": (40, 20, dict(shares=(0, .3, .7))), "40 x 20, neither differs": (40, 20, dict(shares=(0, 0, 1))),
    "40 x 20, log-normal 0.75": (40, 20, dict(skew=.75)), "40 x 20, log-normal 0.75, 40 %": (40, 20, dict(skew=.75, kept=.4)),
    "12 x 8": (12, 8, {}), "12 x 8, 40 % of the pairs": (12, 8, dict(kept=.4)), "40 x 5": (40, 5, {})}


def grouped(average: str) -> pd.DataFrame:
    "Percent of data sets whose interval holds the truth, settings by methods."
    rows = {}
    for name, (g, kw) in GROUPED.items():
        if average == "macro" and "drugs" not in name: continue
        data = simulate_groups(g, REPEATS, seed=1, **kw)
        rows[name] = {m: 100 * coverage_of(*data, average=average, method=m, n_boot=DRAWS) for m in METHODS}
    return pd.DataFrame(rows).T


def crossed() -> pd.DataFrame:
    "The same for drugs crossed with lines; micro means."
    rows = {}
    for name, (d, l, kw) in CROSSED.items():
        data = [simulate_crossed(d, l, seed, **kw) for seed in range(REPEATS)]
        hold = lambda method, table: 100 * np.mean([(e := mean_interval(v, g if table else None, method=method, n_boot=1000)).low <= 0 <= e.high for v, g in data])
        rows[name] = {**{m: hold(m, True) for m in ("wider", "bootstrap_t", "jackknife_t")}, "as if rows were independent": hold("jackknife_t", False)}
    return pd.DataFrame(rows).T


def gini(x):
    x, n = np.sort(x), len(x)
    return (2 * np.arange(1, n + 1) - n - 1) @ x / (n * x.sum())


def whole_table(repeats: int = 1000) -> pd.DataFrame:
    "Statistics that are no means; 500 draws."
    gen = rng(2, "benchmarks.coverage")
    cases = {"median of 60 log-normal values (truth 1)": (np.median, lambda: np.exp(gen.standard_normal(60)), 1.0),
             "Gini of 60 exponential counts (truth 1/2)": (gini, lambda: gen.exponential(size=60), 0.5),
             "Gini of 300 exponential counts": (gini, lambda: gen.exponential(size=300), 0.5)}
    return pd.DataFrame({name: {m: 100 * np.mean([(e := bootstrap(f, d, method=m, n_boot=500)).low <= truth <= e.high for d in (draw() for _ in range(repeats))])
                                for m in ("percentile", "bca")} for name, (f, draw, truth) in cases.items()}).T


def seeds(repeats: int = 1000) -> pd.DataFrame:
    "Interval for new seeds: 40 rows, and the seeds' own standard deviation beside 0.5 of the rows and 0.3 of both."
    gen, rows = rng(3, "benchmarks.coverage"), {}
    for n in (2, 3, 5):
        for sd in (0.0, .1, .3):
            tables = [pd.DataFrame(gen.standard_normal((40, 1)) * .5 + sd * gen.standard_normal(n) + .3 * gen.standard_normal((40, n))) for _ in range(repeats)]
            held = [over_seeds(t, n_boot=200, n_perm=100) for t in tables]
            rows[f"{n} seeds, sd {sd}"] = {k: 100 * np.mean([getattr(h, a).low <= 0 <= getattr(h, a).high for h in held]) for k, a in (("new seeds", "new"), ("these seeds only", "these"))}
    return pd.DataFrame(rows).T


def false_alarms(repeats: int = 2000) -> pd.DataFrame:
    "Percent of data sets without a difference in which the sign-flip test gives p <= 0.05."
    gen, rows = rng(4, "benchmarks.coverage"), {}
    for n in (6, 12, 30):
        sizes = gen.integers(1, 20, (repeats, n))
        group = [np.repeat(np.arange(n), k) for k in sizes]
        rows[f"{n} units"] = {"rows, normal": 100 * np.mean([permutation_test(gen.standard_normal(n), n_perm=999)[0] <= .05 for _ in range(repeats)]),
                              "rows, log-normal 0.75 about its mean": 100 * np.mean([permutation_test(np.exp(.75 * gen.standard_normal(n)) - np.exp(.75**2 / 2), n_perm=999)[0] <= .05 for _ in range(repeats)]),
                              "drugs of 1 to 19 rows": 100 * np.mean([permutation_test(gen.standard_normal(n)[g] + gen.standard_normal(len(g)), g, n_perm=999)[0] <= .05 for g in group])}
    return pd.DataFrame(rows).T


def noise_screen(seed: int, together: float, strength: float = 0.0, n_perts: int = 12, n_cells: int = 30, n_control: int = 60, n_genes: int = 40):
    "Cells of perturbations whose effects have the given strength, in units of the noise of a cell; genes share two factors of size `together`."
    gen = rng(seed, "benchmarks.coverage.screen", f"{together} {strength} {n_control}")
    pert = np.repeat(["control", *(f"P{i:02}" for i in range(n_perts))], [n_control, *[n_cells] * n_perts])
    x = gen.standard_normal((len(pert), n_genes)) + together * gen.standard_normal((len(pert), 2)) @ gen.standard_normal((2, n_genes))
    return screen(x + np.vstack([np.zeros((n_control, n_genes)), np.repeat(strength * gen.standard_normal((n_perts, n_genes)), n_cells, 0)]), pert, "control")


def noise_ceilings(repeats: int = 400) -> pd.DataFrame:
    "Ceilings of screens without any effect, 10 splits."
    rows = {}
    for together in (0.0, .5, 1.0):
        for n_control in (30, 120):
            found = [ceiling(noise_screen(i, together, n_control=n_control), n_splits=10, n_boot=300).r for i in range(repeats)]
            rows[f"genes together {together}, {n_control} control cells"] = {
                "interval holds 0": 100 * np.mean([e.low <= 0 <= e.high for e in found]), "claims a signal": 100 * np.mean([e.low > 0 for e in found]),
                "mean r x 100": 100 * np.mean([e.value for e in found])}
    return pd.DataFrame(rows).T


def correlation(real, pred):
    a, b = (x - x.mean(1, keepdims=True) for x in (real, pred))
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.where(size > 1e-12, (a * b).sum(1) / np.where(size > 0, size, 1), np.nan)


def claims(repeats: int = 400) -> pd.DataFrame:
    "Percent of screens in which a metric is said to tell signal from noise; technical | interpolated duplicate."
    about = dict(kind="effect", formula="x", unit="none", undefined="a constant row", source="benchmarks")
    toys = [Metric("squared_error@1", lambda r, p: ((r - p)**2).mean(1), low=0, high=np.inf, better="lower", null=None, **about),
            Metric("correlation@1", correlation, low=-1, high=1, better="higher", null=0.0, **about)]
    rows = {}
    for strength in (0.0, .25, .5, 1.0):
        for together in (0.0, .5, 1.0):
            found = pd.concat([calibrate(noise_screen(i, together, strength), toys, n_splits=5, n_boot=300).verdicts for i in range(repeats if strength == 0 else repeats // 8)])
            yes = found.assign(yes=100.0 * (found.verdict == "yes")).groupby(["metric", "positive"]).yes.mean()
            rows[f"effect {strength}, genes together {together}"] = {f"{m.split('@')[0]}, {p.split()[0]}": v for (m, p), v in yes.items()}
    return pd.DataFrame(rows).T


def markdown(table: pd.DataFrame) -> str:
    head = ["setting", *table.columns]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join([str(i), *(f"{v:.1f}" for v in row)]) + " |" for i, row in zip(table.index, table.to_numpy())])


def main():
    parts = [
        ("Means of independent or grouped rows, micro", f"{REPEATS:,} data sets, {DRAWS:,} draws; drugs have 1 to 50 rows, uniform; icc is the share of the variance between drugs.", grouped("micro")),
        ("The same, macro", "Mean of the drugs' means.", grouped("macro")),
        ("Drugs crossed with lines, micro", f"{REPEATS:,} data sets, 1,000 draws; the shares are of the variance.", crossed()),
        ("Statistics of a whole table", "1,000 data sets, 500 draws.", whole_table()),
        ("Over seeds", "1,000 data sets of 40 rows.", seeds()),
        ("False alarms of the sign-flip test at 0.05, percent", "2,000 data sets without a difference. With 6 units the smallest p is 2/64 = 0.031; the log-normal case breaks the assumption of symmetry.", false_alarms()),
        ("Ceilings of pure noise", "400 screens of 12 perturbations, 30 cells each, 40 genes, without any effect; interval over perturbations and control cells.", noise_ceilings()),
        ("Verdicts of `metrics.calibration`: percent of screens with a yes", "Screens as above with 60 control cells; 400 without effects, 50 with effects of the given size (unit: noise of one cell). The first three rows are false claims.", claims())]
    text = ["# Coverage of the intervals of `metrics.uncertainty`, `ceiling` and `calibration`", "",
            "Percent of simulated data sets whose nominal 95 % interval holds the known truth. With 2,000 data sets one standard error is 0.5 points.",
            f"Made by `python benchmarks/intervals.py` (NumPy {np.__version__}, Python {platform.python_version()}). The default method is `wider`.", ""]
    for title, words, table in parts: text += [f"## {title}", "", words, "", markdown(table), ""]
    Path(__file__).with_suffix(".md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
