"""Speed and validation loss of the encoders of wells: exact attention, linear attention, gene groups.

    python benchmarks/tcell.py speed   FOLDER               seconds for a training step at 768 wells x 2,541 genes, batch 32, in alternating rounds
    python benchmarks/tcell.py quality FOLDER [--genes 300] validation loss after 50 epochs, five seeds, grouped split; can be stopped and run again
    python benchmarks/tcell.py page    FOLDER               tcell.md from what is in FOLDER

FOLDER keeps simulated plates, finished trainings and their checkpoints. Nothing in tcell.md was typed by hand.
"""
import argparse
import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd

PAGE = Path(__file__).with_suffix(".md")
EPOCHS, BATCH, SEEDS = 50, 32, range(5)
PLAIN = dict(size="base", sketch=0, gene_dropout=0.0)  # the published width and depth, heads on the latent
FORMS = {"exact": dict(PLAIN, attention="exact"), "linear": dict(PLAIN, attention="linear"), "groups, plain": dict(PLAIN, attention="groups"),
         "groups, base": dict(size="base"), "groups, demo (the default)": dict(size="demo")}


def wells(folder: Path, genes: int):
    from perturbnb.data.drugseq import read_tables
    from perturbnb.data.simulate_drugseq import simulate_drugseq
    size = {300: "small", 2541: "medium"}[genes]
    if not (folder / size).is_dir(): simulate_drugseq(folder / size, seed=1, size=size)
    return read_tables(folder / size)


def parts(a, seed: int):
    "Training and validation wells: a fifth of the metabolites is held out."
    from perturbnb.interpret.tcell_study import well_split
    s = well_split(a, "metabolite", seed)
    return a[s.mask(a, "train") | s.mask(a, "control")], a[s.mask(a, "test")]


