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
        ([3], TypeError, "inputs hold a int"),
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
