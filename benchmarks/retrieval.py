"""How fast is one pass of every retrieval metric, against the bare matrix product and partial sort of NumPy?

    python benchmarks/retrieval.py            print the rounds for one and two threads
    python benchmarks/retrieval.py --write    and write benchmarks/retrieval.md

20,000 queries, 400 candidates, 2,000 genes, single precision. Both sides run in the same process, in turn, three rounds. The memory is the peak of a child process that holds the
profiles and runs the pass alone.
"""
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

N_QUERIES, N_CANDIDATES, N_GENES, TOP, N_PLATES, ROUNDS = 20_000, 400, 2_000, 10, 60, 3
HERE = Path(__file__).resolve()


def data():
    "Profiles of 50 classes (8 candidates each), and plates."
    import numpy as np
    from perturbnb.core import rng
    draw = rng(0, "benchmark.retrieval")
    centres = draw.standard_normal((50, N_GENES), dtype=np.float32)
    q_class, c_class = draw.integers(0, 50, N_QUERIES), np.arange(N_CANDIDATES) % 50
    queries, candidates = (draw.standard_normal((len(c), N_GENES), dtype=np.float32) for c in (q_class, c_class))
    for x, which in ((queries, q_class), (candidates, c_class)):
        for i in range(0, len(x), 500): x[i:i + 500] += centres[which[i:i + 500]] / 6  # in pieces, so that the peak of the memory is that of the pass
    return queries, candidates, (q_class, c_class), (draw.integers(0, N_PLATES, N_QUERIES), draw.integers(0, N_PLATES, N_CANDIDATES))


def bare(queries, candidates):
    "The matrix product, the ten best of each row, and their order."
    import numpy as np
    scores = queries @ candidates.T
    top = np.argpartition(scores, N_CANDIDATES - TOP, axis=1)[:, -TOP:]
    return np.take_along_axis(top, np.argsort(-np.take_along_axis(scores, top, 1), axis=1), 1)


def timed(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def speed() -> list:
    "Seconds of each round: of each pass, and of the bare product and sort run just before it."
    from perturbnb.metrics.retrieve import retrieve
    queries, candidates, classes, plates = data()
    passes = {"cosine": {}, "cosine, same plate left out": dict(apart=plates), "pearson": dict(similarity="pearson"), "neg_l2": dict(similarity="neg_l2")}
    retrieve(queries[:600], candidates, (classes[0][:600], classes[1])), bare(queries[:600], candidates)  # imports and threads are warm
    return [{name: (timed(lambda: bare(queries, candidates)), timed(lambda: retrieve(queries, candidates, classes, **how))) for name, how in passes.items()} for _ in range(ROUNDS)]


def memory() -> dict:
    "Peak memory in MB with the profiles alone and after the pass, and the number of metrics."
    import resource
    from perturbnb.metrics.retrieve import retrieve
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 1024)
    queries, candidates, classes, plates = data()
    before = peak()
    found = retrieve(queries, candidates, classes, apart=plates)
    return {"before": before, "peak": peak(), "n_metrics": found.values.shape[1], "profiles": (queries.nbytes + candidates.nbytes) / 2 ** 20}


def child(what: str, threads: int):
    "The result of speed() or memory() in a process of its own with that many threads."
    env = {**os.environ, **{f"{x}_NUM_THREADS": str(threads) for x in ("OMP", "OPENBLAS", "MKL")}, "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return json.loads(subprocess.run([sys.executable, str(HERE), "--child", what], env=env, check=True, capture_output=True, text=True).stdout)


def page(rounds: dict, used: dict) -> str:
    import numpy as np
    ratio = lambda rs, name: np.median([took / base for base, took in (r[name] for r in rs)])
    rows = [f"| {t} | {name} | " + " | ".join("{:.2f} / {:.2f}".format(*r[name][::-1]) for r in rs) + f" | {ratio(rs, name):.2f} |" for t, rs in rounds.items() for name in rs[0]]
    worst = {t: max(ratio(rs, name) for name in rs[0]) for t, rs in rounds.items()}
    return f"""# Speed and memory of the retrieval pass

Made by `benchmarks/retrieval.py --write`, not edited by hand. NumPy {np.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores ({platform.machine()}).
{N_QUERIES:,} queries, {N_CANDIDATES} candidates, {N_GENES:,} genes, single precision, relevance as class numbers (8 right candidates for each query).

Each line is one call of `retrieve` with all {used["n_metrics"]} retrieval metrics, their values at chance, and the counts, for every query. *Bare* is `queries @ candidates.T`, `argpartition` for the {TOP} best and their sort,
run just before it in the same process. Each cell is seconds of the pass / seconds of *bare*; the ratio is the median over the {ROUNDS} rounds.

| threads | similarity | {" | ".join(f"round {i + 1}" for i in range(ROUNDS))} | ratio |
|---|---|{"---|" * ROUNDS}---|
{chr(10).join(rows)}

The aim is a ratio of at most 2 (half the speed of *bare*); the largest here is {" and ".join(f"{x:.2f} with {t} thread{'s' if t > 1 else ''}" for t, x in worst.items())}. The matrix product gains from a second thread and sorting does not, so the ratio
grows with the threads. These numbers differ between machines and from run to run, since nothing else on the machine was stopped; `python benchmarks/retrieval.py` prints those of yours.

Peak memory of a process that holds the profiles ({used["profiles"]:.0f} MB) and runs the pass with plates left out: {used["peak"]:.0f} MB, of which {used["before"]:.0f} MB were reached before it began. The aim is below 2,000 MB.
"""


if __name__ == "__main__":
    if "--child" in sys.argv: print(json.dumps({"speed": speed, "memory": memory}[sys.argv[-1]]()))
    else:
        text = page({t: child("speed", t) for t in (1, 2)}, child("memory", 1))
        print(text)
        if "--write" in sys.argv: HERE.with_suffix(".md").write_text(text, encoding="utf-8")
