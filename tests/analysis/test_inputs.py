"""What users hand over becomes forward passes without padding."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from goatviz.analysis.inputs import forward_calls, piece_text, text_array, token_texts
from tests.factories import HOSTILE, TextTokenizer

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


# --- tokens as text ---

TEXT = "The quick — 🦊 é\n\tx·y 日"


def texts(tokenizer, text):
    return token_texts(tokenizer, torch.tensor([tokenizer(text)["input_ids"]]))


def byte_level():
    """A tokenizer of single bytes, with two tokens that were added."""
    vocab = {piece: n for n, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<|Ġ▁end|>"])
    tokenizer.add_tokens([AddedToken("Ġ é", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentence_piece():
    pieces = [("<unk>", 0.0), ("▁The", -1.0), ("▁", -2.0), ("quick", -2.0), ("Ġ", -3.0)]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_every_byte_reads_as_text_or_as_its_number():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    read = {piece_text(piece, byte_level=True) for piece in alphabet}
    ascii_text = {piece_text(chr(byte)) for byte in range(128)}
    assert read == ascii_text | {f"⟨{byte:02X}⟩" for byte in range(128, 256)}


def test_bytes_are_joined_within_a_piece_alone():
    tokenizer = byte_level()
    assert texts(tokenizer, " é\n")[:2] == ["␣", "⟨C3⟩"]
    assert texts(tokenizer, "a<|Ġ▁end|>\tĠ é") == ["a", "<|Ġ▁end|>", "⇥", "Ġ␣é"]
    (characters,) = (tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("é⟩⟨x🦊"),)
    whole = "".join(piece for piece, _ in characters)
    assert piece_text(whole, byte_level=True) == "é⟩⟨x🦊"
    # The last byte of the fox is missing, and the first of é.
    assert piece_text(whole[1:-1], byte_level=True) == "⟨A9⟩⟩⟨x⟨F0 9F A6⟩"


def test_sentence_pieces():
    tokenizer = sentence_piece()
    assert texts(tokenizer, "The quickĠ€") == ["␣The", "␣", "quick", "Ġ", "⟨E2⟩", "⟨82⟩", "⟨AC⟩"]


def test_smollm2_reads_as_its_text(smollm2):
    _, tokenizer = smollm2
    assert texts(tokenizer, TEXT) == [
        *["The", "␣quick", "␣—", "␣⟨F0 9F⟩", "⟨A6⟩", "⟨8A⟩", "␣é", "⏎", "⇥", "x", "·", "y"],
        *["␣⟨E6⟩", "⟨97⟩", "⟨A5⟩"],
    ]
    assert texts(tokenizer, "<|im_start|>user") == ["<|im_start|>", "user"]
    assert token_texts(tokenizer, torch.tensor([[17, 10**6]])) == ["!", "⟨id 1000000⟩"]


def test_other_objects_name_their_tokens():
    class Plain:
        def convert_ids_to_tokens(self, ids):
            return ["Ġa", "▁b", "c d", "##e", "<0x0A>", "\ud800\0\x1b\u202e"]

    names = token_texts(Plain(), torch.zeros(1, 6, dtype=torch.long))
    assert names == ["Ġa", "␣b", "c␣d", "##e", "⏎", "\ud800\0\x1b\u202e"]
    assert text_array(names)[-1] == "\\ud800\\x00\x1b\u202e"
    assert token_texts(object(), IDS) is None
    assert token_texts(Plain(), torch.zeros(1, 4, 8)) is None


def test_hostile_tokens_stay_text():
    names = token_texts(TextTokenizer(), torch.arange(len(HOSTILE))[None])
    visible = str.maketrans(" \n\t▁", "␣⏎⇥␣")
    assert names == [one.translate(visible) for one in HOSTILE]
