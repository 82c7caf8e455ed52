import pytest
from hypothesis import given
from hypothesis import strategies as st

from dr_cloud.model.errors import DamagedError
from dr_cloud.model.ids import Scope
from dr_cloud.store import layout
from dr_cloud.store.store import check_key

SCOPE = Scope("acme", "erp", "dc1")
NUMBERS = st.integers(0, layout.NUMBER_MAX)


def test_keys_are_those_of_the_docstring():
    keys = [
        layout.writer_key(SCOPE, 3),
        layout.journal_key(SCOPE, 3, 42),
        layout.keyframe_key(SCOPE, 128, 3),
        layout.checkpoint_key(SCOPE, 128),
    ]
    for key in keys:
        assert check_key(key) in (layout.__doc__ or "").split()


@given(NUMBERS, NUMBERS)
def test_every_key_parses_back(first, second):
    assert layout.parse_writer_key(layout.writer_key(SCOPE, first)) == first
    assert layout.parse_journal_key(layout.journal_key(SCOPE, first, second)) == (first, second)
    assert layout.parse_keyframe_key(layout.keyframe_key(SCOPE, first, second)) == (first, second)
    assert layout.parse_checkpoint_key(layout.checkpoint_key(SCOPE, first)) == first


@given(NUMBERS, NUMBERS)
def test_keys_sort_as_numbers_do(first, second):
    assert (layout.checkpoint_key(SCOPE, first) < layout.checkpoint_key(SCOPE, second)) == (first < second)
    assert (layout.keyframe_key(SCOPE, first, 1) < layout.keyframe_key(SCOPE, second, 1)) == (first < second)


def test_every_key_lies_in_its_folder_and_the_folders_are_apart():
    folders = {
        layout.writer_prefix(SCOPE): layout.writer_key(SCOPE, 1),
        layout.journal_prefix(SCOPE): layout.journal_key(SCOPE, 1, 1),
        layout.keyframe_prefix(SCOPE): layout.keyframe_key(SCOPE, 1, 1),
        layout.checkpoint_prefix(SCOPE): layout.checkpoint_key(SCOPE, 1),
    }
    for folder, key in folders.items():
        assert [other for other in folders if key.startswith(other)] == [folder]
        assert key.startswith(f"{SCOPE.prefix}/")


@pytest.mark.parametrize("number", [-1, layout.NUMBER_MAX + 1])
def test_a_number_that_would_not_sort_is_refused(number):
    with pytest.raises(ValueError, match="ten digits"):
        layout.checkpoint_key(SCOPE, number)


@pytest.mark.parametrize(
    "key", ["acme/erp/dc1/checkpoints/12.ckpt", "acme/erp/dc1/checkpoints/0000000012.ckpt.bak", "x", ""]
)
def test_a_foreign_key_is_named(key):
    with pytest.raises(DamagedError, match="not a key of this folder"):
        layout.parse_checkpoint_key(key)
