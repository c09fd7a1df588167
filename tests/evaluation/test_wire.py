"""Values between the program and its judge."""

import collections
import enum
import math
import os

import pytest

from elastic_lightning.evaluation.jail import wire

VALUES = [
    None,
    True,
    -3,
    10**400,
    0.1,
    math.inf,
    2 - 1j,
    "naïve\n\ud800",
    b"\x00\xff",
    [],
    [1, [2.0, (3,)]],
    (),
    ("a", ["b"]),
    {1, "a", (2, 3)},
    frozenset({1}),
    {"tuple": [1], 2: {"set": None}, (1, 2): {}},
    range(1, 9, 3),
    collections.deque([1, (2,)]),
]


def through(value):
    """A value after its way through a pipe."""
    near, far = os.pipe()
    wire.send(far, wire.encode(value))
    os.close(far)
    [message] = wire.receive(near)
    os.close(near)
    return wire.decode(message)


@pytest.mark.parametrize("value", VALUES, ids=[f"{index} {type(value).__name__}" for index, value in enumerate(VALUES)])
def test_values_come_back(value):
    assert through(value) == value
    assert repr(through(value)) == repr(value)  # the same types too


def test_what_derives_from_plain_values():
    class Number(enum.IntEnum):
        ONE = 1

    class Text(str):
        def __str__(self):
            return "another"

    cases = [
        (Number.ONE, 1),
        (Text("a"), "a"),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.namedtuple("Pair", "a b")(1, 2), (1, 2)),
        ({1: 2}.keys(), {1}),
        (collections.UserList([1]), [1]),
    ]
    for value, expected in cases:
        assert repr(through(value)) == repr(expected)
    assert math.isnan(through(math.nan))


ITERABLES = {  # what makes one, and the same in a program
    "generator": "(i for i in (1, 2))",
    "map": "map(int, (1, 2))",
    "iterator": "iter([1, 2])",
    "values": "{3: 1, 4: 2}.values()",
    "array": "__import__('array').array('i', [1, 2])",
    "deque": "__import__('collections').deque([1, 2])",
    "range": "range(1, 3)",
    "list": "[1, 2]",
    "tuple": "(1, 2)",
}


@pytest.mark.parametrize("source", ITERABLES.values(), ids=ITERABLES)
def test_an_iterable_equals_what_it_equals_in_python(source):
    """Python itself says so; and what is in it comes out of it."""
    for other in ((1, 2), [1, 2], range(1, 3), collections.deque([1, 2])):
        assert (through(eval(source)) == other) == (eval(source) == other)
    assert list(through(eval(source))) == [1, 2]
    assert hasattr(through(eval(source)), "__len__") == hasattr(eval(source), "__len__")


def test_what_can_act_stays_behind():
    for value in (object(), print, int, [object()], {"a": lambda: 1}):
        with pytest.raises(TypeError, match="no plain value"):
            wire.encode(value)


@pytest.mark.parametrize("message", [{"object": []}, {}, {"tuple": [], "set": []}, {"set": [[]]}, {"dict": [1]}])
def test_foreign_messages_are_errors(message):
    with pytest.raises((KeyError, TypeError, ValueError)):
        wire.decode(message)


def test_lines_are_put_together():
    near, far = os.pipe()
    os.write(far, b'[1]\n[2]\n{"tup')
    received = wire.receive(near)
    assert [next(received), next(received)] == [[1], [2]]
    os.write(far, b'le": []}\n')
    assert next(received) == {"tuple": []}
    os.close(far)
    assert list(received) == []
    os.close(near)
