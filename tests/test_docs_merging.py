"""The pages on merging are correct: their code gives the results it shows, and their tables match the registries."""

import doctest
import re
from pathlib import Path

import pytest

from peft_ravan.merging import MERGE_METHODS, SERVER_OPTIMIZERS, methods_table

from .markdown import code_blocks, rows, run_blocks, section


PAGE = Path(__file__).parent.parent / "docs" / "merging.md"
REFERENCE = PAGE.parent / "merging_reference.md"
TEXT = PAGE.read_text() + REFERENCE.read_text()
METHODS = [*MERGE_METHODS.values(), *SERVER_OPTIMIZERS.values()]


def section_of(method) -> str:
    return section(TEXT, method.pretty_name, level=3 if method.name in SERVER_OPTIMIZERS else 2)


def between(marker: str) -> str:
    return TEXT.split(f"<!-- {marker} -->\n")[1].split(f"<!-- /{marker} -->")[0]


def names_in(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text)) & set(MERGE_METHODS)


# one example on the page deliberately does not converge
@pytest.mark.filterwarnings("ignore:fedrpca. robust PCA did not converge in 3 iterations for 1 of 1 matrices")
def test_the_code_gives_the_results_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attempted = run_blocks(REFERENCE, {}, doctest.ELLIPSIS)
    assert attempted > len(METHODS)


def test_the_table_of_methods():
    assert between("methods") == methods_table()


def test_the_table_of_server_optimizers():
    table = [row[0] for row in rows(between("server-optimizers"))]
    assert table == [
        f"[{optimizer.pretty_name}]({optimizer.reference})<br>`{optimizer.name}`"
        for optimizer in SERVER_OPTIMIZERS.values()
    ]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_has_a_section_with_its_reference_its_options_and_an_example(method):
    text = section_of(method)
    assert f"]({method.reference})" in text
    assert any(f'"{method.name}"' in block for block in code_blocks(text))
    if method.options:
        table = {name.strip("`"): (default.strip("`"), meaning) for name, default, meaning in rows(text)}
        assert table == {
            name: (repr(default).replace("'", '"'), method.options_help[name])
            for name, default in method.options.items()
        }
    else:
        assert "It has no options." in text and not re.search(r"^\|", text, flags=re.MULTILINE)


def test_what_is_said_of_groups_of_methods():
    streaming = section(TEXT, "Streaming and memory").split(" stream: ")[0]
    assert names_in(streaming) == {method.name for method in MERGE_METHODS.values() if method.streaming}
    situations = dict(rows(section(TEXT, "Choosing a method")))
    secure = {method.name for method in MERGE_METHODS.values() if method.secure_aggregation}
    assert names_in(situations["Secure aggregation"]) == secure
    assert all(MERGE_METHODS[name].different_ranks for name in names_in(situations["LoRA, different ranks"]))


@pytest.mark.parametrize("page", ["README.md", "docs/ravan.md"])
def test_other_pages_lead_here(page):
    path = PAGE.parent.parent / page
    [target] = set(re.findall(r"\]\(((?:docs/)?merging\.md)\)", path.read_text()))
    assert (path.parent / target).samefile(PAGE)
