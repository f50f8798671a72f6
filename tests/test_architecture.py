"""The two wings: `trainers/` imports `peft_ravan`, never the reverse."""

import ast
import graphlib
from pathlib import Path

import pytest

from .forked import run_clean


ROOT = Path(__file__).parent.parent
TUNER_WING = sorted((ROOT / "src" / "peft_ravan").rglob("*.py"))
TRAINER_WING = sorted((ROOT / "trainers").rglob("*.py"))
COMMAND_LINE = sorted((ROOT / "src" / "peft_ravan_cli").rglob("*.py"))


def imported_modules(path: Path, package: str) -> set[str]:
    """The absolute names of all modules that a file imports, also inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            prefix = ".".join([*base, node.module] if node.module else base)
            modules |= {prefix} | {f"{prefix}.{alias.name}" for alias in node.names}
    return modules


def test_the_tuner_wing_does_not_import_the_trainer_wing():
    offenders = {}
    for path in TUNER_WING:
        package = ".".join(path.relative_to(ROOT / "src").parent.parts)
        found = {name for name in imported_modules(path, package) if name.startswith("peft_ravan.trainers")}
        # transformers.Trainer and the network have no place there either
        found |= {
            name for name in imported_modules(path, package) if name.split(".")[0] in ("flwr", "trl", "evaluate")
        }
        if found:
            offenders[path.name] = found
    assert TUNER_WING and not offenders


def imports_among(files: list[Path], folder: Path) -> dict[Path, set[Path]]:
    """The files of a package that each of its files imports, also inside functions and for types."""
    names = {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path for path in files
    }
    graph = {}
    for path in files:
        imported = imported_modules(path, ".".join(path.relative_to(folder).parent.parts))
        graph[path] = {names[name] for name in imported if name in names} - {path}
    return graph


def cycle_among(files: list[Path], folder: Path) -> list[str]:
    try:
        graphlib.TopologicalSorter(imports_among(files, folder)).prepare()
    except graphlib.CycleError as error:
        return [str(path.relative_to(folder)) for path in error.args[1]]
    return []


def test_a_cycle_is_seen(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("from .a import f\n")
    (package / "a.py").write_text("def f():\n    from .b import g\n")
    (package / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import f\n")
    assert set(cycle_among(sorted(package.glob("*.py")), tmp_path)) == {"package/a.py", "package/b.py"}


@pytest.mark.parametrize("files, folder", [(TUNER_WING, ROOT / "src"), (TRAINER_WING, ROOT)], ids=["tuner", "trainer"])
def test_imports_of_a_wing_form_no_cycle(files, folder):
    assert cycle_among(files, folder) == []


def closure(part: str) -> set[Path]:
    """The files of one part of the trainer wing, and everything that they import from it."""
    graph = imports_among(TRAINER_WING, ROOT)
    found, new = set(), {path for path in TRAINER_WING if path.parent == ROOT / "trainers" / part}
    while new:
        found, new = found | new, {other for path in new for other in graph[path]} - found - new
    assert found
    return found


def test_server_and_client_share_only_what_is_sent():
    server, client = closure("server"), closure("client")
    assert not [path for path in server if path.parent.name == "client"]
    assert not [path for path in client if path.parent.name == "server"]
    # messages and their bytes, and functions that depend on neither
    shared = {"exchange", "leading_ranks", "messages", "serialized", "quantization", "compression", "seeds", "files"}
    assert {path.stem for path in server & client} == shared


def test_the_server_knows_no_trainer():
    for path in closure("server"):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        others = {
            name for name in imported_modules(path, package) if name.startswith(("transformers", "accelerate", "trl"))
        }
        assert others <= {"transformers.utils", "transformers.utils.logging"}, path


@pytest.mark.parametrize("part", ["server", "client", "runners", "data", "records"])
def test_features_import_neither_arguments_nor_the_trainer_over_them(part):
    facade = {"arguments", "argument_classes", "federated_mixin", "federated_trainer", "trl_trainers"}
    assert not facade & {path.stem for path in closure(part) if path.parent == ROOT / "trainers"}


def test_flower_is_optional(tmp_path):
    """Only its own folder needs it, nothing else imports that folder, and without it everything else can be used."""
    others = [path for path in TRAINER_WING if path.parent != ROOT / "trainers" / "flower"]
    imported = {}
    for path in others + COMMAND_LINE:
        package = ".".join(path.relative_to(ROOT).parent.parts)
        names = {
            name for name in imported_modules(path, package) if "flwr" in name or name.startswith("trainers.flower")
        }
        if names:
            imported[path.name] = names
    assert len(others) < len(TRAINER_WING) and not imported
    code = "import sys, peft_ravan.trainers; sys.exit('flwr' in sys.modules)"
    assert run_clean(code, tmp_path)[0] == 0


def test_what_runs_on_nodes_and_what_runs_on_the_server_of_flower_share_only_what_is_sent():
    graph = imports_among(TRAINER_WING, ROOT)

    def imported_by(name: str) -> set[str]:
        return {path.parent.name for path in graph[ROOT / "trainers" / "flower" / f"{name}.py"]}

    for name in ("client_app", "client_state", "secure_client"):
        assert "server" not in imported_by(name)
    for name in ("strategy", "courier", "nodes", "secure_courier", "secure_sum"):
        assert "client" not in imported_by(name)
    for name in ("codec", "introduction", "secure_masks", "secure_vector"):
        assert not {"client", "server"} & imported_by(name)


def test_the_federated_mixin_has_at_most_four_parents():
    from peft_ravan.trainers import FederatedMixin

    assert len(FederatedMixin.__bases__) <= 4 and all(
        parent.__bases__ == (object,) for parent in FederatedMixin.__bases__
    )


def test_importing_the_tuner_wing_does_not_load_the_trainer_wing(tmp_path):
    code = "import sys, peft_ravan, peft_ravan.merging; sys.exit('peft_ravan.trainers' in sys.modules)"
    assert run_clean(code, tmp_path)[0] == 0


def test_the_trainer_wing_is_installed_as_a_subpackage():
    import peft_ravan.trainers

    assert Path(peft_ravan.trainers.__file__).parent == ROOT / "trainers"


def test_only_the_main_module_imports_the_command_line():
    importing = [path for path in TUNER_WING + TRAINER_WING if "peft_ravan_cli" in imported_modules(path, "")]
    assert importing == [ROOT / "src" / "peft_ravan" / "__main__.py"]


@pytest.mark.parametrize(
    "path", TUNER_WING + TRAINER_WING + COMMAND_LINE, ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_module_is_above_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_share_by_helpers_and_test_what_is_public(path):
    package = ".".join(path.relative_to(ROOT).parent.parts)
    names = {name for name in imported_modules(path, package) if name.startswith(("tests", "peft_ravan"))}
    parts = {part for name in names for part in name.split(".")}
    assert not [part for part in parts if part.startswith("test_") or (part.startswith("_") and part != "__version__")]


def test_the_card_template_is_at_the_top_level():
    assert (
        ROOT / "model_card_template.md"
    ).resolve() == ROOT / "src" / "peft_ravan" / "sharing" / "model_card_template.md"


def test_all_packages_are_built():
    # an editable installation finds the folders by itself, a wheel does not
    tomllib = pytest.importorskip("tomllib")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = set()
    for top, where in tools["package-dir"].items():
        for module in (ROOT / where).rglob("*.py"):
            folders.add(".".join([top, *module.parent.relative_to(ROOT / where).parts]))
    assert set(tools["packages"]) == folders
    # examples are for reading, and are run from a clone
    assert "examples" not in tools["package-dir"].values()


def test_the_template_of_an_app_is_built():
    tomllib = pytest.importorskip("tomllib")
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "trainers").rglob("pyproject.toml")]
    assert {".".join(["peft_ravan", *folder.parts]) for folder in folders} == {
        package for package, files in built.items() if files == ["pyproject.toml"]
    }
