"""The figures of docs/results: gathered into JSON, and from there into the tables of its README.

    python benchmarks/results.py conformance build/reports    # what `make test` left there -> conformance.json
    python benchmarks/results.py tables                       # the JSON files -> README.md
    python benchmarks/results.py tables --check               # exit 1 if README.md says anything else

``cpu.json`` and ``cpu-avx512.json`` are written by ``qcore bench cpu``, ``optimizers.json`` and
``optimizers-avx512.json`` by ``benchmarks/optimizers.py``, ``demo.json`` by
``make demo ARGS="--json docs/results/demo.json"``, ``transformers.json`` and ``transformers-avx512.json`` by
``benchmarks/transformers_models.py``, ``int4.json`` by ``benchmarks/int4_perplexity.py``, ``qlora.json`` by
``examples/qlora.py``, ``load-memory.json`` by ``benchmarks/load_memory.py``, ``quantize-memory.json`` by
``benchmarks/quantize_memory.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from qcore_conformance.model import Outcome
from qcore_conformance.report import read_json, verdict
from qcore_conformance.report.summary import counts, worst_ratios

RESULTS = Path(__file__).parents[1] / "docs" / "results"
README = RESULTS / "README.md"
RUNS = ("cpu_reference", "cpu", "cpu-avx2", "cpu-portable")


def gather(reports: Path) -> dict[str, Any]:
    """The sum of the conformance reports and of the kill matrix in a folder of reports."""
    runs = []
    for name in RUNS:
        report = read_json(reports / f"conformance-{name}" / "report.json")
        count = counts(report.results)
        worst = {entry.op: round(entry.ratio, 4) for entry in worst_ratios(report.results)}
        runs.append(
            {
                "run": name,
                "arch": report.backend["arch"],
                "verdict": verdict(report).word,
                "passed": count[Outcome.PASSED],
                "not_run": count[Outcome.NOT_RUN],
                "failed": sum(count.values()) - count[Outcome.PASSED] - count[Outcome.NOT_RUN],
                "seed": report.seed,
                "started": report.started,
                "spec_version": report.spec_version,
                "environment": report.environment,
                "worst_error_over_bound": worst,
            }
        )
    matrix = json.loads((reports / "mutants" / "mutants.json").read_text(encoding="utf-8"))
    alive = {row["mutant"] for row in matrix["rows"] if not row["case_id"]}
    mutants = {
        "mutants": len({row["mutant"] for row in matrix["rows"]}),
        "survived": len(alive),
        "right_backends": len({control["backend"] for control in matrix["controls"]}),
        "right_cases": sum(control["passed"] for control in matrix["controls"]),
        "false_alarms": sum(len(control["alarms"]) for control in matrix["controls"]),
    }
    return {"schema": 1, "kind": "conformance summary", "runs": runs, "mutants": mutants}


def conformance_table(tree: dict[str, Any]) -> str:
    lines = ["| run | path | verdict | passed | not run | worst error / bound |", "|---|---|---|---|---|---|"]
    for run in tree["runs"]:
        worst = max(run["worst_error_over_bound"].items(), key=lambda item: item[1], default=("", 0.0))
        cells = (f"`{run['run']}`", run["arch"], run["verdict"], run["passed"], run["not_run"], f"{worst[1]:.2f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    m = tree["mutants"]
    killed = f"{m['mutants'] - m['survived']} of {m['mutants']}"
    right = f"{m['right_cases']} cases on {m['right_backends']} right backends"
    lines += ["", f"Mutants: {killed} killed, {m['false_alarms']} false alarms in {right}."]
    return "\n".join(lines)


def cpu_tables(tree: dict[str, Any]) -> str:
    """Of `qcore bench cpu`: layers beside torch and bitsandbytes, products and the other ops beside the floor."""
    said = tree["machine"]
    disturbed = f"{said['others_cpu_share']:.0%} of the processor in the hands of other programs meanwhile"
    ended = "" if tree["complete"] else "; ended before its last workload"
    machine = f"{said['processor']}, {said['threads']} threads, {said['isa']}, {tree['started'][:10]}"
    lines = [f"{machine}, {disturbed}{ended}."]
    results = [row for row in tree["results"] if row["dtype"] in ("bf16", "int8") or row["m"] is None]
    counts = sorted({row["m"] for row in results if row["op"] == "linear4bit"})
    by_rows: dict[str, dict[tuple[str, str], dict[int, str]]] = {"layers": {}, "products": {}}
    for row in results:
        if row["m"] not in counts or row["op"] in ("host_cost", "alternate"):
            continue
        line = f"`{row['op']}` {row['variant']}", "x".join(map(str, row["shape"]))
        layer = row["op"].startswith("linear")
        over = "/".join(_times(row["ratios"], peer) for peer in ("torch bf16", "bitsandbytes"))
        cell = over if layer else f"{row['timings']['qcore']['median'] * 1e3:.2f} ms, {row['floor']['over']:.1f}"
        by_rows["layers" if layer else "products"].setdefault(line, {})[row["m"]] = cell
    heads = {
        "layers": "layers, speed over bfloat16 `nn.Linear` / over bitsandbytes",
        "products": "ops in bfloat16 or int8, time and times the floor",
    }
    for kind, table in by_rows.items():
        lines += ["", f"| {heads[kind]} | weight | {' | '.join(f'M={m}' for m in counts)} |"]
        lines.append("|---|---|" + "---|" * len(counts))
        for (op, shape), cells in table.items():
            lines.append(f"| {op} | {shape} | {' | '.join(cells.get(m, '') for m in counts)} |")
    lines += ["", "| op at 4096x4096 | dtype | ms | times the floor | over bitsandbytes |", "|---|---|---|---|---|"]
    for row in results:
        if row["m"] is None and row["shape"] == [4096, 4096]:
            figures = f"{row['timings']['qcore']['median'] * 1e3:.2f}", f"{row['floor']['over']:.1f}"
            peer = _times(row["ratios"], "bitsandbytes")
            lines.append(f"| `{row['op']}` {row['variant']} | {row['dtype']} | {' | '.join(figures)} | {peer} |")
    lines += ["", "| `Linear4bit` 64x64, one row, one thread | us | times `nn.Linear` | over bitsandbytes |"]
    lines.append("|---|---|---|---|")
    for row in results:
        if row["op"] == "host_cost":
            slower = f"{1 / row['ratios']['torch bf16']:.2f}"
            peer = _times(row["ratios"], "bitsandbytes")
            lines.append(f"| {row['variant']} | {row['timings']['qcore']['median'] * 1e6:.1f} | {slower} | {peer} |")
    return "\n".join(lines)


def demo_table(tree: dict[str, Any]) -> str:
    said, texts = tree["machine"], tree["texts"]
    share = said["others_cpu_share"]
    disturbed = "" if share is None else f", {share:.0%} of the processor in the hands of other programs meanwhile"
    machine = f"{said['processor']}, {said['threads']} threads, {said['isa']}, {tree['started'][:10]}{disturbed}"
    lines = [
        f"{machine}; perplexity on {tree['tokens']} tokens of each text in windows of {tree['window']}.",
        "",
        f"| weights | bytes | decode, tokens/s | {' | '.join(texts)} |",
        "|---|---|---|" + "---|" * len(texts),
    ]
    for row in tree["rows"]:
        values = " | ".join(f"{value:.2f}" for value in row["perplexities"])
        rate = f"{row['decode_tokens_per_s']:.1f}"
        lines.append(f"| {row['weights']} | {row['bytes'] / 1e6:.1f} MB | {rate} | {values} |")
    return "\n".join(lines)


def models_table(tree: dict[str, Any]) -> str:
    said = tree["machine"]
    kinds = {"prefill": "prefill, tokens/s", "decode": "decode, tokens/s"}
    if any("compiled_decode_tokens_per_second" in row for row in tree["rows"]):
        kinds["compiled_decode"] = "decode compiled, tokens/s"
    lines = [
        f"{said['processor']}, {said['threads']} threads, {said['isa']}.",
        "",
        f"| weights | layers of | MB | perplexity | {' | '.join(kinds.values())} |",
        "|---|---|---|---|" + "---|" * len(kinds),
    ]
    for row in tree["rows"]:
        speeds = (row[f"{kind}_tokens_per_second"] for kind in kinds)
        cells = (f"{row['stored_bytes'] / 1e6:.1f}", f"{row['perplexity']:.2f}", *(f"{speed:.1f}" for speed in speeds))
        lines.append(f"| {row['format']}, {row['dtype']} | {row['library']} | {' | '.join(cells)} |")
    if "compiled_decode" in kinds:
        lines += ["", *_compiled_lines(tree["rows"])]
    parts = [row for row in tree["rows"] if "shares_of_decode" in row]
    names = list(parts[0]["shares_of_decode"])
    heads = [*names, "decode over bitsandbytes", "at most"]
    lines += ["", f"| a decode step of qcore | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    peers = _rows_of(tree["rows"], "bitsandbytes")
    for row in parts:
        parts_of_step = row["shares_of_decode"]
        ratio = row["decode_tokens_per_second"] / peers[row["format"]]["decode_tokens_per_second"]
        most = ratio / (1 - parts_of_step["quantized layers"])
        cells = [*(f"{parts_of_step[name]:.0%}" for name in names), f"{ratio:.2f}x", f"{most:.2f}x"]
        lines.append(f"| {row['format']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rows_of(rows: list[dict[str, Any]], library: str) -> dict[str, dict[str, Any]]:
    return {row["format"]: row for row in rows if row["library"] == library}


def _compiled_lines(rows: list[dict[str, Any]]) -> list[str]:
    """qcore over bitsandbytes, eager and compiled, and over the faster of bitsandbytes' two."""
    heads = ("prefill", "decode", "decode compiled", "compiled over its faster one")
    lines = [f"| qcore over bitsandbytes | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    peers = _rows_of(rows, "bitsandbytes")
    for name, row in _rows_of(rows, "qcore").items():
        kinds = [f"{kind}_tokens_per_second" for kind in ("prefill", "decode", "compiled_decode")]
        peer = peers[name]
        faster = max(peer[kind] for kind in kinds[1:])
        ratios = [*(row[kind] / peer[kind] for kind in kinds), row[kinds[2]] / faster]
        cells = [f"{ratio:.2f}x" for ratio in ratios]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def int4_table(tree: dict[str, Any]) -> str:
    rows = tree["rows"]
    texts = list(rows["float"]["perplexity"])
    heads = [f"{text}{over}" for text in texts for over in ("", ", over float")]
    lines = [
        f"{tree['tokens']} tokens of each text in windows of {tree['window']}.",
        "",
        f"| weights | calibrated on | MB | {' | '.join(heads)} |",
        "|---|---|---|" + "---|" * len(heads),
    ]
    for name, row in rows.items():
        tokens = f"{row['calibration_tokens']:,} tokens" if "calibration_tokens" in row else "-"
        cells = [name, tokens, f"{row['bytes'] / 1e6:.1f}"]
        for text in texts:
            value, plain = row["perplexity"][text], rows["float"]["perplexity"][text]
            cells += [f"{value:.2f}", f"{value / plain - 1:+.1%}" if row is not rows["float"] else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def qlora_table(tree: dict[str, Any]) -> str:
    lines = [
        f"{tree['steps']} steps of {tree['batch']} sequences of {tree['length']} tokens, rank {tree['rank']}.",
        "",
        "| base | bytes, adapters included | trained values | loss held out, before | after |",
        "|---|---|---|---|---|",
    ]
    for name, run in tree["runs"].items():
        losses = " | ".join(f"{run[key]:.3f}" for key in ("held_out_before", "held_out_after"))
        size = f"{run['footprint_bytes'] / 1e6:.1f} MB"
        lines.append(f"| {name} | {size} | {run['trainable_parameters']:,} | {losses} |")
    return "\n".join(lines)


def optimizers_table(tree: dict[str, Any]) -> str:
    said = tree["machine"]
    lines = [
        f"{said['processor']}, {said['threads']} threads, {said['isa']}, {tree['started'][:10]}.",
        "",
        "| optimizer | 8-bit, ms | of its traffic | 32-bit, ms | of its traffic | over torch | bitsandbytes over it |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in tree["results"]:
        ratios = row["ratios"]
        cells = [row["optimizer"]]
        for bits in (8, 32):
            cells += [f"{row['ms'][f'qcore {bits}-bit']['ms']:.1f}", _times(ratios, f"qcore {bits}-bit / floor")]
        peers = [f"{_times(ratios, f'qcore 8-bit / torch {kind}')} {kind}" for kind in ("fused", "foreach")]
        cells.append(", ".join(text for text in peers if not text.startswith("-")) or "-")
        cells.append(_times(ratios, "bitsandbytes 8-bit / qcore 8-bit"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(ratios: dict[str, float], name: str) -> str:
    return f"{ratios[name]:.2f}x" if name in ratios else "-"


def training_table(tree: dict[str, Any]) -> str:
    runs, settings = tree["runs"], tree["settings"]
    (first, base), *_ = runs.items()
    parameters = base["parameter_bytes"] // 4
    lines = [
        f"{parameters:,} parameters, {settings['steps']} steps, seed {settings['seed']}.",
        "",
        f"| optimizer | loss on held-out text | over {first} | state |",
        "|---|---|---|---|",
    ]
    for name, run in runs.items():
        loss = run["validation"][-1][1]
        change = "" if run is base else f"{loss / base['validation'][-1][1] - 1:+.1%}"
        lines.append(f"| {name} | {loss:.3f} | {change} | {run['state_bytes'] / 1e6:.2f} MB |")
    return "\n".join(lines)


def load_memory_table(tree: dict[str, Any]) -> str:
    heads = ("float model", "model", "peak", "above the model", "afterwards", "largest tensor")
    lines = [
        f"{_place(tree)}; in MB.",
        "",
        f"| arguments | checkpoint, largest file | to | {' | '.join(heads)} |",
        "|---|---|---|" + "---|" * len(heads),
    ]
    for run in tree["runs"]:
        made = run.get("checkpoint")
        source = "SmolLM2-135M-Instruct" if made is None else f"{_mb(made['bytes'])}, {_mb(made['largest file'])}"
        for row in run["rows"]:
            above = row["peak"] - row["model"]
            figures = (row.get("float model"), row["model"], row["peak"], above, row["after"], row["largest tensor"])
            cells = ("" if value is None else _mb(value) for value in figures)
            lines.append(f"| `{run['arguments']}` | {source} | {row['format']} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("| `` |", "| none |")


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f}"


def _place(tree: dict[str, Any]) -> str:
    said = tree["machine"]
    versions = f"Python {said['versions']['python']}, torch {said['versions']['torch']}"
    return f"{said['processor']}, {said['threads']} thread{'s' * (said['threads'] > 1)}, {versions}"


def quantize_memory_table(tree: dict[str, Any]) -> str:
    before = f"{tree['before_bytes'] / 1e9:.2f} GB before it reads a tensor"
    lines = [
        f"{_place(tree)}; a checkpoint of {tree['checkpoint_bytes'] / 1e9:.2f} GB, {before}.",
        "",
        "| `qcore quantize` to | peak |",
        "|---|---|",
    ]
    lines += [f"| {row['format']} | {row['peak_bytes'] / 1e9:.2f} GB |" for row in tree["rows"]]
    return "\n".join(lines)


TABLES = {
    "cpu": cpu_tables,
    "cpu-avx512": cpu_tables,
    "conformance": conformance_table,
    "demo": demo_table,
    "optimizers": optimizers_table,
    "optimizers-avx512": optimizers_table,
    "train-gpt": training_table,
    "transformers": models_table,
    "transformers-avx512": models_table,
    "int4": int4_table,
    "qlora": qlora_table,
    "load-memory": load_memory_table,
    "quantize-memory": quantize_memory_table,
}


def with_tables(text: str) -> str:
    """``text`` with every table between its two markers made anew from the JSON beside it."""
    for name, table in TABLES.items():
        first, last = f"<!-- {name}.json -->", f"<!-- end of {name}.json -->"
        before, found, rest = text.partition(first)
        _, ended, after = rest.partition(last)
        if not found or not ended:
            raise SystemExit(f"{README}: needs the lines {first} and {last}")
        tree = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        text = f"{before}{first}\n\n{table(tree)}\n\n{last}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    gathering = commands.add_parser("conformance", help="gather the reports of `make test` into conformance.json")
    gathering.add_argument("reports", type=Path)
    tables = commands.add_parser("tables", help="make the README's tables from the JSON files")
    tables.add_argument("--check", action="store_true", help="change nothing; exit 1 if it would")
    options = parser.parse_args()
    if options.command == "conformance":
        tree = gather(options.reports)
        (RESULTS / "conformance.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        return
    old = README.read_text(encoding="utf-8")
    new = with_tables(old)
    if options.check:
        sys.exit(int(old != new))
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
