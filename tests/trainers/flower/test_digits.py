"""What `make flower` runs, with a tiny base model, and with an in-process grid instead of the network."""

from importlib import import_module

import pytest


pytest.importorskip("flwr")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from flwr.cli.build import build_fab_from_disk
from safetensors.torch import load_file, save_file

from peft_ravan.trainers.demo import digits

from ...benchmark import load_script
from ...digits import save_base_model
from .grid import InProcessGrid
from .loopback import ROOT


FOLDER = ROOT / "examples" / "flower_digits"
compare = load_script(FOLDER / "compare.py")


@pytest.fixture
def in_process(monkeypatch):
    """The app runs in this process. Returns what is called with the folder of its adapter at the end."""
    at_the_end = []
    monkeypatch.syspath_prepend(FOLDER)  # as for a script, which imports its app
    federation = import_module("app.federation")

    def run(base_dir, folder, output_dir, console):
        monkeypatch.setenv(federation.BASE_MODEL, str(base_dir))
        nodes = {10 + index: {"partition-id": index, "num-partitions": 3} for index in range(3)}
        grid = InProcessGrid(federation.client, nodes, {"output-dir": str(output_dir), "node-timeout": 0.0})
        federation.server(grid, grid.server_context())
        assert compare.show_rounds(output_dir, 0, console) == 2 == compare.show_rounds(output_dir, 2, console)
        for function in at_the_end:
            function(output_dir)
        return 1.0

    monkeypatch.setattr(digits, "pretrain", save_base_model)
    monkeypatch.setattr(federation, "PLAN", digits.Plan(num_clients=3, clients_per_round=3, num_rounds=1, max_steps=2))
    monkeypatch.setattr(compare, "is_installed", lambda: True)
    monkeypatch.setattr(compare, "run_over_flower", run)
    monkeypatch.setenv("COLUMNS", "150")
    return at_the_end


def test_the_table_has_one_more_row_with_the_same_result(tmp_path, in_process, capsys):
    for name in ("over-flower", "flower/home"):  # of an earlier run
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "rounds.jsonl").write_text("{}")
    compare.main(["--output-dir", str(tmp_path)])
    assert not (tmp_path / "flower").exists()
    shown = capsys.readouterr().out
    assert "3 clients, 1 rounds of 3 clients, 2 local steps" in shown
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert [row[0] for row in table[-4:]] == ["LoRA, FedAvg", "Ravan", "Ravan, FedRPCA", "Ravan, FedRPCA, over Flower"]
    assert table[-1][1:-1] == table[-2][1:-1]
    assert "is the same as that of Ravan, FedRPCA in one process, bit for bit" in shown


def test_another_result_is_an_error(tmp_path, in_process, monkeypatch):
    def change(folder):
        adapter = load_file(folder / "adapter_model.safetensors")
        next(value for name, value in adapter.items() if name.endswith("ravan_H")).view(-1)[3] += 0.25
        save_file(adapter, folder / "adapter_model.safetensors")

    in_process.append(change)
    of_flower = digits.methods()[-1]
    monkeypatch.setattr(digits, "methods", lambda: [of_flower])
    with pytest.raises(SystemExit, match="differs from that of one process by up to 0.25"):
        compare.main(["--output-dir", str(tmp_path)])


def test_flower_accepts_the_app():
    assert b"federation.py" in build_fab_from_disk(compare.APP)


def test_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "is_installed", lambda: False)
    with pytest.raises(SystemExit, match=r"pip install 'peft-ravan\[demo,flower\]', with Python 3.11"):
        compare.main(["--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
