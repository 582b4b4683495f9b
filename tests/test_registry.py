"""Parts by exact name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medm.connectors import CONNECTORS
from medm.errors import MedmError, RecipeError, UnknownNameError
from medm.registry import Registry, load_plugin


def registry() -> Registry[Any]:
    made: Registry[Any] = Registry("fruit", group="medm.tests.none")
    made.add("apple", "medm.errors:MedmError", "round")
    made.add("banana", "medm.nowhere:Banana", "bent")
    return made


def test_members_are_imported_only_when_asked_for() -> None:
    fruits = registry()
    assert fruits.names() == ["apple", "banana"]
    assert [entry.summary for entry in fruits.entries()] == ["round", "bent"]
    assert fruits.get("apple") is MedmError
    with pytest.raises(ModuleNotFoundError):
        fruits.get("banana")


def test_names_are_exact_and_unknown_ones_get_the_nearest() -> None:
    fruits = registry()
    with pytest.raises(
        UnknownNameError,
        match=r"unknown fruit 'aple': did you mean 'apple'\? \(known: apple, banana\)",
    ):
        fruits.get("aple")
    assert "appl" not in fruits, "a part of a name is not the name"
    with pytest.raises(UnknownNameError, match=r"unknown fruit 'zzz' \(known: apple, banana\)"):
        fruits.entry("zzz")


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        ({"name": "mlp", "dept": 3}, {}, r"connector 'mlp' does not take .*'dept'.*a later medm"),
        ({"name": "mlp"}, {"in_dim": 4, "out_dim": 4}, r"connector 'mlp' does not take .*'grid'"),
        ({"name": "mpl"}, {}, r"unknown connector 'mpl': did you mean 'mlp'"),
        ({"depth": 3}, {}, r"unknown connector ''"),
    ],
)
def test_a_config_that_a_part_does_not_take_is_refused(
    config: dict[str, Any], sizes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        CONNECTORS.constructor(config, **(sizes or {"in_dim": 4, "out_dim": 8, "grid": (2, 2)}))


def test_a_constructor_constructs_anew_each_time_and_leaves_the_config_alone() -> None:
    config = {"name": "mlp", "depth": 1}
    make = CONNECTORS.constructor(config, in_dim=4, out_dim=8, grid=(2, 2))
    first, second = make(), make()
    assert first is not second
    assert (first.in_dim, first.out_dim, first.num_tokens) == (4, 8, 4)
    assert config == {"name": "mlp", "depth": 1}


def test_a_name_is_given_once() -> None:
    fruits = registry()
    with pytest.raises(RecipeError, match="fruit 'apple' is registered twice"):
        fruits.add("apple", MedmError, "again")


def test_temporary_members_are_forgotten() -> None:
    fruits = registry()
    with fruits.temporary():
        fruits.register("cherry", "red")(MedmError)
        assert fruits.get("cherry") is MedmError
    assert "cherry" not in fruits


def test_a_plug_in_file_adds_its_parts_once(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from medm.connectors import CONNECTORS\n"
        "@CONNECTORS.register('mine', 'a connector of my own')\n"
        "class Mine: ...\n"
    )
    with CONNECTORS.temporary():
        load_plugin(plugin)
        load_plugin(plugin)
        assert CONNECTORS.entry("mine").summary == "a connector of my own"
    with pytest.raises(RecipeError, match="no such file"):
        load_plugin(tmp_path / "gone.py")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            load_plugin(tmp_path / "broken.py")


def test_entry_points_of_other_packages_join(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    point = EntryPoint(name="papaya", value="medm.errors:DataError", group="medm.fruits")
    monkeypatch.setattr(
        "medm.registry.entry_points", lambda group: [point] if group == "medm.fruits" else []
    )
    fruits: Registry[Any] = Registry("fruit", group="medm.fruits")
    assert fruits.names() == ["papaya"]
    assert fruits.get("papaya").__name__ == "DataError"


def test_an_entry_point_can_be_a_module_that_registers_with_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from importlib.metadata import EntryPoint

    from medm.connectors import CONNECTORS

    (tmp_path / "someones_package.py").write_text(
        "from medm.connectors import CONNECTORS, MLPOptions\nCONNECTORS.add('theirs', "
        "'someones_package.code:Theirs', 'from elsewhere', options=MLPOptions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint(name="theirs", value="someones_package", group="medm.connectors")
    monkeypatch.setattr("medm.registry.entry_points", lambda group: [point])
    with CONNECTORS.temporary():
        monkeypatch.setattr(CONNECTORS, "_entry_points_read", False)
        assert "depth" in CONNECTORS.entry("theirs").options.model_fields
