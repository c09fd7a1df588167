"""What YAML may hold, against a count of the values that a plain loader makes of it."""

import pytest
import yaml

from elastic_lightning import bounded_yaml
from elastic_lightning.bounded_yaml import BoundsError, check_bounds

DOCUMENTS = [
    "1",
    "a: {b: [1, 2, {c: d}], e: []}",
    "a: &x [1, [2]]\nb: [*x, *x]\nc: &y {d: *x}\ne: [[*y], *y]",
    "base: &b {k: v}\nc: {<<: *b, l: [*b]}",
    "- &x [[[1]]]\n- [[*x]]",
]


def values(thing):
    """How many values one meets on a walk, keys too."""
    if isinstance(thing, dict):
        return 1 + sum(values(key) + values(value) for key, value in thing.items())
    return 1 + sum(map(values, thing)) if isinstance(thing, list) else 1


def loaded(text):
    """By a plain loader, to which a merge key is a key: so it stays where it is written."""
    return yaml.safe_load(text.replace("<<:", "'<':"))


@pytest.mark.parametrize("text", DOCUMENTS)
def test_values_are_those_of_a_walk(text, monkeypatch):
    monkeypatch.setattr(bounded_yaml, "LARGEST", values(loaded(text)))
    check_bounds(text)
    monkeypatch.setattr(bounded_yaml, "LARGEST", values(loaded(text)) - 1)
    with pytest.raises(BoundsError, match="values"):
        check_bounds(text)


@pytest.mark.parametrize(("text", "depth"), [("[[1]]", 3), ("a: &x {b: [c]}\nd: [[*x]]", 6), ("1", 1), ("[[]]", 2)])
def test_levels(text, depth, monkeypatch):
    monkeypatch.setattr(bounded_yaml, "DEEPEST", depth)
    check_bounds(text)
    monkeypatch.setattr(bounded_yaml, "DEEPEST", depth - 1)
    with pytest.raises(BoundsError, match="levels"):
        check_bounds(text)


def test_other_mistakes_are_left_to_the_loader():
    check_bounds("a: *nowhere")
    with pytest.raises(yaml.YAMLError):
        check_bounds("a: [1")
