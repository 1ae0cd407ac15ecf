"Streaming pseudobulk: the same bytes for any number of workers and after any number of kills; damage is named and nothing is half written."
import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perturbnb.cli import check_path
from perturbnb.core import ChangedFile, InputError, MissingFile, OutputError, PerturbError, file_hash, rng
from perturbnb.data import schema, tahoe, tahoe_bulk as tb
from perturbnb.data.simulate import simulate_tahoe

SHARDS = 9


def resplit(root: Path, n: int) -> None:
    "The same cells in n shards, without recorded hashes."
    old = tahoe.shards(root)
    table = pa.concat_tables([pq.read_table(p) for p in old])
    for p in old: p.unlink()
    for i, rows in enumerate(np.array_split(np.arange(len(table)), n)):
        pq.write_table(table.slice(rows[0], len(rows)), root / f"data/train-{i:05d}-of-{n:05d}.parquet", row_group_size=40, compression="snappy", write_page_checksum=True)
    (root / "SHA256SUMS").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    "1,200 cells in nine shards of four row groups."
    root = simulate_tahoe(tmp_path_factory.mktemp("bulk") / "tahoe", seed=3, size="tiny")
    resplit(root, SHARDS)
    return root


@pytest.fixture(scope="module")
def panel(release): return tahoe.read_genes(release / "metadata/gene_metadata.parquet").ensembl_id[::3].tolist()


def bulk(root, out, panel, **kw): return tb.tahoe_bulk(root, out, panel=panel, progress=False, **kw)


@pytest.fixture(scope="module")
def expected(release, panel, tmp_path_factory):
    "Hash of the table that every way of making it must give."
    return file_hash(bulk(release, tmp_path_factory.mktemp("expected") / "b.h5ad", panel, workers=1).path)


@pytest.fixture
def copy(release, tmp_path): return Path(shutil.copytree(release, tmp_path / "copy"))


def edit(root: Path, i: int, change) -> Path:
    "Rewrite shard i with its rows, as a list of dicts, changed."
    path = tahoe.shards(root)[i]
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist(change(rows) or rows, schema=pq.read_schema(path)), path, row_group_size=40)
    return path


def one_line(kind, root, out, panel, *words, **kw):
    with pytest.raises(kind) as e: bulk(root, out, panel, **kw)
    line = str(e.value)
    assert "\n" not in line and not out.exists(), line
    for w in words: assert w in line, line
    return line


# ------------------------------------------------------------------ the same bytes

@pytest.mark.parametrize("workers", [2, 4, 20])
def test_any_number_of_workers(release, panel, expected, tmp_path, workers):
    facts = bulk(release, tmp_path / "b.h5ad", panel, workers=workers)
    assert file_hash(facts.path) == expected and facts.shards == SHARDS
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["b.h5ad", "b.h5ad.manifest.json"]


def test_equals_pseudobulk_of_the_same_cells_bit_for_bit(release, panel, tmp_path):
    genes, samples = (getattr(tahoe, f"read_{k}s")(release / f"metadata/{k}_metadata.parquet") for k in ("gene", "sample"))
    want = schema.pseudobulk(tahoe.read_cells(tahoe.shards(release), genes, samples=samples), ["drug", "cell_line_id", "dose_um", "plate"])[:, panel]
    have = schema.read(bulk(release, tmp_path / "b.h5ad", panel).path)
    np.testing.assert_array_equal(have.X, want.X, strict=True)
    for name in ("mean_sq", "se", "sum"): np.testing.assert_array_equal(have.layers[name], want.layers[name], strict=True)
    assert have.obs_names.tolist() == want.obs_names.tolist() and have.obs.n_cells.tolist() == want.obs.n_cells.tolist()
    assert (have.obs.n_a + have.obs.n_b == have.obs.n_cells).all() and 0.4 < have.obs.n_a.sum() / have.obs.n_cells.sum() < 0.6


