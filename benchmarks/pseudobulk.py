"""Speed and memory of the streamed pseudobulk beside a bare decode and other packages, on shards shaped like those of Tahoe-100M.

    python benchmarks/pseudobulk.py INPUT [--peers PYTHON] [--cells 600000] [--write]

INPUT is a folder; 100,000 simulated cells of 62,710 genes in four shards are made there if it is empty (a few minutes, 380 MB). PYTHON is an
interpreter that has scanpy and decoupler (the extra `peers`). Each measurement is a process of its own; three rounds, each with every approach
in turn, so that a busy machine is busy for all of them; medians, and ratios within a round. Nothing in pseudobulk.md was typed by hand.
"""
import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

PAGE = Path(__file__).with_suffix(".md")
COLUMNS = ["genes", "expressions", "BARCODE_SUB_LIB_ID", "drug", "sample", "cell_line_id", "plate"]
N_GENES, N_WELLS, N_LINES, PANEL = 62_710, 96, 50, 2000


# ------------------------------------------------------------------ input

def wells() -> pd.DataFrame:
    drug = ["DMSO_TF" if i % 32 == 0 else f"drug_{i:03d}" for i in range(N_WELLS)]
    dose = [0.0 if d == "DMSO_TF" else (0.05, 0.5, 5.0)[i % 3] for i, d in enumerate(drug)]
    return pd.DataFrame({"sample": [f"smp_{1700 + i}" for i in range(N_WELLS)], "plate": "plate4", "drug": drug, "drugname_drugconc": [str([(d, x, "uM")]) for d, x in zip(drug, dose)]})


