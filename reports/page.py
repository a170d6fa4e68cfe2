"""The HTML report: one page that opens without a server, from one run or one per machine."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from string import Template

from reports import evidence, kernels, markup, sections, study
from reports.load import Run, write_text

TEMPLATES = Path(__file__).with_name("templates")


def build(runs: Sequence[Run], out: Path, joined: Sequence[Run] = ()) -> Path:
    """Write the page of `runs` to `out`/report.html and return its path.

    `joined` are runs of `reports headline` and of kernels alone: each joins the run of the same
    hardware that has none of its own.
    """
    chapters = [chapter(run, out, joined) for run in runs]
    many = len(runs) > 1
    if many:
        chapters = [own_names(text, f"run{i}-") for i, text in enumerate(chapters)]
    body = "".join(
        f'<article id="{run.slug}-{i}"><header class=machine><h1>{markup.text(title(run))}</h1>'
        f"{summary(run)}</header>{contents(text)}{text}</article>"
        for i, (run, text) in enumerate(zip(runs, chapters, strict=True))
    )
    if many:
        links = "".join(
            f'<li><a href="#{run.slug}-{i}">{markup.text(run.hardware_name)}</a></li>'
            for i, run in enumerate(runs)
        )
        body = f"<nav><ul>{links}</ul></nav>{body}"
    page = Template((TEMPLATES / "page.html").read_text(encoding="utf-8")).substitute(
        title=markup.text("Inference optimization: " + ", ".join(title(run) for run in runs)),
        style=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
        body=body,
        reading=evidence.how_to_read(),
    )
    return write_text(out / "report.html", page)


def title(run: Run) -> str:
    hardware = run.hardware
    return str(hardware.get("GPU") or hardware.get("CPU") or "this machine")


def summary(run: Run) -> str:
    """Under the title: what was measured on what, and what may disturb it."""
    versions = ", ".join(
        f"{name} {run.machine[name]}"
        for name in ("torch", "transformers", "triton")
        if isinstance(run.machine.get(name), str)
    )
    marks = (run.raw.get("conditions") or {}).get("marks") or []
    warned = "".join(f"<li>{markup.text(mark)}</li>" for mark in marks)
    return (
        f"<p>{markup.text(run.hardware_name)}<br>{markup.text(versions)}<br>"
        f"{markup.text(run.when[:16].replace('T', ' '))}, commit <code>"
        f"{markup.text(run.commit_short)}</code></p>"
        f"<p class=counts><b>{len(run.records)}</b> cells measured, <b>{len(run.not_run)}</b> not "
        f"run</p>" + (f"<ul class=marks>{warned}</ul>" if warned else "")
    )


def chapter(run: Run, out: Path, joined: Sequence[Run]) -> str:
    stacks = replace(run, records=[r for r in run.records if not study.is_kernel(r)])
    parts = [question(stacks) for question in sections.QUESTIONS] if stacks.records else []
    singles, details = run, run
    if apart := like(run, joined, "kernels"):
        singles = apart
        details = replace(run, records=[*run.records, *apart.records])
    parts.append(kernels.kernels(singles))
    if repeated := like(run, joined, "headline"):
        parts.insert(1, sections.three_processes(repeated))
    parts += [evidence.bottlenecks(run), evidence.not_run(run), evidence.cells(details, out),
              evidence.trust(run), evidence.machine(run)]  # fmt: skip
    return "".join(parts)


def like(run: Run, joined: Sequence[Run], about: str) -> Run | None:
    """The run of the same hardware, about something else, that stands on the page of ``run``."""
    if run.about != "study" or (about == "kernels" and any(map(study.is_kernel, run.records))):
        return None
    own = [r for r in joined if r.about == about and r.hardware == run.hardware]
    return own[0] if own else None


def own_names(text: str, prefix: str) -> str:
    """The chapter with its sections and cells, and the links to them, under names of its own."""
    places = r'(<section id="|class="cell" id="|<a\b[^>]*href="#)'
    return re.sub(places, rf"\g<1>{prefix}", text)


def contents(text: str) -> str:
    """A table of contents from the sections that are there."""
    found = re.findall(r'<section id="([\w-]+)"><h2>(.*?)</h2>', text)
    return (
        "<nav><ul>" + "".join(f'<li><a href="#{i}">{t}</a></li>' for i, t in found) + "</ul></nav>"
    )
