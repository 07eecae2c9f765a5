"""A session against the whole text read anew, rows alone, and sessions that never stopped."""

import json

import pytest
import torch
import zoo
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from retentive.data.tokenizer import load_tokenizer, save_tokenizer
from retentive.errors import InputError
from retentive.inference import session as sessions
from retentive.inference.sampling import Sampling
from retentive.inference.session import Session
from retentive.models.retnet import RetNet
from retentive.models.transformer import Transformer

GREEDY = Sampling(temperature=0)
PROMPTS = ["hello", "a prompt that is much longer than the others", "x"]
END = 256


@pytest.fixture(scope="module", params=["retnet", "transformer"])
def model(request):
    """Small, untrained, in float64 so that no rounding decides between two tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4}
    if request.param == "retnet":
        return RetNet(zoo.retnet(**sizes)).double().eval()
    return Transformer(zoo.transformer(**sizes, num_kv_heads=2)).double().eval()


def run(session, count):
    """The texts that `count` steps add."""
    texts = [""] * len(session.rows)
    for pieces in session.steps(count):
        for row, text, _ in pieces:
            texts[row] += text
    return texts


def finished_run(session, count):
    texts = run(session, count)
    for row, text, _ in session.held():
        texts[row] += text
    return texts


def test_greedy_is_the_likeliest_token_of_the_whole_text_read_anew(model, byte_level):
    session = Session(model, byte_level, GREEDY)
    session.read(PROMPTS)
    texts = [[END, *prompt.encode()] for prompt in PROMPTS]
    for _ in range(30):
        session.step()
        for text in texts:
            logits, _ = model(torch.tensor([text]))
            text.append(int(logits[0, -1, :257].argmax()))
        assert [row.last for row in session.rows] == [text[-1] for text in texts]


def test_a_row_is_the_same_alone_and_among_others(model, byte_level):
    sampling = {"repetition_penalty": 1.2, "seed": 5}
    together = Session(model, byte_level, Sampling(**sampling))
    together.read(PROMPTS)
    texts = finished_run(together, 40)
    for row, prompt in enumerate(PROMPTS):
        alone = Session(model, byte_level, Sampling(**{**sampling, "seed": 5 + row}))
        alone.read([prompt])
        assert finished_run(alone, 40) == [texts[row]]


def test_long_prompts_are_read_in_segments(model, byte_level, monkeypatch):
    whole = Session(model, byte_level, GREEDY)
    whole.read(PROMPTS)
    monkeypatch.setattr(sessions, "SEGMENT", 6)
    longest = 0
    hidden = model.hidden

    def watched(tokens, *args, **kwargs):
        nonlocal longest
        longest = max(longest, tokens.numel())
        return hidden(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "hidden", watched)
    segments = Session(model, byte_level, GREEDY)
    segments.read(PROMPTS)
    assert longest <= 6
    assert run(segments, 20) == run(whole, 20)


def test_the_vocabulary_is_computed_for_the_last_token_only(model, byte_level, monkeypatch):
    shapes = []
    head = model.head
    monkeypatch.setattr(model, "head", lambda h: (shapes.append(tuple(h.shape)), head(h))[1])
    session = Session(model, byte_level, GREEDY)
    session.read(PROMPTS)
    session.step()
    assert shapes == [(3, 32)]


@pytest.mark.parametrize("split", [0, 1, 7, 29])
def test_saved_and_loaded_it_goes_on_as_if_it_had_not_stopped(model, byte_level, tmp_path, split):
    sampling = Sampling(temperature=1.5, top_p=0.9, repetition_penalty=1.3, seed=3)
    stop = ["e", "\x05\x06"]
    unsplit = Session(model, byte_level, sampling, stop)
    unsplit.read(PROMPTS)
    first = Session(model, byte_level, sampling, stop)
    first.read(PROMPTS)
    begun = run(first, split)
    stopped = {row for row, _ in enumerate(PROMPTS) if row not in first.active}
    first.save(tmp_path / "state")
    second = Session.load(tmp_path / "state", model, byte_level)
    whole, rest = run(unsplit, 30), run(second, 30 - split)
    for row in {0, 1, 2} - stopped:
        assert begun[row] + rest[row] == whole[row]
        assert second.rows[row].last == unsplit.rows[row].last
    assert {0, 1, 2} - stopped, "every text stopped before the split; the test tests nothing"


def test_loaded_with_other_options(model, byte_level, tmp_path):
    session = Session(model, byte_level, Sampling(seed=1, temperature=2.0), stop=["q"])
    session.read(PROMPTS)
    session.save(tmp_path / "state")

    def loaded(**options):
        return Session.load(tmp_path / "state", model, byte_level, **options)

    assert loaded().sampling == session.sampling
    assert loaded().stop == ("q",)
    assert loaded(stop=["z"]).stop == ("z",)
    assert loaded(sampling={"top_k": 4}).sampling == Sampling(seed=1, temperature=2.0, top_k=4)
    texts = run(loaded(), 10)
    assert run(loaded(sampling={"seed": 1}), 10) == texts
    assert run(loaded(sampling={"seed": 2}), 10) != texts


def test_a_prompt_added_later_is_part_of_the_text(model, byte_level):
    split = Session(model, byte_level, GREEDY)
    split.read(PROMPTS)
    before = [byte_level.encode(prompt).ids for prompt in PROMPTS]
    for _ in range(5):
        split.step()
        for text, row in zip(before, split.rows, strict=True):
            text.append(row.last)
    split.read(["one", "two and three", "4"])
    for text, added in zip(before, ["one", "two and three", "4"], strict=True):
        text.extend(added.encode())
    split.step()
    logits = [model(torch.tensor([[END, *text]]))[0][0, -1, :257] for text in before]
    assert [row.last for row in split.rows] == [int(row.argmax()) for row in logits]


def spelling(*words, width=258):
    """A model without layers in which one token follows each: it spells the `words`."""
    model = RetNet(zoo.retnet(vocab_size=257, hidden_size=width, num_hidden_layers=1, num_heads=1))
    model.layers = torch.nn.ModuleList()
    with torch.no_grad():
        model.embed_tokens.weight.copy_(torch.eye(257, width))
        model.lm_head.weight.zero_()
        for word in words:
            tokens = [byte for byte in word.encode()]
            for token, following in zip(tokens, [*tokens[1:], END], strict=True):
                model.lm_head.weight[following, token] = 1
    return model.eval()


def test_each_row_stops_by_itself(byte_level):
    model = spelling("abc", "0123456789", "x-y")
    session = Session(model, byte_level, GREEDY, stop=["y"])
    session.read(["a", "0", "x"])
    steps = list(session.steps(8))
    assert [len(pieces) for pieces in steps] == [3, 3, 2, 1, 1, 1, 1, 1]
    assert "".join(p.text for pieces in steps for p in pieces if p.row == 1) == "12345678"
    ends = [(p.row, p.text, p.finish) for pieces in steps for p in pieces if p.finish]
    assert ends == [(2, "", "stop"), (0, "", "end")]
    assert session.active == [1]


def test_rows_that_stopped_are_saved_in_their_places(byte_level, tmp_path):
    model = spelling("abc", "0123456789", "xyz!")
    session = Session(model, byte_level, GREEDY, stop=["y"])
    session.read(["a", "0", "x"])
    assert run(session, 4) == ["bc", "1234", ""]
    assert session.active == [1]
    session.save(tmp_path / "state")
    again = Session.load(tmp_path / "state", model, byte_level)
    assert run(again, 4) == ["", "5678", "z!"]  # past a stop string, never past the end
    again.read(["b", "8", "x"])  # but a prompt goes on with any text
    assert run(again, 4) == ["c", "9", ""]


def test_when_every_text_has_ended(model, byte_level, tmp_path):
    session = Session(model, byte_level, GREEDY)
    session.read(PROMPTS)
    for row in range(len(PROMPTS)):
        session._take(row, END)
    session._retire()
    session.save(tmp_path / "state")
    again = Session.load(tmp_path / "state", model, byte_level)
    assert (again.active, run(again, 5)) == ([], ["", "", ""])
    again.read(PROMPTS)
    assert again.active == [0, 1, 2]


def test_text_held_back_comes_before_a_prompt_that_follows(byte_level):
    session = Session(spelling("abcd"), byte_level, GREEDY, stop=["bcx"])
    session.read(["a"])
    assert run(session, 2) == [""]
    assert [(p.row, p.text) for p in session.read(["a"])] == [(0, "bc")]


def test_no_character_is_cut(byte_level, tmp_path):
    session = Session(spelling("-世界"), byte_level, GREEDY)
    session.read(["-"])
    texts = ["".join(p.text for p in pieces) for pieces in session.steps(5)]
    assert texts == ["", "", "世", "", ""]
    session.save(tmp_path / "state")
    again = Session.load(tmp_path / "state", session.model, byte_level)
    assert run(again, 5) == ["界"]


def test_tokens_that_only_the_model_knows_are_never_drawn(byte_level):
    model = RetNet(zoo.retnet(vocab_size=2000, hidden_size=16, num_hidden_layers=1, num_heads=1))
    session = Session(model.eval(), byte_level, Sampling(temperature=5.0, top_p=1.0))
    session.read(["a"] * 8)
    for _ in range(10):
        session.step()
        assert all(session.rows[row].last < 257 for row in session.active)


def test_bad_input(model, byte_level, tmp_path):
    with pytest.raises(InputError, match="token 256 of the tokenizer, and the model has 8; give"):
        small = RetNet(zoo.retnet(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_heads=1))
        Session(small, byte_level)
    with pytest.raises(InputError, match="stop string is empty"):
        Session(model, byte_level, stop=["a", ""])
    session = Session(model, byte_level)
    with pytest.raises(InputError, match="no prompt"):
        session.read([])
    with pytest.raises(InputError, match="not UTF-8"):
        session.read(["a", "\udcff"])
    session.read(["a", "b"])
    with pytest.raises(InputError, match="prompt is empty"):
        session.read(["a", ""])
    with pytest.raises(InputError, match="2 sequences to go on with and 1 prompts"):
        session.read(["a"])
    session.save(tmp_path / "state")
    torch.manual_seed(1)
    other = type(model)(model.config).double()
    with pytest.raises(InputError, match="another model"):
        Session.load(tmp_path / "state", other, byte_level)
    model.init_state(1).save(tmp_path / "bare", fingerprint=sessions.fingerprint(model))
    with pytest.raises(InputError, match="no text"):
        Session.load(tmp_path / "bare", model, byte_level)


def test_a_tokenizer_may_have_more_ids_than_the_model(model, byte_level, tmp_path):
    """[PAD] behind the vocabulary, say; only a text that holds it is refused."""
    larger = Tokenizer.from_str(byte_level.to_str())
    larger.add_tokens(["beyond", *(f"<{n}>" for n in range(2)), "[PAD]"])
    session = Session(model, larger, Sampling(repetition_penalty=1.2))
    with pytest.raises(InputError, match=r"holds '\[PAD\]', token 260 of .* the model has 260"):
        session.read(["a [PAD]"])
    session.read(["a"])
    whole = run(session, 3)
    session.save(tmp_path / "state")
    Session.load(tmp_path / "state", model, larger).step()
    assert len(whole) == 1 and session.vocab_size == 260


@pytest.mark.parametrize(
    ("settings", "template", "before"),
    [
        (None, True, [END]),  # trained here on another's tokenizer: as its documents began
        ({"bos_token": "a", "eos_token": "<|end|>", "add_bos_token": True}, False, []),
        ({"bos_token": "a", "eos_token": "<|end|>"}, True, [97]),
        ({"bos_token": "a"}, False, [97]),
        ({}, False, [END]),
    ],
)
def test_a_new_text_begins_as_in_transformers(
    model, byte_level, tmp_path, settings, template, before
):
    own = Tokenizer.from_str(byte_level.to_str())
    if template:
        own.post_processor = TemplateProcessing(single="a $A", special_tokens=[("a", 97)])
    save_tokenizer(own, tmp_path)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    session = Session(model, load_tokenizer(tmp_path), GREEDY)
    session.read(["hello", "x"])
    texts = [[*before, *b"hello"], [*before, *b"x"]]
    for _ in range(5):
        session.step()
        for text in texts:
            text.append(int(model(torch.tensor([text]))[0][0, -1, :257].argmax()))
        assert [row.last for row in session.rows] == [text[-1] for text in texts]
    held = [[row.last] for row in session.rows]
    session.read(["y", "z"])  # the same text goes on
    session.step()
    for text, last, more in zip(texts, held, ["y", "z"], strict=True):
        assert text[-1:] == last
        text += [*more.encode()]
        text.append(int(model(torch.tensor([text]))[0][0, -1, :257].argmax()))
    assert [row.last for row in session.rows] == [text[-1] for text in texts]


def test_ids_may_have_gaps(model, byte_level):
    """259 ids, of which 256 and 257 are nobody's."""
    described = json.loads(byte_level.to_str())
    described["model"]["vocab"]["<|end|>"] = described["added_tokens"][0]["id"] = 258
    gapped = Tokenizer.from_str(json.dumps(described))
    assert (gapped.get_vocab_size(), gapped.token_to_id("<|end|>")) == (257, 258)
    session = Session(model, gapped, GREEDY)
    session.read(["hello"])
    session.step()
    assert session.vocab_size == 259