def test_sharding_does_not_matter(copy, release, panel, tmp_path):
    resplit(copy, 2)
    a, b = (schema.read(bulk(r, tmp_path / f"{i}.h5ad", panel).path) for i, r in enumerate((release, copy)))
    for name in ("half_a", "half_b", "sum"): np.testing.assert_array_equal(a.layers[name], b.layers[name])
    pd.testing.assert_frame_equal(a.obs, b.obs)


def test_a_full_budget_goes_to_disk(release, panel, expected, tmp_path, monkeypatch):
    spilled, spill = [], tb._Worker.spill
    monkeypatch.setattr(tb._Worker, "spill", lambda self, sums: (spilled.append(1), spill(self, sums)))
    facts = bulk(release, tmp_path / "b.h5ad", panel, workers=2, memory_gb=0.001)  # room for 16 of the 24 groups
    assert file_hash(facts.path) == expected
    few = tb._Sums.__init__
    monkeypatch.setattr(tb._Sums, "__init__", lambda self, job, budget, s=None: few(self, job, 0, s))
    assert file_hash(bulk(release, tmp_path / "c.h5ad", panel, workers=2).path) == expected and spilled


def test_dask(release, panel, expected, tmp_path):
    distributed = pytest.importorskip("dask.distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=True, dashboard_address=None) as cluster, distributed.Client(cluster) as client:
        assert file_hash(bulk(release, tmp_path / "b.h5ad", panel, client=client).path) == expected
        edit(shutil.copytree(release, tmp_path / "copy"), 4, lambda rows: rows[3]["expressions"].__setitem__(1, -1.0))
        one_line(InputError, tmp_path / "copy", tmp_path / "c.h5ad", panel, "train-00004-of-00009.parquet, row 4: count -1", client=client)


# ------------------------------------------------------------------ killed

def slowly(root, out, panel, pause):
    add = tb._add_shard
    tb._add_shard = lambda *a, **k: (time.sleep(pause), add(*a, **k))[1]
    bulk(root, out, panel, workers=2)


def noted(out: Path) -> int:
    "Shards that the manifest on the disk lists."
    try: return len(json.loads(Path(f"{out}.work/manifest.json").read_text())["shards"])
    except FileNotFoundError: return 0


def killed_after(root, out, panel, shards, wait) -> bool:
    "Start in a process of its own and kill it a moment after so many more shards were noted; whether it was still at work."
    before = noted(out)
    child = multiprocessing.get_context("fork").Process(target=slowly, args=(root, out, panel, 0.01))
    child.start()
    while child.is_alive() and not (Path(f"{out}.work").exists() and noted(out) >= min(SHARDS, before + shards)): time.sleep(0.002)
    child.join(wait)
    alive = child.is_alive()
    child.kill(); child.join(60)
    assert child.exitcode is not None
    return alive


STOPPED = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started us may ignore the signal
from perturbnb.cli import main
from perturbnb.data import tahoe_bulk as tb
add = tb._add_shard
tb._add_shard = lambda *a, **k: (time.sleep(.1), add(*a, **k))[1]
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a child")
def test_ctrl_c_says_how_far_it_came(release, panel, expected, tmp_path):
    out = tmp_path / "b.h5ad"
    (tmp_path / "panel.txt").write_text("\n".join(panel))
    child = subprocess.Popen([sys.executable, "-c", STOPPED, "prepare", "tahoe", release, out, "--panel", tmp_path / "panel.txt", "--workers", "1"],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not noted(out) and child.poll() is None and time.monotonic() < until: time.sleep(.01)
    child.send_signal(signal.SIGINT)
    said, line = child.communicate(timeout=60)
    n = noted(out)
    assert 1 <= n < SHARDS and not out.exists()
    assert (child.returncode, said, line) == (130, "", f"perturbnb: stopped after {n} of 9 shards; the same command goes on where it stopped\n")
    facts = bulk(release, out, panel)
    assert 0 < facts.counted < facts.cells and file_hash(out) == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("place", ["counting", "writing", "panel"])
def test_ctrl_c_is_not_lost_in_a_callback(release, panel, expected, tmp_path, monkeypatch, place):
    class Callback:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)
            time.sleep(.001)
    def stop(real):
        def inner(*a):
            Callback()  # what it raises is printed and forgotten
            return real(*a)
        return inner
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    if place == "writing": monkeypatch.setattr(tb, "_dataset", stop(tb._dataset))
    else: monkeypatch.setattr(tb._Progress, "show", stop(tb._Progress.show))
    try:
        with pytest.raises(KeyboardInterrupt, match=r"stopped after \d of 9 shards; the same command without --no-resume \(resume=False\) goes on"):
            bulk(release, tmp_path / "b.h5ad", "hvg" if place == "panel" else panel, workers=1, n_genes=20, resume=False)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally: signal.signal(signal.SIGINT, usual)
    assert not (tmp_path / "b.h5ad").exists() and (tmp_path / "b.h5ad.work").exists() == (place != "panel")
    monkeypatch.undo()
    assert file_hash(bulk(release, tmp_path / "b.h5ad", panel).path) == expected


def test_too_large_a_panel_leaves_nothing_behind(release, tmp_path, monkeypatch):
    monkeypatch.setattr(tb, "dispersion_scores", lambda *a: np.r_[np.ones(100), np.full(100, np.nan)])
    for n, said in ((2000, "a panel of 2,000 genes from a vocabulary of 200"), (150, "a panel of 150 genes from 100 that vary in control cells")):
        one_line(InputError, release, tmp_path / "b.h5ad", "hvg", said, n_genes=n)
        assert not [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("i", range(4))
def test_killed_at_any_moment_and_resumed(release, panel, expected, tmp_path, i):
    draw, out, kept = rng(i, "tests.bulk"), tmp_path / "b.h5ad", 0
    for shards in (0, 1, 4):
        if killed_after(release, out, panel, shards, draw.uniform(0, 0.1)): kept = max(kept, noted(out))
    if not out.exists() or Path(f"{out}.work").exists():
        facts = bulk(release, out, panel, workers=1 + i)
        assert facts.counted < facts.cells and facts.shards == SHARDS
        assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["b.h5ad", "b.h5ad.manifest.json"]
    assert file_hash(out) == expected and kept > 0


@pytest.mark.parametrize("place", ["_write_table", "_facts"])
def test_dies_while_writing_or_just_after(release, panel, expected, tmp_path, monkeypatch, place):
    class Died(BaseException): pass
    real = getattr(tb, place)
    def die(*a):
        if place == "_write_table": real(*a)
        raise Died
    monkeypatch.setattr(tb, place, die)
    with pytest.raises(Died): bulk(release, tmp_path / "b.h5ad", panel)
    assert (tmp_path / "b.h5ad").exists() == (place == "_facts")
    monkeypatch.undo()
    facts = bulk(release, tmp_path / "b.h5ad", panel)
    assert facts.counted == 0 and file_hash(facts.path) == expected and facts.shards == SHARDS
    assert not (tmp_path / "b.h5ad.work").exists()


def test_other_input_is_refused_and_can_start_anew(copy, panel, expected, tmp_path):
    out = tmp_path / "b.h5ad"
    sound = tahoe.shards(copy)[8].read_bytes()
    edit(copy, 8, lambda rows: rows[0]["genes"].__setitem__(0, 2))
    one_line(InputError, copy, out, panel, "train-00008-of-00009.parquet, row 1: a shard without its marker: genes begin with 2", workers=1)
    one_line(InputError, copy, out, panel, "begun with other hours", time_h=6)
    one_line(InputError, copy, out, panel[:-1], "begun with other gene panel")
    edit(copy, 2, lambda rows: rows[:-1])
    one_line(ChangedFile, copy, out, panel, "train-00002-of-00009.parquet is no longer what was counted", "--no-resume")
    tahoe.shards(copy)[8].write_bytes(sound)
    fewer = bulk(copy, out, panel, resume=False)
    assert fewer.counted == fewer.cells and file_hash(out) != expected


def test_a_damaged_partial_file_is_noticed(copy, panel, tmp_path):
    out = tmp_path / "b.h5ad"
    edit(copy, 8, lambda rows: rows[0]["genes"].__setitem__(0, 2))
    one_line(InputError, copy, out, panel, "row 1", workers=1)
    edit(copy, 8, lambda rows: rows[0]["genes"].__setitem__(0, 1))
    part = next((tmp_path / "b.h5ad.work").glob("*.sums"))
    data = bytearray(part.read_bytes()); data[-9] ^= 4; part.write_bytes(data)
    one_line(ChangedFile, copy, out, panel, part.name, "--no-resume")


# ------------------------------------------------------------------ damage

def cell(i, **new):
    def change(rows): rows[i].update(new)
    return change

DAMAGE = {
    "row 4: a shard without its marker: genes begin with 1, expressions with 1": cell(3, genes=[1, 5], expressions=[1.0, 2.0]),
    "row 46: count -2 of token 5; expected whole counts": cell(45, genes=[1, 5], expressions=[-2.0, -2.0]),
    "count 1.5 of token 5": cell(0, genes=[1, 5], expressions=[-2.0, 1.5]),
    "count nan of token 7": cell(0, genes=[1, 5, 7], expressions=[-2.0, 1.0, float("nan")]),
    "count inf of token 5": cell(0, genes=[1, 5], expressions=[-2.0, float("inf")]),
    "count 0 of token 5": cell(0, genes=[1, 5], expressions=[-2.0, 0.0]),
    "token id 2;": cell(0, genes=[1, 2, 5], expressions=[-2.0, 1.0, 1.0]),
    "token id 203; expected token ids of the gene table": cell(0, genes=[1, 5, 203], expressions=[-2.0, 1.0, 1.0]),
    "token id 999999;": cell(0, genes=[1, 999999, 5], expressions=[-2.0, 1.0, 1.0]),
    "token id -7;": cell(0, genes=[1, -7, 5], expressions=[-2.0, 1.0, 1.0]),
    "2 genes but 3 expressions": cell(0, genes=[1, 5], expressions=[-2.0, 1.0, 1.0]),
    "a gene listed twice": cell(0, genes=[1, 9, 5, 9], expressions=[-2.0, 1.0, 1.0, 1.0]),
    "row 1: an empty list": cell(0, genes=[], expressions=[]),
    "row 90: a cell without a count": cell(89, genes=[1], expressions=[-2.0]),
    "genes is missing": cell(0, genes=None),
    "expressions holds a missing value": cell(0, genes=[1, 5], expressions=[-2.0, None]),
    "sample 'smp_0' is not in the sample table": cell(5, sample="smp_0"),
    "in the shard and 'plate": cell(2, plate="plate9"),
    "has drug 'Aspirin' in the shard": cell(2, drug="Aspirin"),
    "cell_line_id is missing": cell(0, cell_line_id=" "),
    "BARCODE_SUB_LIB_ID is missing": cell(0, BARCODE_SUB_LIB_ID=""),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_cell_is_named(copy, panel, tmp_path, words):
    edit(copy, 5, DAMAGE[words])
    line = one_line(InputError, copy, tmp_path / "b.h5ad", panel, "train-00005-of-00009.parquet, row ", words, workers=2)
    assert line.count("expected") == 1


def test_unsorted_genes_are_sound(copy, panel, expected, tmp_path):
    def turn(rows):
        for r in rows:
            for c in ("genes", "expressions"): r[c] = r[c][:1] + r[c][:0:-1]
    a = schema.read(bulk(copy, tmp_path / "a.h5ad", panel).path)
    edit(copy, 5, turn)
    b = schema.read(bulk(copy, tmp_path / "b.h5ad", panel).path)
    np.testing.assert_array_equal(a.X, b.X)


def test_a_flipped_byte_is_named_before_anything_is_counted(copy, panel, expected, tmp_path):
    hashes = {p.name: file_hash(p) for p in tahoe.shards(copy)}
    (tmp_path / "hashes.csv").write_text("name,sha256\n" + "".join(f"{n},{h}\n" for n, h in hashes.items()))
    path = tahoe.shards(copy)[6]
    data = bytearray(path.read_bytes()); data[int(rng(0, "tests.flip").integers(len(data)))] ^= 1; path.write_bytes(data)
    for given in (hashes, tmp_path / "hashes.csv"):
        one_line(ChangedFile, copy, tmp_path / "b.h5ad", panel, path.name, "as published", hashes=given, workers=1, resume=False)
    done = json.loads((tmp_path / "b.h5ad.work/manifest.json").read_text())["shards"]
    assert sorted(done) == [p.name for p in tahoe.shards(copy)[:6]]
    assert bulk(copy, tmp_path / "c.h5ad", panel, hashes=hashes, skip_damaged=True).skipped[0].startswith(path.name)
    one_line(ChangedFile, copy, tmp_path / "b.h5ad", panel, path.name, hashes=hashes)


def test_hashes_given_later_are_compared_with_what_was_counted(copy, panel, expected, tmp_path):
    out, paths = tmp_path / "b.h5ad", tahoe.shards(copy)
    hashes = {p.name: file_hash(p) for p in paths}
    short, last = paths[2].read_bytes(), paths[8].read_bytes()
    edit(copy, 2, lambda rows: rows[:-1])  # a fetch that lost a row
    paths[8].write_bytes(b"")
    one_line(InputError, copy, out, panel, "is empty", workers=1)
    for again in ({"hashes": hashes}, {"hashes": hashes, "skip_damaged": True}):
        one_line(ChangedFile, copy, out, panel, "train-00002-of-00009.parquet was counted with SHA-256", "as published", "--no-resume", **again)
    paths[2].write_bytes(short)  # right on the disk now, but the partial sums hold the other one
    one_line(ChangedFile, copy, out, panel, "train-00002-of-00009.parquet is no longer what was counted", hashes=hashes)
    paths[8].write_bytes(last)
    assert file_hash(bulk(copy, out, panel, hashes=hashes, resume=False).path) == expected


@pytest.mark.parametrize("first, again", [(0, 1), (3, 95), (41, 42)])
def test_a_cell_twice_in_a_shard_is_named_and_can_be_skipped(copy, panel, tmp_path, first, again):
    name = "BARCODE_SUB_LIB_ID"
    edit(copy, 5, lambda rows: rows[again].__setitem__(name, rows[first][name]))
    line = one_line(InputError, copy, tmp_path / "b.h5ad", panel, f"train-00005-of-00009.parquet, row {again + 1}: the barcode of row {first + 1} again", "each cell once", workers=1)
    some = bulk(copy, tmp_path / "a.h5ad", panel, skip_damaged=True, workers=2)
    without = schema.read(bulk(copy, tmp_path / "c.h5ad", panel, only=[i for i in range(SHARDS) if i != 5]).path)
    np.testing.assert_array_equal(schema.read(some.path).X, without.X)
    assert len(some.skipped) == 1 and line.endswith(some.skipped[0].partition(": ")[2])


@pytest.mark.parametrize("row", [0, 45, 90])
def test_skipped_on_request_leaves_no_trace_of_the_shard(copy, panel, tmp_path, row):
    edit(copy, 5, cell(row, sample="smp_0"))
    some = bulk(copy, tmp_path / "a.h5ad", panel, skip_damaged=True, workers=2)
    without = bulk(copy, tmp_path / "b.h5ad", panel, only=[i for i in range(SHARDS) if i != 5])
    a, b = schema.read(some.path), schema.read(without.path)
    np.testing.assert_array_equal(a.layers["half_a"], b.layers["half_a"])
    pd.testing.assert_frame_equal(a.obs, b.obs)
    assert f"train-00005-of-00009.parquet, row {row + 1}" in a.uns["perturbnb"]["skipped_shards"][0] and "skipped_shards" not in b.uns["perturbnb"]
    assert "train-00005-of-00009.parquet" in json.loads((tmp_path / "a.h5ad.manifest.json").read_text())["damaged"]


def test_a_shard_twice_is_refused(copy, panel, tmp_path):
    paths = tahoe.shards(copy)
    shutil.copy(paths[1], paths[7])
    one_line(InputError, copy, tmp_path / "b.h5ad", panel, "holds the same bytes as", skip_damaged=True, workers=1)
    pq.write_table(pq.read_table(paths[1]), paths[7], compression="zstd")
    one_line(InputError, copy, tmp_path / "b.h5ad", panel, "train-00007-of-00009.parquet holds the same cells as train-00001", resume=False, workers=1)


def test_shards_and_tables_that_are_missing_empty_or_cut(copy, panel, tmp_path):
    out, paths = tmp_path / "b.h5ad", tahoe.shards(copy)
    whole = paths[3].read_bytes()
    for data, words in ((b"", "is empty (0 bytes)"), (whole[:-20], "cannot be read as Parquet"), (b"PAR1" * 30, "cannot be read as Parquet")):
        paths[3].write_bytes(data)
        one_line(InputError, copy, out, panel, paths[3].name, words, resume=False)
    pq.write_table(pq.read_table(paths[4]).drop_columns(["plate"]), paths[3])
    one_line(InputError, copy, out, panel, paths[3].name, "no column 'plate'", resume=False)
    paths[3].unlink()
    one_line(InputError, copy, out, panel, "lacks 1 of 9 shards: train-00003", "partial=True (--partial)", resume=False)
    assert bulk(copy, tmp_path / "partial.h5ad", panel, partial=True).shards == SHARDS - 1
    one_line(MissingFile, copy, out, panel, "no shard number 3", only=[2, 3])
    pq.write_table(pq.read_schema(paths[4]).empty_table(), paths[3])  # a shard without a cell counts as one
    assert bulk(copy, tmp_path / "none.h5ad", panel).shards == SHARDS
    (copy / "metadata/drug_metadata.parquet").unlink()
    one_line(MissingFile, copy, out, panel, "drug_metadata.parquet")
    assert one_line(MissingFile, tmp_path / "nosuch", out, panel).startswith(f"no folder {tmp_path / 'nosuch'};")


def test_no_cell_at_all(copy, panel, tmp_path):
    for i in range(SHARDS): edit(copy, i, lambda rows: [{**r, "sample": "smp_0"} for r in rows])
    one_line(InputError, copy, tmp_path / "b.h5ad", panel, "no cells in 0 shards (9 damaged)", skip_damaged=True)


def test_names_are_checked_before_the_first_shard(copy, panel, tmp_path):
    path = copy / "metadata/drug_metadata.parquet"
    drugs = pq.read_table(path).to_pandas()
    drugs.loc[0, "canonical_smiles"] = "CC O"
    drugs.to_parquet(path)
    one_line(InputError, copy, tmp_path / "b.h5ad", panel, "the metadata tables", "is not a SMILES")
    assert not (tmp_path / "b.h5ad.work").exists()


# ------------------------------------------------------------------ places

def test_places_that_cannot_be_written(release, panel, expected, tmp_path, monkeypatch):
    assert file_hash(bulk(release, tmp_path / "new/folder/b.h5ad", panel).path) == expected  # a missing folder is made
    (tmp_path / "file").write_text("x")
    one_line(OutputError, release, tmp_path / "file/b.h5ad", panel, "a part of the path is a file")
    one_line(InputError, release, tmp_path / "b.csv", panel, "ends in .h5ad")
    out = tmp_path / "mine.h5ad"
    out.write_text("mine")
    with pytest.raises(OutputError, match="is there already.*--overwrite"): bulk(release, out, panel)
    assert out.read_text() == "mine"
    assert file_hash(bulk(release, out, panel, overwrite=True).path) == expected


@pytest.mark.parametrize("place", ["_write_sums", "_write_table", "_save"])
def test_full_disk(release, panel, expected, tmp_path, monkeypatch, place):
    real, calls = getattr(tb, place), []
    def full(*a):
        calls.append(1)
        if len(calls) > 2 or place != "_save": raise OSError(errno.ENOSPC, "No space left on device")
        return real(*a)
    monkeypatch.setattr(tb, place, full)
    one_line(OutputError, release, tmp_path / "b.h5ad", panel, "the disk is full", "free some space", workers=1)
    monkeypatch.undo()
    assert file_hash(bulk(release, tmp_path / "b.h5ad", panel).path) == expected


def test_a_file_may_not_grow(release, tmp_path, fails):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    fails("prepare", "tahoe", release, tmp_path / "b.h5ad", "--panel", "all", words=["cannot write"], preexec_fn=limit)
    assert not (tmp_path / "b.h5ad").exists()


def test_two_runs_at_once(release, panel, tmp_path):
    from perturbnb.core import _locked
    with _locked((tmp_path / "b.h5ad").absolute()):
        one_line(OutputError, release, tmp_path / "b.h5ad", panel, "is being written by another run")


# ------------------------------------------------------------------ what comes out

def test_hvg_panel_is_of_controls_and_the_same_for_any_number_of_workers(copy, tmp_path):
    a = tb.tahoe_bulk(copy, tmp_path / "a.h5ad", n_genes=40, panel_shards=5, workers=1, progress=False)
    b = tb.tahoe_bulk(copy, tmp_path / "b.h5ad", n_genes=40, panel_shards=5, workers=3, progress=False)
    assert file_hash(a.path) == file_hash(b.path) and a.genes == 40
    first = schema.read(a.path)
    assert "40 highly variable genes (cell_ranger) of " in first.uns["perturbnb"]["panel"]
    def treated(rows):
        for r in rows:
            if r["drug"] != "DMSO_TF": r["expressions"] = r["expressions"][:1] + [50.0] * (len(r["expressions"]) - 1)
    for i in range(SHARDS): edit(copy, i, treated)
    second = schema.read(tb.tahoe_bulk(copy, tmp_path / "c.h5ad", n_genes=40, panel_shards=5, progress=False).path)
    assert second.var_names.tolist() == first.var_names.tolist() and not np.array_equal(first.X, second.X)
    with pytest.raises(InputError, match="a panel of 5,000 genes from"): tb.tahoe_bulk(copy, tmp_path / "d.h5ad", n_genes=5000, progress=False)


def test_scores_are_those_of_scanpy():
    sc = pytest.importorskip("scanpy")
    from anndata import AnnData
    x = np.log1p(rng(0, "tests.hvg").poisson(rng(1, "tests.hvg").lognormal(0, 1, 400), (300, 400)) * 1.0)
    theirs = sc.pp.highly_variable_genes(AnnData(x), flavor="cell_ranger", n_top_genes=50, inplace=False)
    ours = tb.dispersion_scores(x.mean(0), (x**2).mean(0), len(x))
    assert set(np.argsort(-ours)[:50]) == set(np.flatnonzero(theirs.highly_variable))


def test_a_line_without_control_on_a_plate(copy, panel, tmp_path):
    line = pq.read_table(tahoe.shards(copy)[0]).to_pylist()[0]["cell_line_id"]
    for i in range(SHARDS): edit(copy, i, lambda rows: [r for r in rows if not (r["drug"] == "DMSO_TF" and r["cell_line_id"] == line and r["plate"] == "plate1")])
    path = bulk(copy, tmp_path / "b.h5ad", panel).path
    assert "a bulk table of 23 groups" in check_path(path) and "1 of its (line, batch) have no control" in check_path(path)
    table = tb.effects(schema.read(path), min_control_cells=5)
    moved = (table.obs.cell_line == line) & (table.obs.batch == "plate1")
    assert set(table.obs.control[moved]) == {"same_line"} and set(table.obs.control[~moved]) == {"same_line_same_plate"} and moved.any()
    for i in range(SHARDS): edit(copy, i, lambda rows: [r for r in rows if not (r["drug"] == "DMSO_TF" and r["cell_line_id"] == line)])
    table = tb.effects(schema.read(bulk(copy, tmp_path / "c.h5ad", panel).path), min_control_cells=5)
    assert line not in set(table.obs.cell_line) and all(line in x for x in table.uns["perturbnb"]["no_control"])


def test_halves_of_effects_share_no_cell(release, panel, tmp_path):
    a = schema.read(bulk(release, tmp_path / "b.h5ad", panel).path)
    table = tb.effects(a, min_control_cells=5)
    row = table.obs.index[0]
    same = (a.obs.pert_type == "control") & (a.obs.cell_line == table.obs.cell_line.iloc[0]) & (a.obs.batch == table.obs.batch.iloc[0])
    np.testing.assert_allclose(table.layers["half_b"][0], a[row].layers["half_b"][0] - a[same].layers["half_b"][0], atol=1e-12)
    whole = sum(a[same].layers[f"half_{h}"][0] * a.obs[f"n_{h}"][same].iloc[0] for h in "ab") / a.obs.n_cells[same].iloc[0]
    np.testing.assert_allclose(table.X[0], a[row].X[0] - whole, atol=1e-12)


def test_effects_of_effects_are_refused(release, panel, tmp_path, fails, cli):
    from perturbnb.data import effects
    table = schema.read(bulk(release, tmp_path / "b.h5ad", panel).path)
    for make in (tb.effects, effects.effects):
        with pytest.raises(InputError, match=r"the table is a table of effects \(against dmso_tf_same_line.*prepare tahoe") as e: make(make(table, min_control_cells=1))
        assert "\n" not in str(e.value)
    effects.refuse_effects(table)  # levels pass
    assert cli("prepare", "effects", tmp_path / "b.h5ad", tmp_path / "e.h5ad", "--min-control-cells", "1").returncode == 0
    fails("prepare", "effects", tmp_path / "e.h5ad", tmp_path / "f.h5ad", words=["is a table of effects", "expected a bulk table"])


def test_drugs_are_joined_by_name(copy, panel, tmp_path):
    path = copy / "metadata/drug_metadata.parquet"
    before = schema.read(bulk(copy, tmp_path / "a.h5ad", panel).path).obs
    drugs = pq.read_table(path).to_pandas()
    drugs.iloc[::-1].to_parquet(path)
    after = schema.read(bulk(copy, tmp_path / "b.h5ad", panel).path).obs
    pd.testing.assert_frame_equal(before, after)
    truth = drugs.assign(smiles=drugs.canonical_smiles.str.strip()).set_index("drug").smiles
    for r in after[after.pert_type == "compound"].itertuples(): assert r.smiles == truth[r.pert] or (r.smiles != r.smiles and truth[r.pert] is None)
    drugs.iloc[1:].to_parquet(path)
    assert bulk(copy, tmp_path / "c.h5ad", panel).no_metadata == [drugs.drug[0]]


def test_command(release, tmp_path, cli, fails):
    (tmp_path / "genes.txt").write_text("ALK\nBRAF\nEGFR\n")
    done = cli("prepare", "tahoe", release, tmp_path / "b.h5ad", "--panel", tmp_path / "genes.txt", "--workers", "2", "--shards", "0:8")
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "b.h5ad") and "of 8 shards in 22 groups x 3 genes" in done.stderr, done.stderr
    fails("prepare", "tahoe", release, tmp_path / "c.h5ad", "--panel", tmp_path / "none.txt", words=["no file", "hvg, all, or a file"])
