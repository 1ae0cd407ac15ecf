"""Does the response encoder find drug and targets better than a look-up, and does its transformer pay? -> f_p.md

Run from the root of a clone: OMP_NUM_THREADS=1 python benchmarks/f_p.py --cache FOLDER [--jobs 2] [--write]
Simulated Tahoe data, size medium (60 drugs, 8 lines), seed 1, which no setting of the model has seen. Five seeds, each of a split and of the network. Finished fits are kept in FOLDER and not repeated.
"""
import argparse
import platform
from pathlib import Path

from perturbnb.data import schema
from perturbnb.data.simulate import simulate_tahoe
from perturbnb.interpret import forward_study as forward, response_study as study
from perturbnb.report import f_p_words as words

RULES, SEEDS, SIMULATION = ("pair", "unseen_drug", "unseen_scaffold", "unseen_cell_line"), (0, 1, 2, 3, 4), 1
VARIANTS = {"as it is": ({}, RULES), "without the transformer layer": (dict(layers=0), ("pair", "unseen_drug"))}


def table_of(cache: Path):
    "(table of the study with the truth, hash), made once."
    root, done = cache / "tahoe_medium", cache / "study"
    if not root.exists(): simulate_tahoe(root, seed=SIMULATION, size="medium")
    if not (done / "table.h5ad").exists():
        screen, truth = forward.demo_bulk_with_halves(root)
        table = forward.study_table(screen, truth=truth)
        forward.write_study(table, forward.study_controls(screen, table.var_names), done)
    table, controls = (schema.read(done / f"{n}.h5ad") for n in ("table", "controls"))
    return table, forward.write_study(table, controls, done)


def markdown(t) -> str: return "\n".join("| " + " | ".join(map(str, r)) + " |" for r in ([*t.columns], ["---"] * t.shape[1], *t.to_numpy().tolist()))


if __name__ == "__main__":
    args = argparse.ArgumentParser()
    args.add_argument("--cache", required=True); args.add_argument("--jobs", type=int, default=1); args.add_argument("--write", action="store_true"); args.add_argument("--boot", type=int, default=1000)
    args = args.parse_args()
    import torch
    torch.set_num_threads(1)
    cache = Path(args.cache); cache.mkdir(exist_ok=True, parents=True)
    table, data_hash = table_of(cache)
    text = [f"""# The response encoder beside look-ups

Made by `python benchmarks/f_p.py`, not edited by hand. Simulated Tahoe data of {table.obs.pert.nunique()} drugs, {table.obs.cell_line.nunique()} cell lines and {table.n_vars:,} genes, {table.n_obs:,} effects, simulation seed {SIMULATION},
which no setting has seen; five seeds, each of a split and of the network. Size `base`. Every split was audited. Python {platform.python_version()}, PyTorch {torch.__version__.split("+")[0]}, one thread a training. The runs are those of the report `f_p`.

Leak-free: the control cells of a query are others than those of the training profiles. *Best baseline* was chosen on these very rows, which favours it. Intervals are 95 %, paired by query and seed, over drugs, lines and
seeds. *Best possible* knows the simulated truth.
"""]
    for name, (changes, rules) in VARIANTS.items():
        place = study.response_runs(study.response_tasks(rules, SEEDS, size="base", changes=changes, published=False), cache / "study", data_hash, jobs=args.jobs)
        found = study.response_measured(place, table, rules, n_boot=args.boot, seed=0)
        for question, what in (("drug", "Which drug? Mean reciprocal rank (for held-out drugs among the new drugs alone)"), ("targets", "Which target genes? mAP@10")):
            text += [f"## {what}: {name}\n", markdown(words.answer_table(found, question)) + "\n"]
    text = "\n".join(text).replace("\xa0", " ")
    print(text)
    if args.write: Path(__file__).with_suffix(".md").write_text(text)
