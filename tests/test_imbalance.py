"The first analysis from the command line: real numbers, equal bytes, and each kind of bad input on one line."
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CLI, ROOT, tree

REAL = Path(os.environ.get("PERTURBNB_REAL_DATA") or ROOT.parent / "shared" / "data") / "tahoe"
real = pytest.mark.skipif(not REAL.is_dir(), reason="skipped: the real Tahoe tables are not on this machine")
FAST = ["-p", "n_bootstrap=50"]
HEAD = "drug,cell_line_id,n_cells\n"


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    "A simulated release."
    out = tmp_path_factory.mktemp("tahoe") / "release"
    subprocess.run([*CLI, "simulate", "tahoe", str(out), "--size", "tiny"], check=True, capture_output=True)
    return out


@pytest.fixture
def release(demo, tmp_path):
    "A copy of it without recorded hashes, to be damaged."
    shutil.copytree(demo, tmp_path / "release")
    (tmp_path / "release/SHA256SUMS").unlink()
    return tmp_path / "release"


def result_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@real
def test_real_table(cli, tmp_path):
    done = cli("run", "imbalance", "-p", f"pair_counts={REAL / 'tahoe_counts_per_drug_cell_line.csv'}",
               "-p", f"drug_metadata={REAL / 'drug_metadata.parquet'}", *FAST, "--out", tmp_path / "real")
    assert done.returncode == 0, done.stderr
    facts = result_of(tmp_path / "real")["facts"]
    assert (facts["n_drugs"], facts["n_cell_lines"], facts["n_pairs"], facts["n_cells"]) == (380, 50, 19_000, 95_624_334)
    assert (facts["n_pairs_ge_1000"], facts["n_pairs_ge_1000_treated"], facts["least_cells"], facts["most_cells"]) == (16_846, 16_798, 10, 139_224)
    assert facts["thinnest_line"] == "CVCL_1571"
    page = (tmp_path / "real/report.html").read_text()
    for text in ("95,624,334", "16,798", "16,846", "139,224", "CVCL_1571"): assert text in page, text
    kept = pq.read_table(tmp_path / "real/tables/kept_pairs.parquet").to_pandas()
    assert {"drug", "cell_line_id", "n_cells", "weight"} <= set(kept) and not (kept["drug"] == "DMSO_TF").any()
    assert str(REAL) not in page and str(tmp_path) not in page


def test_table_and_shards_agree_and_bytes_repeat(cli, demo, tmp_path):
    pairs = demo / "tahoe_counts_per_drug_cell_line.csv"
    runs = {"table": ["-p", f"pair_counts={pairs}"], "again": ["-p", f"pair_counts={pairs}"], "shards": ["-p", f"shards={demo}"], "both": ["-p", f"shards={demo}", "-p", f"pair_counts={pairs}"]}
    for name, given in runs.items():
        done = cli("run", "imbalance", *given, *FAST, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "table/results.json").read_bytes() == (tmp_path / "again/results.json").read_bytes()
    facts = {name: result_of(tmp_path / name)["facts"] for name in runs}
    for name in ("shards", "both"): assert {k: facts[name][k] for k in facts["table"] if k in facts[name]} == {k: v for k, v in facts["table"].items() if k in facts[name]}
    read = lambda name: pq.read_table(tmp_path / name / "tables/kept_pairs.parquet").to_pandas()
    assert read("table").equals(read("shards"))


def test_foreign_markup_is_text(cli, tmp_path):
    names = ["DMSO_TF", "<script>alert(1)</script>", "a|b *c* `d` [e](javascript:f) $g$", "<img src=x onerror=alert(2)>"]
    rows = [f'"{d}",CVCL_{line},{100 * (i + 1) + 7 * line}' for i, d in enumerate(names) for line in range(1, 4)]
    (tmp_path / "odd.csv").write_text(HEAD + "\n".join(rows) + "\n")
    done = cli("run", "imbalance", "-p", f"pair_counts={tmp_path / 'odd.csv'}", *FAST, "--out", tmp_path / "odd")
    assert done.returncode == 0, done.stderr
    from bs4 import BeautifulSoup
    soup = BeautifulSoup((tmp_path / "odd/report.html").read_text(), "html.parser")
    assert not soup.find_all(["script", "link", "iframe", "object"]) and not [t for t in soup.find_all(True) if any(a.startswith("on") for a in t.attrs)]
    assert all(t["src"].startswith("data:") for t in soup.find_all(src=True))
    assert not [t for t in soup.find_all(href=True) if "javascript" in t["href"]]
    assert names[1] in soup.get_text()


