from xloom.hub.fetch import CRABNET, Package
from xloom.suite.items import Item, Read, clean
from xloom.suite.materials import BULK, DOMAIN, GAP, METAL, read_materials
from xloom.suite.reserved import is_reserved

TABLES = {
    METAL[0]: "AgCl,0\nFe2O3,0\nAuCu,1\nAu2Cu2,1\nTiO,1\nTiO,0\nZnS7,not a number\n",
    BULK[0]: "Ag(AuS)2,1\nGeO2,2\nMgO,5\nNaCl,0\nGeO2,18\nClNa,7\n",
    BULK[1]: "Al2O3,8\nSr(AlH)2,4\n",
    BULK[2]: "ZnS7,not a number\n",
    GAP[0]: "AgCl,3.2\nGeO2,5\nAuCu,0.0\nMgO,0.0\nMgO,7\nNaCl,0.5\nZnS7,not a number\n",
}


def reader(tables: dict[str, str]) -> Read:
    def read(package: Package, member: str) -> bytes:
        assert package == CRABNET
        return f"formula,target\n{tables[member]}".encode()

    return read


def answers(items: list[Item], task: str) -> dict[str, str]:
    return {item.key: item.answer for item in items if item.task == task}


def test_thirds_are_those_of_free_rows_and_a_mean_counts_once() -> None:
    assert is_reserved("S7Zn") or is_reserved("ZnS7"), "its value would not be read as a number"
    items = list(read_materials(reader(TABLES)))
    bulk = {"AgAu2S2": "low", "ClNa": "low", "Al2H2Sr": "medium", "MgO": "medium", "Al2O3": "high", "GeO2": "high"}
    assert answers(items, "bulk") == bulk | {"S7Zn": ""}
    assert [item.key for item in items if item.task == "bulk"].count("GeO2") == 1


def test_reserved_rows_are_marked_and_have_no_answer() -> None:
    hidden = [item for item in read_materials(reader(TABLES)) if item.reserved]
    assert [(item.task, item.key, item.answer) for item in hidden] == [
        ("metal", "S7Zn", ""),
        ("bulk", "S7Zn", ""),
        ("gap", "S7Zn", ""),
    ]


def test_a_reserved_row_is_known_by_its_key_or_any_spelling() -> None:
    by_spelling = next(f"Ge{n}O{n}" for n in range(2, 200) if is_reserved(f"Ge{n}O{n}"))
    by_key = next(f"O{n}Ge" for n in range(2, 200) if is_reserved(f"GeO{n}") and not is_reserved(f"O{n}Ge"))
    tables = TABLES | {METAL[0]: f"{by_spelling},not a number\nGeO,0\n{by_key},not a number\n"}
    found = [item for item in read_materials(reader(tables)) if item.task == "metal"]
    assert [item.reserved for item in found] == [True, True]
    assert not is_reserved("GeO")
    assert found[0].other_keys == tuple(sorted(("GeO", by_spelling)))


def test_what_a_row_is() -> None:
    items = {(item.task, item.key): item for item in read_materials(reader(TABLES))}
    assert items["bulk", "AgAu2S2"] == Item("bulk", "Ag(AuS)2", "low", "AgAu2S2", "Ag-Au-S", other_keys=("Ag(AuS)2",))
    assert items["metal", "AuCu"].other_keys == ("Au2Cu2", "AuCu")


def test_contradicting_measurements_are_dropped() -> None:
    kept, dropped = clean(read_materials(reader(TABLES)))
    assert answers(kept, "metal") == {"AgCl": "no", "Fe2O3": "no", "AuCu": "yes"}
    assert dropped == {"reserved": 3, "contradicting": 2, "repeated": 0}


def test_only_what_always_had_a_gap_is_asked_how_wide_it_is() -> None:
    items = list(read_materials(reader(TABLES)))
    assert answers(items, "gap") == {"ClNa": "narrow", "AgCl": "medium", "GeO2": "wide", "S7Zn": ""}


def test_answers_are_those_of_the_tasks() -> None:
    kept, _ = clean(read_materials(reader(TABLES)))
    assert {item.task for item in kept} == set(DOMAIN.tasks)
    for item in kept:
        assert item.answer in DOMAIN.tasks[item.task].answers
