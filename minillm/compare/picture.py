"""The picture of a comparison: quality against trainable parameters and against memory."""

from minillm import files


def picture(rows, path, title=""):
    """Draw a dot for each technique that trains, with the 95% interval of its change, and a
    triangle for its quality in int8. A PNG.
    """
    files.need("matplotlib", "plot")
    from matplotlib.figure import Figure

    rows = [row for row in rows if "error" not in row]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for i, row in enumerate(row for row in rows if row["technique"] != "none"):
        after = row["after"]
        low, high = (
            after["value"] if after[end] is None else after[end] for end in ("low", "high")
        )
        ends = [[max(0.0, after["value"] - low)], [max(0.0, high - after["value"])]]
        for axes, x in ((left, row["trainable"]), (right, row["peak_bytes"] / 1e6)):
            axes.errorbar(
                x,
                after["value"],
                yerr=ends,
                fmt="o",
                capsize=4,
                color=f"C{i}",
                label=row["technique"],
            )
            axes.plot(x, row["int8"]["value"], "v", color=f"C{i}", alpha=0.5)
    left.set(
        xscale="log", xlabel="trainable parameters", ylabel=f"{rows[0]['metric']}, held-out text"
    )
    right.set(xlabel="peak memory of training, MB")
    for axes in (left, right):
        axes.axhline(rows[0]["before"]["value"], ls=":", color="grey", label="untuned")
        axes.grid(alpha=0.2)
    right.plot([], [], "v", color="grey", alpha=0.5, label="after int8")
    right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.suptitle(
        f"{title}: 95% intervals of the change" if title else "95% intervals of the change",
        fontsize="medium",
    )
    with files.atomic(path) as new:
        figure.savefig(new, format="png", dpi=120)
