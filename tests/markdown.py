"""Reading markdown pages in tests of the documentation: sections, tables, code and links."""

import doctest
import re
from pathlib import Path


def section(text: str, title: str, level: int = 2) -> str:
    """The text under a heading, up to the next heading of the same or a higher level."""
    pattern = rf"^{'#' * level} {re.escape(title)}\n(.*?)(?=^#{{2,{level}}} |\Z)"
    [found] = re.findall(pattern, text, flags=re.DOTALL | re.MULTILINE)
    return found


def rows(text: str) -> list[list[str]]:
    """The cells of the first table of a text, without its header."""
    [table] = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)[:1]
    return [
        [cell.strip().replace(r"\|", "|") for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]
    ]


def code_blocks(text: str, language: str = "python") -> list[str]:
    """The code of a text, block by block."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def run_blocks(page: Path, namespace: dict, optionflags: int) -> int:
    """Run the code of a page in order and in one namespace, and check its results. Returns their number."""
    runner = doctest.DocTestRunner(verbose=False, optionflags=optionflags)
    for number, block in enumerate(code_blocks(page.read_text())):
        if block.startswith(">>> "):
            test = doctest.DocTestParser().get_doctest(block, namespace, f"{page.name}, block {number}", page, 0)
            reports = []
            runner.run(test, out=reports.append, clear_globs=False)
            assert not reports, "".join(reports)
            namespace = test.globs
        else:
            exec(compile(block, str(page), "exec"), namespace)
    return runner.summarize(verbose=False).attempted


def dead_links(page: Path) -> list[str]:
    """The links of a page that lead to no file of the project, or to no section of one of its pages."""
    dead = []
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in _anchors(target.read_text())):
            dead.append(link)
    return dead


def _anchors(text: str) -> set[str]:
    titles = re.findall(r"^##+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
