"""From texts and datasets on disk to blocks of tokens, and from tokens back to text."""

import math
import sys

import datasets
import numpy as np
import pyarrow
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retention.integrations.transformers.training.codec import ByteCodec, TokenCodec, load_codec
from retention.integrations.transformers.training.corpus import Blocks, read_corpus
from retention.integrations.transformers.training.texts import portions, read_texts, split

END = 0  # the tokenizer's end of a document
DOCUMENTS = [f"Text {n}: " + "round and round, né 😀\n" * (n % 7) for n in range(45)]


def tokens_of(blocks):
    """The whole blocks of a corpus, as one list."""
    return [token for i in range(len(blocks)) for token in blocks[i]["input_ids"].tolist()]


def expected(tokenizer, texts):
    """Each text's tokens and the end's, made one text at a time."""
    return [token for text in texts if text for token in [*tokenizer.encode(text, add_special_tokens=False), END]]


# --- text files -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_default_corpus_is_python_with_files_held_out():
    train, valid = read_texts()
    assert len(train) > 5_000_000
    assert 50_000 < len(valid) <= 100_000
    assert b"\ndef " in train
    assert b"\ndef " in valid
    first_held_out = valid.split(b"\0")[0]
    assert first_held_out not in train


def test_own_files_and_folders_are_taken_and_their_ends_held_out(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.txt").write_bytes(b"a" * 99)
    (tmp_path / "b.txt").write_bytes(b"b" * 199)
    train, valid = read_texts([tmp_path / "folder", tmp_path / "b.txt"])
    assert train == b"a" * 95 + b"b" * 190
    assert valid == b"a" * 4 + b"\0" + b"b" * 9 + b"\0"


def test_what_is_no_text_of_the_users_is_left_out(tmp_path):
    for name in (".git/objects/ab", "__pycache__/x.pyc", "run/training.json", "notes.txt", "weights.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\1\2" if name == "weights.bin" else name.encode())
    train, valid = read_texts([tmp_path], skip=tmp_path / "run")
    assert train + valid == b"notes.txt\0"
    with pytest.raises(ValueError, match="must hold at least one text; got none in .*weights.bin"):
        read_texts([tmp_path / "weights.bin"])


def test_no_character_is_cut():
    for length in range(30, 40):
        train, valid = split([b"x" * length + "é€😀".encode() * 9], validation_limit=10)
        assert train.decode() + valid.decode() == train.decode() + valid.decode(errors="replace")
        assert 6 < len(valid) <= 10


def test_portions_are_the_text_and_end_with_lines():
    text = "ab\ncd\n\0" + "x" * 25 + "\0" + "efg\n" * 5
    pieces = portions(text.encode(), size=10)
    assert "".join(pieces) == text
    assert pieces == ["ab\ncd\n\0", "x" * 10, "x" * 10, "x" * 5 + "\0", "efg\nefg\n", "efg\nefg\n", "efg\n"]


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_blocks_are_the_stream_whatever_its_pieces():
    chance = np.random.default_rng(0)
    stream = chance.integers(0, 1000, 103)
    for count in (0, 1, 30, 200):
        pieces = np.split(stream, sorted(chance.integers(0, 103, count)))
        blocks = Blocks("training", pieces, 10)
        assert len(blocks) == 10
        assert tokens_of(blocks) == stream[:100].tolist()
        assert blocks[3]["labels"].tolist() == stream[30:40].tolist()


def test_too_few_tokens_are_named():
    with pytest.raises(ValueError, match="validation part .* must hold at least context tokens; got 3, context 4"):
        Blocks("validation", [np.arange(2), np.arange(1)], 4, "tokens")


# --- codecs -----------------------------------------------------------------------------------------------------------


def test_bytes_are_read_as_they_come():
    new = "é€".encode()
    assert list(ByteCodec().text([], new)) == ["", "é", "", "", "€", ""]
    assert "".join(ByteCodec().text([], [65, 300, 66])) == "A\ufffdB"


def test_tokens_are_read_as_they_come(tokenizer):
    codec = TokenCodec(tokenizer)
    prompt, new = codec.prompt("7 squared"), codec.prompt(" is 49. né 😀€\n 8 squared")
    assert any("\ufffd" in tokenizer.decode([token]) for token in new)  # a character of several tokens
    pieces = list(codec.text(prompt, new))
    assert "".join(pieces) == " is 49. né 😀€\n 8 squared"
    assert len(pieces) > len(new) / 2
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(codec.text(prompt, new[:-1] + codec.prompt("😀")[:2])).endswith("\ufffd")  # never made whole


def test_words_are_read_with_their_spaces():
    """A decoder that joins words drops the space before the first, so a word must not be read alone."""
    words = {"<s>": 0, "▁one": 1, "▁two": 2, "s": 3}
    made = Tokenizer(models.BPE(words, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    codec = TokenCodec(PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>"))
    assert "".join(codec.text([1], [2, 3, 1])) == " twos one"


def test_a_document_ends_with_eos_or_else_bos_or_sep(bpe, tmp_path):
    made = lambda **names: PreTrainedTokenizerFast(tokenizer_object=bpe, **names)  # noqa: E731
    assert TokenCodec(made(eos_token="7", bos_token="8")).end == bpe.token_to_id("7")
    assert TokenCodec(made(sep_token="9", bos_token="8")).end == bpe.token_to_id("8")
    assert TokenCodec(made(sep_token="9")).end == bpe.token_to_id("9")
    with pytest.raises(ValueError, match="must have an eos token, to end documents with, or else a bos or sep token"):
        TokenCodec(made(pad_token="7"))
    specials = TokenCodec(made(bos_token="8", eos_token="7", pad_token="9")).specials
    assert specials == {
        f"{name}_token_id": bpe.token_to_id(x) for name, x in (("bos", "8"), ("eos", "7"), ("pad", "9"))
    }
    assert "pad_token_id" not in TokenCodec(made(eos_token="7", pad_token="7")).specials


def test_a_tokenizer_is_a_folder_or_a_file(bpe, tokenizer_folder, tmp_path):
    bpe.save(str(tmp_path / "alone.json"))
    (tmp_path / "bare").mkdir()
    bpe.save(str(tmp_path / "bare/tokenizer.json"))
    places = (tokenizer_folder, tmp_path / "alone.json", tmp_path / "bare")
    found = [load_codec(str(place)) for place in places]
    assert [(codec.end, codec.size) for codec in found] == [(END, bpe.get_vocab_size())] * 3
    assert len({codec.digest for codec in found}) == 1
    assert found[0].encode(["7 is\0", "8", ""]) == [[*bpe.encode("7 is").ids, END], bpe.encode("8").ids, []]
    with pytest.raises(ValueError, match="tokenizer must be a folder, .*'/no/such' cannot be loaded"):
        load_codec("/no/such")


# --- with a tokenizer -------------------------------------------------------------------------------------------------


def test_files_become_the_tokens_of_their_documents(tokenizer, tmp_path, monkeypatch):
    for n, document in enumerate(DOCUMENTS):
        (tmp_path / f"{n:02}.txt").write_text(document)
    files = sorted(tmp_path.glob("*.txt"))
    corpus = read_corpus(files, TokenCodec(tokenizer), 5)
    held_out = DOCUMENTS[::20]
    want = expected(tokenizer, [text for n, text in enumerate(DOCUMENTS) if n % 20])
    assert tokens_of(corpus.train) == want[: len(want) // 5 * 5]
    want = expected(tokenizer, held_out)
    assert tokens_of(corpus.valid) == want[: len(want) // 5 * 5]
    assert (corpus.unit, corpus.vocabulary) == ("tokens", len(tokenizer))
    size = sum(len(text.encode()) + 1 for text in held_out)  # an end is a byte, as it is without a tokenizer
    assert corpus.bytes_per_token == size / len(want)

    monkeypatch.setattr(TokenCodec, "encode", None)  # what is in the cache is not tokenised again
    assert tokens_of(read_corpus(files, TokenCodec(tokenizer), 5).valid) == tokens_of(corpus.valid)


def test_losses_are_named_by_what_they_are(text, tokenizer):
    loss = 1.5
    in_bytes = read_corpus([text], ByteCodec(), 16)
    assert in_bytes.report(loss) == f"validation 1.5000 nats, {1.5 / math.log(2):.4f} bits per byte"
    in_tokens = read_corpus([text], TokenCodec(tokenizer), 16)
    held_out = text.read_text()[(text.stat().st_size + 1) * 19 // 20 :]
    bits = loss * len(expected(tokenizer, [held_out])) / (len(held_out) + 1) / math.log(2)
    assert in_tokens.report(loss) == f"validation 1.5000 nats per token, perplexity 4.48, {bits:.4f} bits per byte"


def test_it_says_when_datasets_is_missing(text, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    read_corpus([text], ByteCodec(), 16)
    with pytest.raises(
        ImportError, match=r'needs the library datasets; pip install "multiscale-retention\[datasets\]"'
    ):
        read_corpus([text], TokenCodec(tokenizer), 16)


# --- saved datasets ---------------------------------------------------------------------------------------------------


def saved(folder, **splits):
    """splits: the columns of each; train alone is saved without a name."""
    made = {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}
    (made["train"] if list(made) == ["train"] else datasets.DatasetDict(made)).save_to_disk(folder)
    return [folder]


def test_a_dataset_with_splits(tokenizer, tmp_path, monkeypatch):
    texts = ["one", None, "", "two é " * 9]
    files = saved(tmp_path / "data", train={"body": DOCUMENTS, "id": range(45)}, test={"body": texts, "id": range(4)})
    before = sorted((tmp_path / "data").rglob("*"))
    corpus = read_corpus(files, TokenCodec(tokenizer), 3, column="body")
    for part, rows in ((corpus.train, DOCUMENTS), (corpus.valid, texts)):
        want = expected(tokenizer, rows)
        assert tokens_of(part) == want[: len(want) // 3 * 3]
    assert corpus.bytes_per_token == (4 + len(texts[3].encode()) + 1) / len(want)
    assert sorted((tmp_path / "data").rglob("*")) == before

    monkeypatch.setattr(TokenCodec, "encode", None)
    again = read_corpus(files, TokenCodec(tokenizer), 7, column="body")  # other blocks of the same tokens
    assert tokens_of(again.train)[:70] == tokens_of(corpus.train)[:70]
    assert again.digest == corpus.digest


def test_a_saved_dataset_is_not_read_into_memory(tmp_path):
    rows = datasets.Dataset.from_dict({"input_ids": [list(range(1000))] * 400})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "data")
    before = pyarrow.total_allocated_bytes()
    corpus = read_corpus([tmp_path / "data"], ByteCodec(), 50)
    assert corpus.train.tokens == corpus.valid.tokens == 400_000
    assert corpus.train[4321]["input_ids"].tolist() == list(range(50, 100))
    assert pyarrow.total_allocated_bytes() - before < 100_000


@pytest.mark.parametrize("codec", ["bytes", "tokens"])
@pytest.mark.parametrize("count", [3, 45])
def test_a_dataset_is_held_out_as_files_are(codec, count, tokenizer, tmp_path):
    codec = ByteCodec() if codec == "bytes" else TokenCodec(tokenizer)
    (tmp_path / "files").mkdir()
    for n, document in enumerate(DOCUMENTS[-count:]):
        (tmp_path / f"files/{n:02}.txt").write_text(document)
    want = read_corpus([tmp_path / "files"], codec, 5)
    got = read_corpus(saved(tmp_path / "data", train={"text": DOCUMENTS[-count:]}), codec, 5)
    assert tokens_of(got.train) == tokens_of(want.train)
    assert tokens_of(got.valid) == tokens_of(want.valid)
    assert (got.unit, got.bytes_per_token, got.vocabulary) == (want.unit, want.bytes_per_token, want.vocabulary)


@pytest.mark.slow
def test_no_more_is_held_out_than_is_useful(tmp_path):
    files = saved(tmp_path / "data", train={"text": ["x" * 9_999] * 1000})
    corpus = read_corpus(files, ByteCodec(), 16)
    assert corpus.valid.tokens == 110_000  # the 10 documents that reach 100 000 characters, and one more
    assert corpus.train.tokens == 9_500_000


@pytest.mark.parametrize("count", [4, 60])
def test_tokens_are_taken_as_they_are(count, tmp_path):
    rows = [[n, 7, n] * 10 for n in range(count)]
    corpus = read_corpus(saved(tmp_path / "data", train={"input_ids": rows}), ByteCodec(), 5)
    held_out = [row[28:] for row in rows] if count < 20 else rows[::20]
    kept = [row[:28] for row in rows] if count < 20 else [row for n, row in enumerate(rows) if n % 20]
    for part, want in ((corpus.train, np.concatenate(kept)), (corpus.valid, np.concatenate(held_out))):
        assert tokens_of(part) == want[: len(want) // 5 * 5].tolist()
    assert (corpus.unit, corpus.bytes_per_token) == ("tokens", None)
    assert corpus.vocabulary == max(count, 8)
    assert corpus.report(1.0) == "validation 1.0000 nats per token, perplexity 2.72"


def test_a_changed_dataset_is_another_corpus(tmp_path):
    digests = [
        read_corpus(saved(tmp_path / name, train={"text": [text] * 40}), ByteCodec(), 2).digest
        for name, text in (("a", "one"), ("b", "one"), ("c", "two"))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_bad_datasets_are_named(tokenizer, text, tmp_path):
    codec = TokenCodec(tokenizer)
    files = saved(tmp_path / "splits", dev={"text": DOCUMENTS}, test={"text": DOCUMENTS})
    with pytest.raises(ValueError, match="must have a split train; got dev, test"):
        read_corpus(files, codec, 5)
    files = saved(tmp_path / "columns", train={"body": DOCUMENTS, "n": range(45)})
    with pytest.raises(ValueError, match="must have a column input_ids; got body, n; name the texts' --text-column"):
        read_corpus(files, codec, 5)
    with pytest.raises(ValueError, match="column n of .* must hold texts or lists of token ids; got Value"):
        read_corpus(files, codec, 5, column="n")
    with pytest.raises(ValueError, match="a saved dataset must come alone; got .*columns, .*text.txt"):
        read_corpus([*files, text], codec, 5)
    files = saved(tmp_path / "ids", train={"input_ids": [[1, 2, 300]] * 40})
    with pytest.raises(ValueError, match=f"must be of the tokenizer, which has {codec.size}; got 300; name the right"):
        read_corpus(files, codec, 2)
    files = saved(tmp_path / "negative", train={"input_ids": [[1, -100]] * 40})
    with pytest.raises(ValueError, match="token ids must be at least 0; got -100"):
        read_corpus(files, codec, 2)
