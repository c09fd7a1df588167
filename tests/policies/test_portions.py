"""Rows in portions: halved where memory does not suffice, and never again as large."""

import pytest
import torch

from elastic_lightning.errors import UserError
from elastic_lightning.policies.portions import Portions, out_of_memory

CPU = "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError(CPU), MemoryError()]


class Small:
    """Doubles rows 0..n-1, up to `capacity` at a time; keeps the sizes it was asked for."""

    def __init__(self, capacity, error=ERRORS[0]):
        self.capacity, self.error, self.sizes = capacity, error, []

    def __call__(self, rows):
        size = rows.stop - rows.start
        self.sizes.append(size)
        if size > self.capacity:
            raise self.error
        return [2 * row for row in range(rows.start, rows.stop)]


def flat(parts):
    return [row for part in parts for row in part]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("size", [None, 16, 5])
def test_every_row_once_in_order_whatever_fits(error, size):
    for capacity in (1, 3, 7, 16):
        for rows in (1, 6, 16, 21):
            portions, small = Portions(size, "a test"), Small(capacity, error)
            with pytest.warns(UserWarning) if min(size or rows, rows) > capacity else _nothing():
                assert flat(portions.run(small, rows)) == [2 * row for row in range(rows)]


def test_the_choice_is_remembered():
    portions, small = Portions(None, "a test"), Small(4)
    with pytest.warns(UserWarning, match="out of memory in a test: 4 rows at a time"):
        portions.run(small, 16)
    assert small.sizes == [16, 8, 4, 4, 4, 4] and portions.size == 4
    small.sizes.clear()
    portions.run(small, 16)
    assert small.sizes == [4, 4, 4, 4]


def test_a_row_that_does_not_fit_is_the_users_to_mend():
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"out of memory in a test, for a single row"):
        Portions(None, "a test").run(Small(0), 4)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"):
        Portions(None, "a test").run(Small(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied")), 4)


def test_a_fixed_size_stays():
    portions, small = Portions(None, "a test"), Small(4)
    portions.fixed = True
    with pytest.raises(torch.OutOfMemoryError):
        portions.run(small, 16)
    assert small.sizes == [16]


def test_the_allocator_of_this_torch_is_understood():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(error.value)


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False