@pytest.mark.parametrize("text, words", [
    ("drug,cell_line_id,cells\na,L1,5\n", ["no column 'n_cells'"]),
    (HEAD + "DMSO_TF,L1,9\na,L1,-5\n", ["row 2", "-5"]),
    (HEAD + "DMSO_TF,L1,9\na,L1,2.5\n", ["row 2", "2.5"]),
    (HEAD + "DMSO_TF,L1,9\na,L1,NaN\n", ["row 2", "n_cells"]),
    (HEAD + "DMSO_TF,L1,9\na,L1,5\na,L1,6\n", ["row 3", "once"]),
    ("", ["empty"]),
    (HEAD, ["no rows"]),
    (HEAD + "DMSO_TF,L1,9\na,L1,5\na,L2,6\n", ["L2", "DMSO_TF"]),
], ids=["no n_cells", "negative", "fractional", "NaN", "duplicate", "empty", "header only", "line without control"])
def test_bad_table(fails, tmp_path, text, words):
    (tmp_path / "bad.csv").write_text(text)
    fails("run", "imbalance", "-p", f"pair_counts={tmp_path / 'bad.csv'}", *FAST, "--out", tmp_path / "out", words=words)
    assert not (tmp_path / "out").exists()


def test_missing_file(fails, tmp_path):
    fails("run", "imbalance", "-p", "pair_counts=nowhere.csv", "--out", tmp_path / "out", words=["no file or folder 'nowhere.csv'"])


def rewrite(shard: Path, change) -> None:
    "Write a shard again after `change(lists of genes, lists of expressions)`."
    table = pq.read_table(shard)
    genes, values = table["genes"].to_pylist(), table["expressions"].to_pylist()
    change(genes, values)
    for name, new in (("genes", genes), ("expressions", values)):
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(new, table.schema.field(name).type))
    pq.write_table(table, shard, write_page_checksum=True)


def unequal(genes, values): values[2] = values[2][:-1]
def unknown(genes, values): genes[2][-1] = 99_999
def unmarked(genes, values): genes[2], values[2] = genes[2][1:], values[2][1:]


@pytest.mark.parametrize("change, words", [(unequal, ["row 3", "equal length"]), (unknown, ["row 3", "token id 99999"]), (unmarked, ["row 3", "marker"])])
@pytest.mark.parametrize("command", ["run", "check"])
def test_bad_shard(fails, release, tmp_path, change, words, command):
    shard = sorted((release / "data").glob("*.parquet"))[0]
    rewrite(shard, change)
    args = ["run", "imbalance", "-p", f"shards={release}", *FAST, "--out", tmp_path / "out"] if command == "run" else ["check", release]
    fails(*args, words=[shard.name, *words])
    assert not (tmp_path / "out").exists()


def test_truncated_shard(fails, release, tmp_path):
    shard = sorted((release / "data").glob("*.parquet"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    fails("run", "imbalance", "-p", f"shards={release}", *FAST, "--out", tmp_path / "out", words=[shard.name])
    fails("check", release, words=[shard.name])


def test_changed_shard_is_named(fails, demo, tmp_path):
    shutil.copytree(demo, tmp_path / "release")
    shard = sorted((tmp_path / "release/data").glob("*.parquet"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    fails("run", "imbalance", "-p", f"shards={tmp_path / 'release'}", *FAST, "--out", tmp_path / "out", words=[shard.name, "SHA-256"])


def test_table_and_shards_that_disagree(fails, release, tmp_path):
    pairs = release / "tahoe_counts_per_drug_cell_line.csv"
    rows = pairs.read_text().splitlines()
    drug_line, n = rows[1].rsplit(",", 1)
    pairs.write_text("\n".join([rows[0], f"{drug_line},{int(n) + 1}", *rows[2:]]) + "\n")
    fails("run", "imbalance", "-p", f"shards={release}", "-p", f"pair_counts={pairs}", *FAST, "--out", tmp_path / "out")


def test_simulation_repeats_and_is_whole(cli, fails, demo, tmp_path):
    assert cli("simulate", "tahoe", tmp_path / "again", "--size", "tiny").returncode == 0
    assert tree(tmp_path / "again") == tree(demo)
    assert cli("simulate", "tahoe", tmp_path / "other", "--size", "tiny", "--seed", "1").returncode == 0
    assert (tmp_path / "other/SHA256SUMS").read_bytes() != (demo / "SHA256SUMS").read_bytes()
    fails("simulate", "tahoo", tmp_path / "x", words=["did you mean 'tahoe'?"])
    fails("simulate", "tahoe", tmp_path / "x", "--size", "huge", words=["huge"])
    (tmp_path / "mine").mkdir(); (tmp_path / "mine/thesis.tex").write_text("…")
    fails("simulate", "tahoe", tmp_path / "mine", "--size", "tiny")
    assert tree(tmp_path / "mine") == {"thesis.tex": "…".encode()}


def test_readme_shows_every_analysis(cli):
    listed = re.findall(r"^(\w+): ", cli("list").stdout, re.M)
    assert listed and all(f"`{name}`" in (ROOT / "README.md").read_text() for name in listed)
