"""The benchmark's picture: a panel for each kind, bars from 1 to the ratio to the peer."""

_COLORS = {"float32": "#4c72b0", "bfloat16": "#dd8452", "float16": "#55a868"}


def save(rows, facts, peer, path):
    """Writes a PNG; False when matplotlib is not installed or nothing was compared."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [row for row in rows if "ratio" in row]
    if not rows:
        return False
    names = {}
    for row in rows:
        names.setdefault(row["kind"], {})[row["case"]] = None
    names = {kind: list(cases) for kind, cases in names.items()}
    kinds = list(names)
    figure, panels = pyplot.subplots(
        len(kinds),
        1,
        figsize=(8, 1.2 + sum(0.5 + 0.55 * len(names[kind]) for kind in kinds)),
        height_ratios=[0.6 + len(names[kind]) for kind in kinds],
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    height = 0.8 / len(dtypes)
    for axes, kind in zip(panels[:, 0], kinds, strict=True):
        for index, dtype in enumerate(dtypes):
            chosen = [r for r in rows if r["kind"] == kind and r["dtype"] == dtype]
            shift = (index + 0.5) * height - 0.4
            places = [names[kind].index(row["case"]) + shift for row in chosen]
            ratios = [row["ratio"] for row in chosen]
            widths = [ratio - 1 for ratio in ratios]
            bars = axes.barh(places, widths, height, 1, color=_COLORS[dtype], label=dtype)
            axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=2, fontsize=7)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names[kind])), names[kind], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(kind, fontsize=9, loc="left")
    ratios = [row["ratio"] for row in rows]
    panels[0, 0].set_xlim(0.8 * min(1, *ratios), 1.3 * max(1, *ratios))
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside upper right", fontsize=8, ncols=3
    )
    panels[-1, 0].set_xlabel(f"times faster than {peer} (median of alternating rounds)")
    threads = f", {facts['threads']} threads" if "threads" in facts else ""
    figure.suptitle(f"{facts['device']}{threads}", fontsize=10, x=0.02, ha="left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
