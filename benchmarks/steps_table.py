"""The README's tables of bench_step.py: one for each comparison, a line a contender, head-and-loss
beside the whole step.
"""

GROUP = (
    "model",
    "teacher",
    "device_name",
    "dtype",
    "batch",
    "tokens",
    "positions",
    "kd_weight",
    "gradient_checkpointing",
    "threads",
)
FORMULA = (
    "Operations, as mlx_distill/cost/flops.py counts them, with N supervised positions, T tokens a "
    "sequence, D and Dt the widths, V the vocabulary, W and Wt the weights of the trunks' "
    "matrices: head and loss 2NV(Dt + 3D); the step adds, summed over sequences, 2T(Wt + 3W) and "
    "attention's 2T²·layers·heads·head_dim, once for the teacher and three times for the student. "
    "What a contender computes beside that (the head at prompt positions, projections made again) "
    "earns it nothing. Shares are of the fastest square product measured in the same rounds."
)
NAMES = {
    "paper": "paper: dense, softmax then log",
    "trl-gkd": "TRL GKDTrainer: dense log-softmax",
    "trl": "TRL DistillationTrainer: chunked",
    "liger-eager": "Liger chunked_loss, not compiled",
    "liger": "Liger chunked_loss, as shipped",
    "liger-triton": "Liger Triton kernels",
    "ours": "**ours**",
    "matmuls": "its matrix products alone",
}
Row = dict[str, str]


def render(rows: list[Row], checks: list[Row]) -> str:
    groups: dict[tuple[str, ...], dict[tuple[str, str], Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in GROUP), {})[row["part"], row["contender"]] = row
    return "\n\n".join(
        [FORMULA, *(comparison(group) for group in groups.values()), *agreement(checks)]
    )


def comparison(group: dict[tuple[str, str], Row]) -> str:
    """One table; × compares rows of the same rounds, which share their date."""
    last = max(group.values(), key=lambda row: row["date"])
    lines = [
        heading(last),
        "",
        "| | head and loss | × best peer | × products | peak | share | whole step | × best peer | "
        "tokens/s | peak | share |",
        f"|---|{'---:|' * 10}",
    ]
    present = {contender for _, contender in group}
    for contender, name in NAMES.items():
        if contender in present:
            head, step = group.get(("head", contender)), group.get(("step", contender))
            cells = [
                times(head),
                against(group, head, peers(group)),
                against(group, head, ["matmuls"]),
                megabytes(head),
                share(group, head),
                times(step),
                against(group, step, peers(group)),
                speed(step),
                megabytes(step),
                share(group, step),
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heading(row: Row) -> str:
    cpu = f"{row['cpu']}, {row['threads']} thread(s) of {row['cores']} cores, load {row['load']}"
    place = row["device_name"] if row["device"] == "cuda" else cpu
    checkpointing = ", gradient checkpointing" if row["gradient_checkpointing"] == "True" else ""
    return (
        f"**{row['model']}**, teacher: {row['teacher']}; {row['batch']} × {row['tokens']} tokens, "
        f"{int(row['positions']):,} of them supervised, kd_weight {row['kd_weight']}, "
        f"{row['dtype']}{checkpointing}. {place}; torch {row['torch']}, transformers "
        f"{row['transformers']}, TRL {row['trl']}, Liger {row['liger_kernel']}, "
        f"{row['date'][:10]}, commit {row['commit']}. Median seconds on the clock (least CPU "
        "seconds); peak over what was held before."
    )


def peers(group: dict[tuple[str, str], Row]) -> list[str]:
    return sorted({contender for _, contender in group} - {"ours", "matmuls"})


def times(row: Row | None) -> str:
    if row is None:
        return "–"
    if not row["seconds_median"]:
        return "does not fit or fails"
    seconds, cpu = float(row["seconds_median"]), float(row["cpu_seconds_min"])
    return f"{1000 * seconds:.1f} ms" if row["device"] == "cuda" else f"{seconds:.2f} ({cpu:.2f}) s"


def against(group: dict[tuple[str, str], Row], row: Row | None, others: list[str]) -> str:
    """Median seconds relative to the fastest of `others` in the same rounds."""
    if row is None or not row["seconds_median"] or row["contender"] == "matmuls":
        return ""
    found = [group.get((row["part"], other)) for other in others]
    seconds = [
        float(other["seconds_median"])
        for other in found
        if other and other["seconds_median"] and other["date"] == row["date"]
    ]
    return f"{float(row['seconds_median']) / min(seconds):.2f}" if seconds else "–"


def megabytes(row: Row | None) -> str:
    return f"{int(row['peak_bytes']) / 1e6:,.0f} MB" if row and row["peak_bytes"] else "–"


def speed(row: Row | None) -> str:
    return f"{float(row['tokens_per_second']):,.0f}" if row and row["tokens_per_second"] else "–"


def share(group: dict[tuple[str, str], Row], row: Row | None) -> str:
    if row is None or not row["seconds_median"]:
        return "–"
    same = [r for r in group.values() if r["matmul_flops_per_second"] and r["date"] == row["date"]]
    peak = max(float(r["matmul_flops_per_second"]) for r in same)
    return f"{float(row['flops']) / float(row['seconds_median']) / peak:.0%}"


def agreement(checks: list[Row]) -> list[str]:
    """One line from the last `check`: how far apart losses and gradients are."""
    if not checks:
        return []
    last = [row for row in checks if row["date"] == checks[-1]["date"]]
    parts = {
        "head": "given hidden states, from the definition in float64",
        "step": "in whole models, from ours",
    }
    found = []
    for part, words in parts.items():
        rows = [row for row in last if row["part"] == part]
        if rows:
            errors = ", ".join(
                f"{row['contender']} {float(row['loss_error']):.0e} and "
                f"{float(row['gradient_error']):.0e}"
                for row in rows
            )
            found.append(f"{words}: {errors}")
    model = (
        f"{last[0]['model']}, {last[0]['positions']} positions, {last[0]['dtype']}, "
        f"{last[0]['device']}"
    )
    what = (
        "the loss (relative; absolute below 1) and of any gradient's element (relative to its "
        "tensor's largest)"
    )
    return [f"Largest difference of {what}; {model}: {'; '.join(found)}."]