def speed(folder: Path, rounds: int = 3, steps: int = 2) -> None:
    import torch
    from perturbnb.models.tcell import TCell, TCellTask, _new_net, _scaled, _scaler, _targets
    torch.set_num_threads(os.cpu_count())
    a, out = wells(folder, 2541), []
    train, _ = parts(a, 0)
    for r in range(rounds):
        for name, form in FORMS.items():
            model = TCell(**form)
            model.arrays = _scaler(train.X, True)
            net = _new_net(model.options, a.n_vars).train()
            task = TCellTask(net, _scaled(model, train.X), _targets(train.obs, "train"), None, BATCH, .2)
            adam = torch.optim.AdamW(net.parameters(), lr=1e-3)
            def step(i):
                task.loss(np.arange(i * BATCH, (i + 1) * BATCH) % len(train), 0.)["loss"].backward(); adam.step(); adam.zero_grad()
            step(0)
            begin = time.perf_counter()
            for i in range(steps): step(i + 1)
            per_epoch = (time.perf_counter() - begin) / steps * -(-len(train) // BATCH)
            out.append(dict(round=r, form=name, epoch_s=per_epoch, threads=torch.get_num_threads(), load=os.getloadavg()[0]))
            print(out[-1], flush=True)
            (folder / "speed.json").write_text(json.dumps(out))


def quality(folder: Path, genes: int, only: "list | None" = None) -> None:
    import torch
    from perturbnb.models.tcell import TCell
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    a, place = wells(folder, genes), folder / f"quality-{genes}"
    place.mkdir(exist_ok=True)
    for seed in SEEDS:
        train, val = parts(a, seed)
        for name, form in FORMS.items():
            file = place / f"{name.split()[0].strip(',')}-{'-'.join(name.split()[1:2]) or 'plain'}-{seed}.json"
            if file.is_file() or only and name.split(",")[0] not in only: continue
            t = TCell(**form, seed=seed, epochs=EPOCHS, dir=file.with_suffix("")).fit(train, val).history
            best = t.table.loc[t.table.val_loss.idxmin()]
            file.write_text(json.dumps(dict(form=name, seed=seed, genes=genes, val_loss=float(best.val_loss), epoch=int(best.epoch), last=float(t.table.val_loss.iloc[-1]), epochs=len(t.table), val_mse=float(best.val_mse))))
            print(file.read_text(), flush=True)


def paired(x: np.ndarray) -> "tuple[float, float, float]":
    "Mean of differences over seeds with a 95 % t interval."
    from scipy.stats import t
    half = t.ppf(.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else np.nan
    return x.mean(), x.mean() - half, x.mean() + half


def page(folder: Path) -> None:
    s = pd.DataFrame(json.loads((folder / "speed.json").read_text()))
    base = s[s.form == "exact"].set_index("round").epoch_s
    lines = []
    for name in FORMS:
        e = s[s.form == name].set_index("round").epoch_s
        ratio = base / e
        lines.append(f"| {name} | {e.median():,.1f} | {ratio.median():,.1f} ({ratio.min():,.1f} to {ratio.max():,.1f}) |")
    tables = []
    for where in sorted(folder.glob("quality-*")):
        q = pd.DataFrame([json.loads(p.read_text()) for p in sorted(where.glob("*.json"))])
        if q.empty: continue
        exact, rows = q[q.form == "exact"].set_index("seed").val_loss, []
        for name in FORMS:
            t = q[q.form == name].set_index("seed")
            d = (t.val_loss - exact).dropna().to_numpy()
            m, lo, hi = paired(d) if len(d) and name != "exact" else (np.nan,) * 3
            said = "" if name == "exact" else f"{m:+.3f} ({lo:+.3f} to {hi:+.3f}), {len(d)} seeds" if len(d) > 1 else f"{m:+.3f}, one seed" if len(d) else "exact not finished"
            rows.append(f"| {name} | {t.val_loss.mean():.3f} | {t.epoch.mean():.0f} | {t.val_mse.mean():.3f} | {said} |" if len(t) else f"| {name} | not run | | | |")
        tables.append(f"{q.genes.iloc[0]:,} genes, {len(q.seed.unique())} seeds\n\n| form | lowest validation loss | at epoch | of it the three scores (MSE) | minus exact, 95 % interval over seeds |\n|---|---|---|---|---|\n" + "\n".join(rows))
    newline = "\n"
    PAGE.write_text(f"""# Encoders of wells

Made by `benchmarks/tcell.py page`, not edited by hand. PyTorch {metadata.version("torch")}, {s.threads.iloc[0]} threads on {os.cpu_count()} cores ({platform.machine()}), load {s.load.min():.1f} to {s.load.max():.1f}.

## Time

768 simulated wells x 2,541 genes (a fifth of the metabolites held out), batch {BATCH}. Seconds for an epoch, from {len(s) // len(FORMS)} alternating rounds of a few steps each: median; and how many times faster than exact attention in the same round: median (range).

| form | s/epoch | times faster |
|---|---|---|
{newline.join(lines)}

*exact*, *linear*, *groups, plain*: published width (128), depth (2), feed-forward (512), no sketch and no gene dropout, so that only the attention differs. *groups, base* adds the linear sketch and gene dropout; *groups, demo* is the default of the package (width 64, one layer).

## Validation loss

Up to {EPOCHS} epochs, batch {BATCH}, the same schedule; lowest loss on metabolites that training has not seen. Below 0 in the last column: lower loss than exact attention.

{(newline * 2).join(tables) or "Not run."}
""", encoding="utf-8")
    print(PAGE.read_text())


if __name__ == "__main__":
    ask = argparse.ArgumentParser()
    ask.add_argument("what", choices=["speed", "quality", "page"]); ask.add_argument("folder", type=Path); ask.add_argument("--genes", type=int, default=300)
    ask.add_argument("--only", nargs="+"); ask.add_argument("--rounds", type=int, default=3)
    a = ask.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    if a.what == "speed": speed(a.folder, a.rounds)
    elif a.what == "quality": quality(a.folder, a.genes, a.only)
    else: page(a.folder)
