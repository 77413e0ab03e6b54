"""Word replacement: what is masked and replaced, by what, and that draws depend on seed and id alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast

from taskkd.errors import DataError, TaskkdError
from taskkd.nlp.word_replacement import STOP_WORDS, WordReplacement
from taskkd.nlp.word_vectors import WordVectors, word_marker

TEXT = "[PAD] [UNK] [CLS] [SEP] [MASK] film plot scene great lovely dull ##ness ##ly slow , . is a the very"
PIECES = TEXT.split()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    core = Tokenizer(models.WordPiece({p: i for i, p in enumerate(PIECES)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep", "mask")}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=32, model_input_names=names, **special)


class Guesses(nn.Module):
    """A masked LM with the same guesses everywhere, which keeps what it is shown."""

    def __init__(self, *best: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=32)
        self.logits = torch.zeros(len(PIECES))
        for rank, piece in enumerate(best):
            self.logits[PIECES.index(piece)] = 10.0 - rank
        self.seen: list[dict[str, Any]] = []

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        assert not self.training
        self.seen += [
            {"pieces": [PIECES[i] for i in ids[: sum(mask)]], "types": types[: sum(mask)]}
            for ids, mask, types in zip(
                input_ids.tolist(), attention_mask.tolist(), token_type_ids.tolist(), strict=True
            )
        ]
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def words(count: int, dim: int = 8) -> WordVectors:
    """Random vectors for `zak`, `zbk`, ..."""
    torch.manual_seed(0)
    return WordVectors({f"z{'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10]}": torch.randn(dim) for i in range(count)})


def test_the_masked_lm_sees_the_masked_text_and_the_text(tokenizer: Any) -> None:
    mlm = Guesses("great", "##ly", "[SEP]", "lovely")
    replace = WordReplacement(mlm, tokenizer, p=1.0, n=40, k=4)
    (copies,) = replace.texts(["The film is very dull."])
    # "the", "is" and "very" are stop words; "." is no word
    assert [" ".join(s["pieces"]) for s in mlm.seen] == [
        "[CLS] the [MASK] is very dull . [SEP] the film is very dull . [SEP]",
        "[CLS] the film is very [MASK] . [SEP] the film is very dull . [SEP]",
    ]
    assert mlm.seen[0]["types"] == [0] * 8 + [1] * 7
    # pieces inside words and special ones are no candidates; the original is first, no copy comes twice
    assert copies[0] == "The film is very dull."
    assert sorted(copies[1:]) == [f"The {a} is very {b}." for a in ("great", "lovely") for b in ("great", "lovely")]


def test_words_of_several_pieces_take_their_vectors(tokenizer: Any) -> None:
    vectors = WordVectors({"dullness": [1.0, 0.0], "boredom": [1.0, 0.1], "joy": [0.0, 1.0], "film": [1.0, 0.05]})
    mlm = Guesses("plot")
    (copies,) = WordReplacement(mlm, tokenizer, vectors=vectors, p=1.0, k=1).texts(["film dullness"])
    assert copies == ["film dullness", "plot film"]
    (copies,) = WordReplacement(mlm, tokenizer, p=1.0, k=1).texts(["film dullness"])
    assert copies == ["film dullness", "plot dullness"]  # without vectors they stay
    (copies,) = WordReplacement(vectors=vectors, p=1.0, k=1).texts(["film dullness"])
    assert copies == ["film dullness", "boredom film"]  # without a masked LM all words take theirs
    (copies,) = WordReplacement(Guesses("##ly"), tokenizer, vectors=vectors, p=1.0, k=1).texts(["film"])
    assert copies == ["film"]  # asked, and nothing usable: no second source


def test_tables_are_asked_in_order_and_capitals_are_kept() -> None:
    first = WordVectors({"good": [1.0], "fine": [1.0]})
    second = WordVectors({"good": [1.0], "bad": [1.0], "film": [1.0]})
    replace = WordReplacement(vectors=[first, second], p=1.0, k=1)
    assert list(replace.texts(["Good  FILM, 2 the café"])) == [["Good  FILM, 2 the café", "Fine  GOOD, 2 the café"]]


def test_each_word_is_replaced_with_probability_p() -> None:
    vectors = words(100)
    text = " ".join(vectors.words)
    (copies,) = WordReplacement(vectors=vectors, p=0.4, n=50, k=15).texts([text])
    assert len(copies) == 51
    changed = [
        [i for i, (a, b) in enumerate(zip(vectors.words, copy.split(), strict=True)) if a != b] for copy in copies[1:]
    ]
    # 5,000 draws: 0.4 with a standard error of 0.007
    assert sum(map(len, changed)) / 5000 == pytest.approx(0.4, abs=0.03)
    # every one of the 15 candidates of a word comes up: 20 times in 50 copies, about
    near = vectors.nearest([vectors.words[0]], 15)[0]
    (many,) = WordReplacement(vectors=vectors, p=1.0, n=300, k=15).texts([vectors.words[0]])
    assert set(many[1:]) == set(near)


def test_draws_depend_on_seed_and_id_alone(tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(PIECES), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    mlm = BertForMaskedLM(config)
    texts = ["The film is dull.", "a lovely, slow plot", "great", "scene, scene, scene plot film slow"] * 30
    ids = list(range(100, 100 + len(texts)))

    def copies(order: list[int], **options: Any) -> dict[int, list[str]]:
        replace = WordReplacement(mlm, tokenizer, p=0.6, n=5, k=6, **options)
        own = [ids[i] for i in order]
        return dict(zip(own, replace.texts([texts[i] for i in order], own), strict=True))

    straight = copies(list(range(len(texts))))
    state = torch.get_rng_state()
    assert copies(list(reversed(range(len(texts)))), batch_tokens=40) == straight
    assert torch.equal(torch.get_rng_state(), state)
    assert copies([7])[107] == straight[107]
    assert straight[100] != straight[104]  # the same text under another id
    assert copies(list(range(len(texts))), seed=1) != straight
    # more copies begin with the same ones
    (fewer,), (more,) = (WordReplacement(vectors=words(30), n=n).texts(["zak zbk zck"]) for n in (3, 9))
    assert more[: len(fewer)] == fewer


def test_pairs_change_one_column_at_a_time(tokenizer: Any) -> None:
    mlm = Guesses("great", "lovely", "slow")
    pair = ("the film", "the plot is dull")
    (found,) = WordReplacement(mlm, tokenizer, p=0.8, n=6, k=3).pairs([pair])
    assert found[0] == pair
    assert all((a == pair[0]) != (b == pair[1]) for a, b in found[1:])
    assert {a == pair[0] for a, b in found[1:]} == {True, False}
    same = WordReplacement(mlm, tokenizer, p=0.8, n=6, k=3)
    mlm.seen.clear()
    list(same.pairs([("the film", f"the plot {i}") for i in "abc"]))
    assert len(mlm.seen) == 1 + 3  # the first text, which all pairs share, is asked for once
    assert same.count(["the film", "the film", "dull plot dullness"]) == 3


def test_texts_longer_than_the_masked_lm_keep_their_ends(tokenizer: Any) -> None:
    text = " ".join(["film"] * 40)
    (copies,) = WordReplacement(Guesses("plot"), tokenizer, p=1.0, n=1, k=1).texts([text])
    changed = copies[1].split()
    assert changed[:10] == ["plot"] * 10
    assert changed[-10:] == ["film"] * 10


def test_byte_level_pieces_are_words_where_they_start_one() -> None:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    core.train_from_iterator(
        ["a film a film filmfilm café"] * 9,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, mask_token="<mask>", pad_token="<pad>")
    assert word_marker(tokenizer) == "Ġ"
    replace = WordReplacement(Guesses(), tokenizer)
    pieces = ["Ġfilm", "film", "ĠcafÃ©", "<mask>"]
    assert [replace._name(tokenizer.convert_tokens_to_ids(p)) for p in pieces] == ["film", None, "café", None]
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
    )
    assert {"film", "a"} <= set(WordVectors.of_model(model, tokenizer).words)


def test_bad_options_are_sentences(tokenizer: Any) -> None:
    for options, sentence in (
        ({}, "a masked LM, word vectors, or both"),
        ({"mlm": Guesses()}, "of the fast kind"),
        ({"vectors": words(3), "p": 1.5}, r"p must be in \[0, 1\]"),
        ({"vectors": words(3), "n": 0}, "n and k at least 1"),
    ):
        with pytest.raises(TaskkdError, match=sentence):
            WordReplacement(**options)


def test_stop_words_are_lower_case_words() -> None:
    assert {"the", "not", "don", "t"} <= STOP_WORDS
    assert all(w.isalpha() and w.islower() for w in STOP_WORDS)


# ---- word vectors


def test_nearest_is_by_cosine_without_the_word_itself() -> None:
    vectors = words(60)
    matrix = torch.nn.functional.normalize(vectors._matrix, dim=1)
    for word in vectors.words[:5]:
        row = vectors.words.index(word)
        order = (matrix @ matrix[row]).argsort(descending=True).tolist()
        assert vectors.nearest([word], 7)[0] == [vectors.words[i] for i in order if i != row][:7]
    long = WordVectors({"x": [9.0, 0.0], "y": [0.1, 0.0], "z": [5.0, 5.0], "o": [0.0, 0.0]})
    assert long.nearest(["x", "none", "o"], 9)[:2] == [["y", "z", "o"], []]  # length does not matter; 0 is no error
    assert "x" in long
    assert len(long) == 4


def test_a_glove_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "glove.txt"
    path.write_text("the 1 0\ngood 0.5 1e-1\n. . . 0 1\ncafé 1 1\n", encoding="utf-8")
    assert WordVectors.read(path).words == ["the", "good", ". . .", "café"]
    assert WordVectors.read(path, limit=2).words == ["the", "good"]
    path.write_text("2 3\nthe 1 0 0\ngood 0 1 0\n")
    assert WordVectors.read(path).words == ["the", "good"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("the 1 0\ngood 1\n", r"line 2: expected a word and 2 finite numbers"),
        ("the 1 0\ngood 1 x\n", r"line 2: expected a word and 2 finite numbers"),
        ("the 1 0\ngood 1 nan\n", r"line 2: expected a word and 2 finite numbers"),
        ("", "has no word vectors"),
    ],
)
def test_bad_vectors_end_in_a_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "v.txt").write_text(content)
    with pytest.raises(DataError, match=sentence):
        WordVectors.read(tmp_path / "v.txt")
    with pytest.raises(DataError, match=r"none\.txt: No such file"):
        WordVectors.read(tmp_path / "none.txt")
    with pytest.raises(DataError, match="needs a word"):
        WordVectors({})
    with pytest.raises(DataError, match=r"vector of 'b' has shape \(2,\), others \(1,\)"):
        WordVectors({"a": [1.0], "b": [1.0, 2.0]})


def test_a_models_own_embeddings(tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(PIECES), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    )
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[PIECES.index("lovely")] = 2 * rows[PIECES.index("great")]
    vectors = WordVectors.of_model(model, tokenizer)
    assert set(vectors.words) == {"film", "plot", "scene", "great", "lovely", "dull", "slow", "is", "a", "the", "very"}
    assert vectors.nearest(["great"], 1) == [["lovely"]]
