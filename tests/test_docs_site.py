"""mkdocs.yml names the pages that there are, the reference has all public names, and the shorthand leads there."""

import dataclasses
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from markdown import Markdown

import peft_ravan
import peft_ravan.merging
import peft_ravan.trainers
from peft_ravan.trainers import FederatedArgumentsMixin


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def load(name: str) -> ModuleType:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages(entries: list | dict | str) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    inner = entries.values() if isinstance(entries, dict) else entries
    return [page for entry in inner for page in pages(entry)]


def test_every_page_is_in_the_navigation_once_and_every_entry_is_a_page():
    found = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    notebooks = [f"notebooks/{path.stem}.md" for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")]
    assert sorted(pages(CONFIG["nav"])) == sorted([*found, *notebooks])


def test_the_files_that_the_configuration_names_are_there():
    options = next(plugin["mkdocstrings"] for plugin in CONFIG["plugins"] if "mkdocstrings" in plugin)
    extensions = options["handlers"]["python"]["options"]["extensions"]
    named = [*CONFIG["hooks"], *extensions, options["custom_templates"]]
    assert all((ROOT / path).exists() for path in named)
    assert all((DOCS / path).exists() for path in CONFIG["extra_css"])
    # what is not for readers is not copied to the site
    hidden = {path.rstrip("/") for path in CONFIG["exclude_docs"].split()}
    assert {Path(path).name for path in named} | {"__pycache__"} == hidden


def test_every_link_is_checked():
    checks = {**CONFIG["validation"]["nav"], **CONFIG["validation"]["links"]}
    assert set(checks.values()) == {"warn"}
    assert {"not_found", "anchors", "absolute_links", "unrecognized_links", "omitted_files"} == set(checks)
    assert re.search(r"^\t.*mkdocs build --strict$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def resolved(name: str):
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found


@pytest.fixture(scope="module")
def hooks():
    if sys.version_info < (3, 11):
        pytest.skip("docs/hooks.py needs tomllib, of Python 3.11")
    return load("hooks")


def test_the_reference_has_every_public_name(hooks):
    documented = {id(resolved(name)) for name in hooks.documented_names().values()}
    for module in (peft_ravan, peft_ravan.merging, peft_ravan.trainers):
        public = {name: getattr(module, name) for name in module.__all__}
        functions_and_classes = {name for name, value in public.items() if callable(value)}
        assert {name for name in functions_and_classes if id(public[name]) not in documented} == set()


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("[`Known`]", '<autoref identifier="peft_ravan.Known"><code>Known</code></autoref>'),
        ("[`~peft_ravan.inner.Known`]", '<autoref identifier="peft_ravan.Known"><code>Known</code></autoref>'),
        ("[`Known.run`]s", '<autoref identifier="peft_ravan.Known.run"><code>Known.run</code></autoref>s'),
        ("[`~transformers.Trainer`]", "<code>Trainer</code>"),
        ("[`~transformers.Known`]", "<code>Known</code>"),
        ("[`unknown_name`]", "<code>unknown_name</code>"),
        ("[`Known`](page.md)", '<a href="page.md"><code>Known</code></a>'),
        ("`x[0]` and [text]", "<code>x[0]</code> and [text]"),
    ],
)
def test_the_shorthand(hooks, text, html):
    markdown = Markdown(extensions=[hooks.ShorthandExtension({"Known": "peft_ravan.Known"})])
    assert markdown.convert(text) == f"<p>{html}</p>"


@pytest.mark.parametrize(
    ("repository", "expected"),
    [(None, "see `speed.py` and [Ravan](../ravan.md#bases)")]
    + [
        (
            url,
            "see [`speed.py`](https://example.org/code/tree/main/benchmarks/speed.py) and [Ravan](../ravan.md#bases)",
        )
        for url in ("https://example.org/code", "https://example.org/code/")
    ],
)
def test_links_out_of_the_docs(hooks, repository, expected):
    config = SimpleNamespace(repo_url=repository, docs_dir=str(DOCS))
    page = SimpleNamespace(file=SimpleNamespace(src_uri="how_to/budget.md"))
    text = "see [`speed.py`](../../benchmarks/speed.py) and [Ravan](../ravan.md#bases)"
    assert hooks.on_page_markdown(text, page=page, config=config, files=[]) == expected


@pytest.mark.parametrize(
    ("page", "expected"),
    [("index.md", "notebooks/share_and_load.md"), ("how_to/budget.md", "../notebooks/share_and_load.md")],
)
def test_links_to_notebooks_lead_to_their_pages(hooks, page, expected):
    config = SimpleNamespace(repo_url=None, docs_dir=str(DOCS))
    notebook = f"{'../' * (page.count('/') + 1)}examples/notebooks/share_and_load.ipynb"
    given = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    shown = hooks.on_page_markdown(f"see [it]({notebook})", page=given, config=config, files=[])
    assert shown == f"see [it]({expected})"


def test_the_page_of_a_notebook(hooks, tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "What it is."]},
        {"cell_type": "code", "source": ["import this\n", "1 + 1"]},
        {"cell_type": "markdown", "source": ["## More"]},
    ]
    (tmp_path / "some.ipynb").write_text(json.dumps({"cells": cells}))
    text = hooks.notebook_page(tmp_path / "some.ipynb")
    assert re.sub(r"\n+", "\n", text) == (
        "# Title\nWhat it is.\n[Download the notebook](some.ipynb){ .md-button download }\n"
        "```python\nimport this\n1 + 1\n```\n## More\n"
    )


def test_the_arguments_are_listed_where_people_look_for_them(hooks):
    griffe = pytest.importorskip("griffe")  # comes with the extra `docs`
    hooks.link_sources()
    extension = load("docstrings").HuggingFaceDocstrings()
    package = griffe.load(
        "peft_ravan", search_paths=[hooks.SOURCES], extensions=griffe.Extensions(extension), allow_inspection=False
    )
    arguments, mixin = (
        package[f"trainers.arguments.{name}"] for name in ("FederatedArguments", "FederatedArgumentsMixin")
    )
    [listed] = [part for part in arguments.docstring.parse("google") if part.kind.value == "parameters"]
    fields = {field.name for field in dataclasses.fields(FederatedArgumentsMixin)}
    described_above = {"lr_scheduler_type", "save_strategy"}  # of TrainingArguments, with other defaults
    assert {parameter.name for parameter in listed.value} == fields - described_above
    assert "listed under [`FederatedArguments`]" in mixin.docstring.value and "num_rounds" not in mixin.docstring.value


def test_examples_and_attributes_of_docstrings():
    pytest.importorskip("griffe")  # comes with the extra `docs`
    text = (
        "Train.\n\n**Attributes**:\n    - **first** (`int`) -- One\n      and more.\n    - **second** -- Two.\n\n"
        "Example:\n\n    ```py\n    >>> train()\n    ```\n"
    )
    assert load("docstrings").as_griffe_reads(text).rstrip() == (
        "Train.\n\n**Attributes:**\n\n- **first** (`int`) -- One\n    and more.\n- **second** -- Two.\n\n\n"
        "Example:\n\n    >>> train()"
    )
