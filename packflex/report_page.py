"""`report.html`: a finished run on one page that needs no other file, for sending on and looking back."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from packflex.plots import loss_curve, step_curve
from packflex.report import RunSummary, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td { padding: .15rem 1.2rem .15rem 0; vertical-align: top; }
td:first-child { color: #7b8794; } img { max-width: 100%; }
pre { background: #f3f5f7; padding: .8rem; overflow-x: auto; white-space: pre-wrap; }
"""
# metric, axis, title, whether it is a share of 1
_CURVES = (
    ("throughput/tokens_per_second", "tokens a second", "Throughput, padding not counted", False),
    ("throughput/mfu", "MFU", "Model FLOPs utilisation", True),
    ("packing/documents", "documents", "Documents a step", False),
    ("packing/efficiency", "efficiency", "Share of the rows that is documents; the rest is padding", True),
)


def save_report(
    summary: RunSummary, metrics: Path, page: Path, config: str = "", heldout: Sequence[tuple[int, float]] = ()
) -> None:
    """Write the page: what was trained, loss, throughput, documents a step, padding, a sample, the settings.

    Args:
        summary: of the run.
        metrics: `metrics.csv` of Lightning's CSVLogger; what was not logged is left out.
        page: the file to write.
        config: the settings as YAML, empty for none.
        heldout: held-out losses as (step, loss).
    """
    parts = [f"<h1>packflex run</h1>{_facts(summary)}"]
    steps, losses = read_metrics(metrics, "train/loss")
    if steps or heldout:
        curve = loss_curve(steps, losses, [step for step, _ in heldout], [loss for _, loss in heldout])
        parts.append(_picture(curve, "Loss by step"))
    for name, label, title, percent in _CURVES:
        steps, values = read_metrics(metrics, name)
        if steps:
            parts.append(_picture(step_curve(steps, values, label, title, percent), title))
    prompt = "Prompt (held out)" if summary.heldout_documents else "Prompt"
    parts.append(f"<h2>{prompt}</h2><pre>{html.escape(summary.prompt)}</pre>")
    parts.append(f"<h2>Completion</h2><pre>{html.escape(summary.completion)}</pre>")
    if config:
        parts.append(f"<details><summary>Settings</summary><pre>{html.escape(config)}</pre></details>")
    body = "\n".join(parts)
    page.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>packflex run</title>'
        f"<style>{_STYLE}</style><body>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )


def _facts(summary: RunSummary) -> str:
    rows = [*summary.facts(), *(("file: " + name, path) for name, path in summary.files.items())]
    cells = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _picture(figure: Figure, alternative: str) -> str:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    data = base64.b64encode(image.getvalue()).decode()
    return f'<p><img alt="{html.escape(alternative)}" src="data:image/png;base64,{data}"></p>'
