"""Numbers and labels of categories go over into each other, and a wrong list is refused."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from panoptic_files import CATEGORIES

from crbp.data.panoptic import Categories, DataError


def test_labels_are_places_in_the_list():
    known = Categories(CATEGORIES)
    assert (known.things, known.stuff) == ((7, 3), (90, 91))
    assert [known.thing_label(id) for id in known.things] == [0, 1]
    assert [known.semantic_label(id) for id in known.stuff] == [1, 2]
    assert {known.semantic_label(id) for id in known.things} == {0}
    assert (known.name(91), known.colour(3), known.isthing(7), known.isthing(90)) == ("sea", (10, 200, 10), True, False)
    things, semantic = known.labels(np.array([91, 3, 7]))
    assert things.tolist() == [-1, 1, 0]
    assert semantic.tolist() == [2, 0, 0]


def test_the_json_form_and_a_pickle_make_an_equal_value(tmp_path):
    known = Categories(CATEGORIES)
    assert known.as_json() == [{**each, "color": list(each["color"])} for each in CATEGORIES]
    assert Categories(known.as_json()) == known == pickle.loads(pickle.dumps(known))
    for content in (CATEGORIES, {"categories": CATEGORIES}):
        (tmp_path / "c.json").write_text(json.dumps(content))
        assert Categories.read(tmp_path / "c.json") == known
    assert Categories.read(CATEGORIES) == known


@pytest.mark.parametrize("isthing", [0, 1])
def test_a_set_of_one_kind_alone_is_allowed(isthing):
    known = Categories([{**each, "isthing": isthing} for each in CATEGORIES])
    assert (len(known.things), len(known.stuff)) == ((4, 0) if isthing else (0, 4))


def test_colours_are_made_up_where_there_is_none():
    known = Categories({"id": k, "name": str(k), "isthing": 1} for k in range(20))
    colours = [known.colour(k) for k in range(20)]
    assert len(set(colours)) == 20
    assert all(64 <= value <= 255 for colour in colours for value in colour)


CAT = {"id": 1, "name": "cat", "isthing": 1}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "there is no category"),
        ([CAT, {**CAT, "name": "dog"}], "the id 1 belongs to both 'cat' and 'dog'"),
        ([CAT, {**CAT, "id": 2}], "the name 'cat' belongs to both 1 and 2"),
        ([{"id": 1, "isthing": 1}], "lacks 'name'"),
        ([{"name": "cat"}], "lacks 'id', 'isthing'"),
        ([{**CAT, "id": "1"}], "id '1', not a whole number"),
        ([{**CAT, "id": -1}], "id -1"),
        ([{**CAT, "name": ""}], "name ''"),
        ([{**CAT, "isthing": 2}], "isthing 2, not 0 or 1"),
        ([{**CAT, "color": [1, 2]}], r"color \[1, 2\]"),
        ([{**CAT, "color": [1, 2, 256]}], "three whole numbers"),
        (["cat"], "is 'cat', not a dict"),
        ([{"id": k, "name": str(k), "isthing": 0} for k in range(255)], "255 kinds of stuff"),
    ],
)
def test_a_wrong_list_is_refused(entries, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Categories(entries)
    (tmp_path / "c.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match=rf"c.json: .*{words}"):
        Categories.read(tmp_path / "c.json")


def test_a_file_without_categories_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none.json: cannot be read as JSON"):
        Categories.read(tmp_path / "none.json")
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(DataError, match=r"c.json: holds no list of categories"):
        Categories.read(tmp_path / "c.json")


def test_an_unknown_number_is_an_error_and_stuff_has_no_thing_label():
    known = Categories(CATEGORIES)
    for ask in (known.name, known.colour, known.isthing, known.semantic_label, known.thing_label):
        with pytest.raises(ValueError, match="8 is no category of this set; it has 7, 90, 3, 91"):
            ask(8)
    with pytest.raises(ValueError, match=r"90 \(sky\) is stuff"):
        known.thing_label(90)
    assert 7 in known
    assert 8 not in known