def make_input(root: Path, n_cells: int = 100_000, n_shards: int = 4) -> None:
    "One plate: cells sorted by well, lines mixed, about 1,470 genes a cell, row groups of 1,000 cells, snappy."
    from perturbnb.core import rng
    draw = rng(0, "benchmarks.pseudobulk")
    (root / "data").mkdir(parents=True); (root / "metadata").mkdir()
    w = wells()
    w.to_parquet(root / "metadata/sample_metadata.parquet")
    pd.DataFrame({"gene_symbol": [f"G{i}" for i in range(N_GENES)], "ensembl_id": [f"ENSG{i:011d}" for i in range(N_GENES)], "token_id": np.arange(3, N_GENES + 3)}).to_parquet(root / "metadata/gene_metadata.parquet")
    names = sorted(set(w.drug) - {"DMSO_TF"})
    pd.DataFrame({"drug": names, "targets": pd.Series([None] * len(names), dtype=object), "moa-fine": "unclear", "canonical_smiles": "CCO", "pubchem_cid": 1.0}).to_parquet(root / "metadata/drug_metadata.parquet")
    level = draw.lognormal(-3.2, 2.2, N_GENES) * (draw.random(N_GENES) > 0.35)
    share = np.cumsum(level * draw.lognormal(0, 0.8, (N_LINES, N_GENES)), axis=1)
    share /= share[:, -1:]
    well, line = np.sort(draw.integers(0, N_WELLS, n_cells)), draw.integers(0, N_LINES, n_cells)
    for i, rows in enumerate(np.array_split(np.arange(n_cells), n_shards)):
        out = None
        for part in np.array_split(rows, -(-len(rows) // 1000)):
            found = [np.unique(np.searchsorted(share[line[c]], draw.random(int(draw.lognormal(np.log(2600), 0.45)))), return_counts=True) for c in part]
            start = pa.array(np.cumsum([0, *(len(g) + 1 for g, _ in found)]).astype("int32"))
            token = np.concatenate([np.r_[1, np.minimum(g, N_GENES - 1) + 3] for g, _ in found])
            count = np.concatenate([np.r_[-2, n] for _, n in found]).astype("float32")
            text = {"drug": w.drug.to_numpy()[well[part]], "sample": w["sample"].to_numpy()[well[part]], "BARCODE_SUB_LIB_ID": [f"{c % 96:02d}_{c // 96 % 384:03d}_{c // 36864:03d}-lib_1105" for c in part],
                    "cell_line_id": [f"CVCL_{1000 + x}" for x in line[part]], "plate": ["plate4"] * len(part)}
            table = pa.table({"genes": pa.ListArray.from_arrays(start, token), "expressions": pa.ListArray.from_arrays(start, count), **{k: pa.array(list(v)) for k, v in text.items()}})
            out = out or pq.ParquetWriter(root / f"data/train-{i:05d}-of-{n_shards:05d}.parquet", table.schema, compression="snappy")
            out.write_table(table)
        out.close()


def shards(root: Path) -> list: return sorted((root / "data").glob("train-*.parquet"))


def n_cells(paths) -> int: return sum(pq.read_metadata(p).num_rows for p in paths)


def linked(root: Path, folder: Path, cells: int) -> Path:
    "The same shards under many numbers, as links."
    times = max(1, round(cells / n_cells(shards(root))))
    (folder / "data").mkdir(parents=True); (folder / "metadata").symlink_to((root / "metadata").absolute())
    all_ = shards(root) * times
    for i, p in enumerate(all_): (folder / f"data/train-{i:05d}-of-{len(all_):05d}.parquet").symlink_to(p.absolute())
    return folder


# ------------------------------------------------------------------ one measurement in one process

def clocked(f):
    wall, cpu = time.perf_counter(), time.process_time()
    cells = f()
    return {"cells": cells, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def read(path, dictionary=(), threads=False) -> int:
    file = pq.ParquetFile(path, read_dictionary=list(dictionary))
    return sum(file.read_row_group(i, columns=COLUMNS, use_threads=threads).num_rows for i in range(file.num_row_groups))


def pooled_decode(root: Path, times: int = 1):
    "Row groups of all files decoded by a pool with a thread for each core, and thrown away."
    from concurrent.futures import ThreadPoolExecutor
    def work():
        with ThreadPoolExecutor(cores()) as pool: return sum(pool.map(lambda p: read(p, COLUMNS[3:]), shards(root) * times))
    read(shards(root)[0])
    return clocked(work)


def duckdb_scan(root: Path, times: int = 1):
    "DuckDB reads the same columns; the last value of each list is added up, so that the lists have to be decoded."
    import duckdb
    con = duckdb.connect()
    con.execute(f"SET threads TO {cores()}")
    query = "SELECT count(*), sum(genes[len(genes)]), sum(expressions[len(expressions)]), max(drug), max(sample), max(cell_line_id), max(plate), max(BARCODE_SUB_LIB_ID) FROM read_parquet(?)"
    return clocked(lambda: con.execute(query, [[str(p) for p in shards(root) * times]]).fetchone()[0])


def published(root: Path):
    "The same with the published SHA-256 of every shard, all of which are verified."
    return ours(root, hashes=True)


def ours(root: Path, times: int = 3, workers: int = 0, hashes: bool = False):
    "tahoe_bulk, its parts timed: the counting of shards (with hashes, checks and snapshots), compiled beforehand; and the writing of the table."
    from perturbnb.data import tahoe, tahoe_bulk as tb
    genes = tahoe.read_genes(root / "metadata/gene_metadata.parquet")
    job = tb._make_job(genes, tahoe.read_samples(root / "metadata/sample_metadata.parquet"), panel(genes), 0)
    tb._add(tb._Sums(job, 1e6, lambda s: None), next(iter(tb._row_groups(shards(root)[0])))[1].slice(0, 10), None)
    tb._Manifest.claim = lambda *a, **k: None  # the same cells under many names
    parts, run, finish, marks, shard = {}, tb._run_workers, tb._finish, [], tb._Progress.shard
    def marked(self, path): shard(self, path); marks.append((self.cells, time.perf_counter(), time.process_time()))
    tb._Progress.shard = marked
    def counted(paths, *a): parts["count"] = clocked(lambda: (run(paths, *a), n_cells(shards(root)) * times)[1])
    def finished(*a): begin = time.perf_counter(); done = finish(*a); parts["write"] = time.perf_counter() - begin; return done
    tb._run_workers, tb._finish = counted, finished
    with tempfile.TemporaryDirectory(dir=root) as folder:
        many = linked(root, Path(folder) / "many", n_cells(shards(root)) * times)
        known = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in shards(root)} if hashes else {}
        said = {p.name: known[p.resolve()] for p in shards(many)} if hashes else None
        whole = clocked(lambda: tb.tahoe_bulk(many, Path(folder) / "b.h5ad", panel=panel(genes), workers=workers or cores(), hashes=said, progress=False).cells)
    used = (workers or cores()) * N_WELLS * N_LINES * PANEL * 32 / 2**20
    from_, to = (marks[len(marks) // 3], marks[-1])
    steady = dict(zip(("cells", "wall", "cpu"), (y - x for x, y in zip(from_, to))))
    return {**steady, "count": parts["count"], "end_to_end": whole, "write_s": parts["write"], "peak_mb": whole["peak_mb"], "sums_mb": used}


def panel(genes) -> list: return genes["ensembl_id"].tolist()[:: len(genes) // PANEL][:PANEL]


def cells_in_memory(root: Path):
    "AnnData of raw counts, all genes, read by row groups without a copy more than needed."
    import anndata as ad
    from scipy import sparse
    raw, obs = [], []
    for p in shards(root):
        file = pq.ParquetFile(p, read_dictionary=COLUMNS[3:])
        for i in range(file.num_row_groups):
            b = file.read_row_group(i, columns=COLUMNS).combine_chunks().to_batches()[0]
            start, token, count = b["genes"].offsets.to_numpy(), b["genes"].values.to_numpy(), b["expressions"].values.to_numpy()
            keep = np.ones(len(token), bool); keep[start[:-1]] = False
            raw.append(sparse.csr_matrix((count[keep], token[keep] - 3, start - np.arange(len(start))), shape=(len(b), N_GENES)))
            obs.append(b.select(["drug", "sample", "cell_line_id", "plate"]).to_pandas().astype(str))
    obs = pd.concat(obs, ignore_index=True).astype("category").set_axis([str(i) for i in range(sum(map(len, obs)))])
    genes = pd.read_parquet(root / "metadata/gene_metadata.parquet").set_index("ensembl_id")
    return ad.AnnData(sparse.vstack(raw, format="csr"), obs.assign(group=(obs["sample"].astype(str) + "|" + obs["cell_line_id"].astype(str)).astype("category")), genes)


def scanpy_aggregate(root: Path):
    "The usual way with scanpy: normalize_total, log1p, the panel, get.aggregate; mean and variance of the logs, sum of the counts."
    import scanpy as sc
    def work():
        a = cells_in_memory(root)
        kept = panel(a.var.reset_index())
        raw = a[:, kept].X.copy()
        sc.pp.normalize_total(a, target_sum=1e4); sc.pp.log1p(a)
        a = a[:, kept].copy(); a.layers["counts"] = raw
        begin = time.process_time()
        sc.get.aggregate(a, "group", ["mean", "var"]); sc.get.aggregate(a, "group", "sum", layer="counts")
        work.alone = time.process_time() - begin
        return a.n_obs
    return {**clocked(work), "alone": work.alone}


def decoupler_pseudobulk(root: Path, every: bool = False):
    "decoupler.pp.pseudobulk: sums of the counts of the panel (or of all genes) by well and line; the means would be a second call."
    import decoupler as dc
    def work():
        a = cells_in_memory(root)
        if not every: a = a[:, panel(a.var.reset_index())].copy()
        begin = time.process_time()
        dc.pp.pseudobulk(a, sample_col="sample", groups_col="cell_line_id", mode="sum", skip_checks=True, verbose=False)
        work.alone = time.process_time() - begin
        return a.n_obs
    return {**clocked(work), "alone": work.alone}


def decoupler_all_genes(root: Path): return decoupler_pseudobulk(root, every=True)


def memory(root: Path, cells: int, workers: int):
    return ours(root, max(1, round(cells / n_cells(shards(root)))), workers)


ONE = {f.__name__: f for f in (pooled_decode, duckdb_scan, ours, published, scanpy_aggregate, decoupler_pseudobulk, decoupler_all_genes, memory)}


def cores() -> int: return len(os.sched_getaffinity(0))


# ------------------------------------------------------------------ the page

def measure(python: str, name: str, root: Path, *args) -> dict:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([python, __file__, str(root), "--one", name, *map(str, args)], capture_output=True, text=True, env=env)
    if done.returncode: print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr); return {}
    out = json.loads(done.stdout.splitlines()[-1])
    print(name, *args, {k: round(v, 1) for k, v in out.items() if isinstance(v, (int, float))}, file=sys.stderr, flush=True)
    return out


def speed(runs: list, key: str) -> float: return float(np.median([r["cells"] / r[key] for r in runs])) if runs and all(runs) else float("nan")


def ratio(a: list, b: list, key: str) -> str:
    "Median of the ratios within rounds, and their range."
    if not (a and b and all(a) and all(b)): return "not measured"
    r = [(x["cells"] / x[key]) / (y["cells"] / y[key]) for x, y in zip(a, b)]
    return f"{np.median(r):.2f} ({min(r):.2f} to {max(r):.2f})"


LABEL = {"pooled_decode": "bare pyarrow decode, pooled", "duckdb_scan": "DuckDB scan of the same columns", "ours": "tahoe_bulk: counting, steady state", "published": "tahoe_bulk: counting, published SHA-256 verified, steady state", "scanpy_aggregate": "scanpy.get.aggregate, from the shards", "decoupler_pseudobulk": "decoupler.pp.pseudobulk of the panel, from the shards", "decoupler_all_genes": "decoupler.pp.pseudobulk of all genes, from the shards"}


def version(python: str, name: str) -> str:
    code = f"from importlib.metadata import version; print(version({name!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or "not there"


def page(runs: dict, sizes: list, python: str, load: list) -> str:
    o, d = runs["ours"], runs["pooled_decode"]
    rows = [f"| {LABEL[k]} | {speed(v, 'wall'):,.0f} | {speed(v, 'cpu'):,.0f} | {np.median([r['peak_mb'] for r in v]):,.0f} |" for k, v in runs.items() if v and all(v)]
    whole = [r["end_to_end"] for r in o]
    rows.insert(4, f"| tahoe_bulk: all, from the call to the written table | {speed(whole, 'wall'):,.0f} | {speed(whole, 'cpu'):,.0f} | {np.median([r['peak_mb'] for r in o]):,.0f} |")
    alone = lambda k: " " + (f"{np.median([r['cells'] / r['alone'] for r in runs[k]]):,.0f} cells a CPU-second" if runs[k] and all(runs[k]) else "not measured")
    target = [(f"{name} ({key})", *(ratio(x, runs[k], key) for x in (o, runs["published"], whole)), asked)
              for k, name, asked in (("pooled_decode", "bare decode", "0.70"), ("duckdb_scan", "DuckDB scan", ""), ("scanpy_aggregate", "scanpy.get.aggregate", "3"), ("decoupler_all_genes", "decoupler, all genes", "10"), ("decoupler_pseudobulk", "decoupler, the panel alone", "10")) for key in ("wall", "cpu")]
    versions = ", ".join([f"{n} {metadata.version(n)}" for n in ("pyarrow", "numba", "numpy", "duckdb")] + [f"{n} {version(python, n)}" for n in ("scanpy", "decoupler")])
    memory = [f"| {r['end_to_end']['cells']:,} | {r['workers']} | {r['sums_mb']:,.0f} | {r['peak_mb']:,.0f} | {r['peak_mb'] - r['sums_mb']:,.0f} | {r['end_to_end']['cells'] / r['end_to_end']['wall']:,.0f} |" for r in sizes]
    return f"""# Streaming pseudobulk

Made by `benchmarks/pseudobulk.py --write`, not edited by hand. {versions}. {cores()} cores, shared with other work while this ran (load {min(load):.1f} to {max(load):.1f}): ratios within a round and cells per
CPU-second are steadier than cells per second.

Input: {runs['n_cells'] if 'n_cells' in runs else 100_000:,} simulated cells in the shape of Tahoe-100M, {N_GENES:,} genes, {PANEL:,} of them in the panel, up to {N_WELLS * N_LINES:,} groups. Ours reads the shards three times over. Three rounds, medians.

| approach | cells/s | cells per CPU-s | peak MB |
|---|---|---|---|
{chr(10).join(rows)}

"Counting" is decoding, every check, the XXH3 of every byte, the sums and the snapshots that fall due, with the loops compiled beforehand, in the last two thirds of the run: by then all groups have been met, and their
memory has been handed over. "All" is everything: metadata, the first third, the last snapshot, merge and compressed table, without published hashes.
scanpy and decoupler start from the same shards, through AnnData; their own step alone, on cells in memory, does{alone('scanpy_aggregate')} and{alone('decoupler_pseudobulk')}.

Ratio of cells/s, ours over theirs: median (range) of three rounds.

| against | counting | counting, SHA-256 verified | all, table written | asked for |
|---|---|---|---|---|
{chr(10).join(f"| {' | '.join(r)} |" for r in target)}

decoupler is asked for sums only (of all genes, as a user calls it, or of the panel, cut out beforehand), scanpy for means, variances and sums, and neither writes a table; ours adds halves, hashes and checks. XXH3 tells a damaged
shard from a sound one and is part of every run; where the source publishes SHA-256 and the user names the list, every shard is verified against it: the second column. The written table is a fixed cost, the same for 100,000 cells and for 100 million of as many groups.

## Memory

The same shards under many numbers, {PANEL:,} genes. The accumulators are {N_WELLS * N_LINES:,} groups for each worker.

| cells | workers | accumulators, MB | peak, MB | rest, MB | cells/s |
|---|---|---|---|---|---|
{chr(10).join(memory)}

Asked for: at most 600 MB beside the accumulators, whatever the number of cells.
"""


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("input", type=Path); ask.add_argument("--peers", default=sys.executable); ask.add_argument("--cells", type=int, default=600_000)
    ask.add_argument("--write", action="store_true"); ask.add_argument("--one", nargs="+")
    a = ask.parse_args()
    if a.one: print(json.dumps(ONE[a.one[0]](a.input, *map(int, a.one[1:])))); return
    if not (a.input / "data").is_dir(): make_input(a.input)
    runs, load = {k: [] for k in LABEL}, []
    for _ in range(3):
        for name in LABEL:
            load.append(os.getloadavg()[0])
            runs[name].append(measure(a.peers if name.startswith(("scanpy", "decoupler")) else sys.executable, name, a.input))
    sizes = [{**measure(sys.executable, "memory", a.input, n, w), "workers": w} for n, w in ((100_000, 1), (a.cells, 1))]
    text = page(runs, sizes, a.peers, load)
    print(text)
    if a.write: PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__": main()
