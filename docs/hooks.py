"""
What MkDocs does besides: the shorthand for names, links out of docs/, pages of the notebooks, and one folder with all of
the sources.
"""

import json
import os
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import tomllib
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.util import AtomicString


ROOT = Path(__file__).parent.parent
SOURCES = ROOT / ".cache" / "docs"
NOTEBOOKS = ROOT / "examples" / "notebooks"
# [`Trainer`], [`~transformers.Trainer`] or [`Trainer.train`], but not the text of a link
SHORTHAND = r"\[`(~?)([A-Za-z_][\w.]*)`\](?![(\[])"
LINK_OUT_OF_DOCS = re.compile(r"\[([^\[\]]+)\]\((?:\.\./)+([^)\s]+)\)")


def on_startup(**_) -> None:
    """Make the sources ready before mkdocstrings looks for them."""
    link_sources()


def on_config(config):
    """Read the shorthand on pages and in docstrings."""
    config.markdown_extensions.append(ShorthandExtension(documented_names()))
    return config


def on_files(files, config):
    """Add a page for each notebook, and the notebook itself."""
    from mkdocs.structure.files import File

    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_page(path)))
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
    return files


def notebook_page(path: Path) -> str:
    """
    Args:
        path (`Path`): A notebook, which begins with a title.

    Returns:
        `str`: The page that shows it, in Markdown.
    """
    title, *cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    download = f"[Download the notebook]({path.name}){{ .md-button download }}"
    heading, _, introduction = "".join(title["source"]).partition("\n")
    shown = [heading, introduction, download]
    for cell in cells:
        text = "".join(cell["source"])
        shown.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    return "\n\n".join(shown) + "\n"


def on_page_markdown(markdown: str, page, config, files) -> str:
    """
    Lead links to notebooks to their pages, and those to other files of the repository there, or, while nobody knows where
    it is, keep their text.
    """
    target = rf"[\1]({config.repo_url.rstrip('/')}/tree/main/\2)" if config.repo_url else r"\1"
    docs = Path(config.docs_dir)

    def replaced(match: re.Match) -> str:
        # a link from one folder of docs/ to another one
        path = match[0].partition("](")[2][:-1].partition("#")[0]
        folder = (docs / page.file.src_uri).parent
        linked = folder.joinpath(path).resolve()
        if linked.parent == NOTEBOOKS:
            return f"[{match[1]}]({os.path.relpath(docs / 'notebooks', folder)}/{linked.stem}.md)"
        return match[0] if linked.is_relative_to(docs) else match.expand(target)

    return LINK_OUT_OF_DOCS.sub(replaced, markdown)


def link_sources() -> None:
    """Make a folder in which the package lies as it is installed: `trainers/` is a part of it."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    for package, folder in sorted(folders.items(), key=lambda item: item[0].count(".")):
        target = SOURCES / package.replace(".", "/")
        target.mkdir(parents=True)
        for path in (ROOT / folder).iterdir():
            (target / path.name).symlink_to(path)


def documented_names() -> dict[str, str]:
    """What the pages of the reference document: names, as they are written in docs, to where they are imported from."""
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    found = [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)]
    return {name.rpartition(".")[2]: name for name in found}


def identifier(name: str, documented: dict[str, str]) -> str | None:
    """
    What a name of the shorthand stands for in the reference.

    Args:
        name (`str`): Such as `FederatedTrainer`, `peft_ravan.merging.merge` or `FederatedTrainer.evaluate_clients`.
        documented (`dict[str, str]`): Short names to where they are imported from, see [`documented_names`].

    Returns:
        `str` or `None`: Such as `peft_ravan.trainers.FederatedTrainer`, or `None` for what is not documented here.
    """
    if "." in name and not name.startswith("peft_ravan."):
        owner, _, member = name.partition(".")
        return f"{documented[owner]}.{member}" if owner in documented else None
    return documented.get(name.rpartition(".")[2])


class ShorthandExtension(Extension):
    """
    Turn [`name`] into a link to the reference, and names of other packages into code.

    Args:
        documented (`dict[str, str]`): Short names to where they are imported from.
    """

    def __init__(self, documented: dict[str, str]) -> None:
        super().__init__()
        self.documented = documented

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        # before backticks (190)
        md.inlinePatterns.register(_Shorthand(self.documented, md), "shorthand", 195)


class _Shorthand(InlineProcessor):
    def __init__(self, documented: dict[str, str], md: Markdown) -> None:
        super().__init__(SHORTHAND, md)
        self.documented = documented

    def handleMatch(self, match: re.Match, data: str):  # noqa: N802
        tilde, name = match.groups()
        code = ElementTree.Element("code")
        code.text = AtomicString(name.rpartition(".")[2] if tilde else name)
        target = identifier(name, self.documented)
        if target is None:
            return code, match.start(0), match.end(0)
        # mkdocs-autorefs makes this a link, and warns if there is no such name
        link = ElementTree.Element("autoref", identifier=target)
        link.append(code)
        return link, match.start(0), match.end(0)