def test_the_texts_of_another_tokenizer_are_refused(model, byte_level, tmp_path):
    session = Session(model, byte_level, GREEDY)
    session.read(["hello"])
    session.save(tmp_path / "state")
    larger = Tokenizer.from_str(byte_level.to_str())
    larger.add_tokens(["more"])
    with pytest.raises(InputError, match="tokenizer with 257 tokens, this one has 258"):
        Session.load(tmp_path / "state", model, larger)


def test_a_step_that_is_broken_off_leaves_no_whole_session(model, byte_level, monkeypatch):
    session = Session(model, byte_level, GREEDY)
    session.read(["hello"])
    session.step()
    assert session.whole

    def interrupted(row, token):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "_take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.step()
    assert not session.whole


def test_a_session_whose_step_was_broken_off_does_not_go_on(byte_level, monkeypatch):
    model = RetNet(zoo.retnet(vocab_size=260, hidden_size=32, num_hidden_layers=2, num_heads=4))
    session = Session(model.eval(), byte_level, GREEDY)
    session.read(["a"])
    with monkeypatch.context() as broken:
        broken.setattr(model, "embed", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.step()
    for go_on in (session.step, lambda: session.read(["b"])):
        with pytest.raises(InputError, match="broken off"):
            go_on()


def test_an_empty_prompt_begins_a_document(model, byte_level):
    """As the end token before it does in training; beside a prompt, too."""
    alone, beside = Session(model, byte_level), Session(model, byte_level)
    alone.read([""])
    beside.read(["", "ab"])
    assert alone.rows[0].last == alone.text.end
    for one, both in zip(alone.steps(5), beside.steps(5), strict=True):
        assert [p for p in both if p.row == 0] == one


def test_a_session_whose_rows_have_ended_has_no_step(model, byte_level):
    session = Session(model, byte_level)
    session.read(["a"])
    session.active = []
    assert session.step() == []
    assert session.whole
