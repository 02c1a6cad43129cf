"""What users hand over becomes forward passes without padding."""

import pytest
import torch

from goatviz.analysis.inputs import forward_calls

IDS = torch.arange(12).view(3, 4)


def test_tensors_and_sequences_of_them():
    (one,) = forward_calls(IDS)
    assert one is IDS
    first, second = forward_calls([IDS[0], IDS])
    assert first.shape == (1, 4) and second.shape == (3, 4)


def test_padded_rows_come_alone_and_cut():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]])
    calls = list(forward_calls({"input_ids": IDS, "attention_mask": mask, "scale": 2}))
    assert [call["input_ids"].tolist() for call in calls] == [
        [[0, 1, 2, 3]],
        [[6, 7]],
        [[8, 9, 10]],
    ]
    assert all(set(call) == {"input_ids", "scale"} for call in calls)
    full = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert list(forward_calls(full)) == [full]


@pytest.mark.parametrize("name", ["attention_mask", "padding_mask"])
def test_what_belongs_to_a_row_comes_with_it(name):
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]])
    given = {
        "input_ids": IDS,
        name: mask.bool(),
        "position_ids": torch.arange(4).unsqueeze(0),
        "embeds": torch.randn(3, 4, 2),
        "pixels": torch.randn(3, 5, 2),
        "labels": torch.arange(3),
        "scale": torch.tensor(2.0),
        "names": ["a", "b", "c"],
    }
    calls = list(forward_calls(given))
    assert [call["input_ids"].tolist() for call in calls] == [[[0, 1, 2, 3]], [[4, 5]], [[9, 11]]]
    assert [call["position_ids"].tolist() for call in calls] == [[[0, 1, 2, 3]], [[0, 1]], [[1, 3]]]
    for row, call in enumerate(calls):
        real = mask[row].bool()
        assert torch.equal(call["embeds"], given["embeds"][row : row + 1, real])
        assert torch.equal(call["pixels"], given["pixels"][row : row + 1])
        assert call["labels"].tolist() == [row]
        assert call["scale"] is given["scale"] and call["names"] is given["names"]
        assert name not in call


def test_masks_of_pairs_and_sequences_of_mappings_are_left_as_they_are():
    pairs = {"x": torch.randn(1, 4, 2), "attention_mask": torch.zeros(1, 1, 4, 4)}
    (call,) = forward_calls(pairs)
    assert call == pairs
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    padded = {"input_ids": IDS, "attention_mask": mask}
    lengths = [call["input_ids"].shape for call in forward_calls([padded, {"input_ids": IDS}])]
    assert lengths == [(1, 4), (1, 4), (1, 3), (3, 4)]


def test_texts_go_through_the_tokenizer():
    def tokenizer(text, return_tensors):
        assert return_tensors == "pt"
        return {"input_ids": torch.tensor([[ord(c) for c in text]])}

    for texts in ("ab", ["ab"]):
        (call,) = forward_calls(texts, tokenizer)
        assert call["input_ids"].tolist() == [[97, 98]]
    with pytest.raises(TypeError, match="inputs are texts: pass tokenizer="):
        list(forward_calls("ab"))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (None, TypeError, "inputs must be given"),
        (3, TypeError, "inputs must be a Tensor, a mapping.*got int"),
        ([], TypeError, "got nothing"),
        ([3], TypeError, "inputs must hold Tensors, mappings or texts, got int"),
        (iter("ab"), TypeError, "got str_.*iterator"),
        ([torch.zeros(())], ValueError, r"batch first.*got \(\)"),
        ([torch.zeros(0)], ValueError, r"batch first.*got \(1, 0\)"),
        (torch.zeros(3), ValueError, r"batch first.*got \(3,\)"),
        (torch.zeros(0, 3), ValueError, "batch first"),
        (
            {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)},
            ValueError,
            "attention_mask hides every token of row 0",
        ),
    ],
)
def test_bad_inputs_are_named(inputs, error, message):
    with pytest.raises(error, match=message):
        list(forward_calls(inputs))
