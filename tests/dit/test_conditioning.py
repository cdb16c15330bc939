"""Conditions follow the batch: dropped, doubled, sliced, concatenated; labels become rows of a table."""

import pytest
import torch

from dit.conditioning import Condition, LabelEmbedding
from lvdm.errors import UserError


def test_dropping_nulls_the_masked_rows_only():
    condition = Condition.of_classes([4, 0, 2], 5)
    mask = torch.tensor([False, True, False])
    assert condition.drop(mask).labels.tolist() == [4, -1, 2]
    assert condition.labels.tolist() == [4, 0, 2]


def test_batching():
    condition = Condition.of_classes([4, 0, 2], 5)
    assert condition.cat(condition.null_like()).labels.tolist() == [4, 0, 2, -1, -1, -1]
    assert condition.to("meta").labels.device.type == "meta"


def test_labels_of_images_are_dropped_by_their_own_mask_and_follow_along():
    condition = Condition(torch.tensor([4, 0]), torch.tensor([[1, 2, 3], [0, 1, 2]]))
    dropped = condition.drop(torch.tensor([True, False]), torch.tensor([[False, True, False], [True, False, False]]))
    assert dropped.labels.tolist() == [-1, 0]
    assert dropped.image_labels.tolist() == [[1, -1, 3], [-1, 1, 2]]
    assert condition.null_like().image_labels.tolist() == [[-1] * 3] * 2
    assert condition.cat(dropped).image_labels.tolist() == [[1, 2, 3], [0, 1, 2], [1, -1, 3], [-1, 1, 2]]
    assert condition.to("meta").image_labels.device.type == "meta"
    with pytest.raises(TypeError):  # no mask for the images is a mistake, not a wish
        condition.drop(torch.tensor([True, False]))


def test_no_condition_follows_along_but_guides_nothing():
    none = Condition()
    assert none.drop(torch.tensor([True])) == none.cat(none) == none.to("meta") == none
    with pytest.raises(UserError, match="guidance scale to 1"):
        none.null_like()


@pytest.mark.parametrize("label", [-2, 5])
def test_a_label_outside_is_a_user_error(label):
    with pytest.raises(UserError, match=f"label {label} .*0..4"):
        Condition.of_classes([0, label], 5)


def test_labels_pick_rows_and_the_null_class_is_the_last():
    embedding = LabelEmbedding(num_classes=5, label_dropout=0.1, width=3)
    rows = embedding(torch.tensor([4, -1, 0]))
    assert torch.equal(rows, embedding.table.weight[[4, 5, 0]])


def test_without_label_dropout_there_is_no_null_class():
    embedding = LabelEmbedding(num_classes=5, label_dropout=0, width=3)
    assert embedding.table.weight.shape == (5, 3) and embedding(torch.tensor([4, 0])).shape == (2, 3)
    with pytest.raises(UserError, match=r"label -1: this model has no null class \(label_dropout=0\)"):
        embedding(torch.tensor([4, -1]))
