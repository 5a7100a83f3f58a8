"""The user's own files: what can be wrong with them, what is skipped, cut, asked and shown."""

import csv
import pickle

import pytest
import user_files
from user_files import AGAIN, ALPACA, BOT, LONG, USER

from minillm import data
from minillm.data import showing
from minillm.model.tokenizer import SentencePiece

bare, tokenizer, write = user_files.bare, user_files.tokenizer, user_files.write


def test_line_ends_and_a_byte_order_mark_change_nothing(write, bare):
    rows = '{"prompt": "a", "completion": " b"}\n{"prompt": "c", "completion": " d"}\n'
    for name, text in (("a.jsonl", rows), ("a.csv", "prompt,completion\na,b\n\nc,d\n"),
                       ("a.txt", "one\ntwo\n"),
                       ("a.JSON", '[{"prompt": "a",\n"completion": "b"}]')):
        plain = data.read(write(name, text), bare)
        odd = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
        marked = data.read(write(name, odd), bare)
        assert marked == plain and len(plain) > 0
    assert data.text(write("a.txt", b"\xef\xbb\xbfone\r\ntwo")) == "one\ntwo"


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\r\n",
                                 "\n"])
def test_a_csv_field_holds_any_line_end(write, bare, odd):
    path = write("a.csv", f'prompt,completion\nx,"a{odd}b"\ny,c\n')
    assert data.questions(path, bare).references == [f"a{odd}b", "c"]
    assert len(data.read(path, bare)) == 2


@pytest.mark.parametrize("odd", ["\u2028", "\x85"])
def test_a_json_line_ends_with_a_newline_only(write, bare, odd):
    path = write("a.jsonl", f'{{"prompt": "a", "completion": "b{odd}c"}}\n')
    assert data.questions(path, bare).references == [f"b{odd}c"]


def test_a_csv_field_may_be_long_and_the_limit_of_the_program_stays(write, bare):
    before = csv.field_size_limit()
    path = write("a.csv", "prompt,completion\n" + "x" * 200_000 + ",y\n,z\nbad\n")
    assert data.questions(path, bare, skip_bad=True).prompts == ["x" * 200_000, ""]
    with pytest.raises(ValueError, match="line 4: 1 fields"):
        data.questions(path, bare)
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name, content, message", [
    ("a.xml", b"{}", "the ending '.xml' is unknown; known: .txt, .jsonl, .json, .csv"),
    ("a", b"{}", "the ending '' is unknown"),
    ("a.txt", b"", " is empty"),
    ("a.txt", b"\xef\xbb\xbf \n", " is empty"),
    ("a.jsonl", b"\n  \n", " is empty"),
    ("a.csv", b"", " is empty"),
    ("a.csv", b"prompt,completion\n\n", " is empty: it has no record"),
    ("a.json", b"[]", " is empty: it has no record"),
    ("a.txt", b"fine\nnot \xff\xfe utf", "line 2: not UTF-8 .the byte 0xff."),
    ("a.jsonl", b'{"text": "abc"}\n{"text": "\xe9"}', "line 2: not UTF-8 .the byte 0xe9."),
    ("a.csv", b"text\nabc\n\xe9\n", "line 3: not UTF-8 .the byte 0xe9."),
    ("a.csv", b"t\xe9xt\nabc\n", "line 1: not UTF-8"),
    ("a.json", b'[\n{"text": "\xe9"}]', "line 2: not UTF-8"),
    ("a.jsonl", b'{"text": "a b c"}\n{"text": ', "line 2: not JSON"),
    ("a.jsonl", b'{"text": "abc"},\n', "line 1: not JSON .*Extra data"),
    ("a.jsonl", b'["text"]', "line 1: a record is an object, this is list"),
    ("a.jsonl", b'{"text": "abc"}\n\n' + b"[" * 200_000, "line 3: not JSON"),
    ("a.json", b"[" * 200_000, ": not JSON"),
    ("a.json", b'{"text": "a"}\n{"text": "b"}', "not JSON .*has to end in .jsonl"),
    ("a.json", b'{"data": [{"text": "a"}]}', "has to be a list of records, this is dict"),
    ("a.json", b'[{"text": "abc"}, 3]', "record 2: a record is an object, this is int"),
    ("a.jsonl", b'{"txt": "a"}', "line 1: the fields are 'txt'; known: 'messages'; .*'text'"),
    ("a.jsonl", b"{}", "line 1: the fields are none"),
    ("a.jsonl", b'{"text": 3}', "line 1: 'text' is int .3., not text"),
    ("a.jsonl", b'{"text": " "}', "line 1: 'text' is empty"),
    ("a.jsonl", b'{"prompt": 3, "completion": "a"}', "'prompt' is int .3., not text"),
    ("a.jsonl", b'{"prompt": "a", "completion": [1.5]}', "'completion' is list .*not text"),
    ("a.jsonl", b'{"prompt": "a", "completion": null}', "'completion' is NoneType"),
    ("a.jsonl", b'{"prompt": "a", "completion": " "}', "'completion' is empty"),
    ("a.jsonl", b'{"instruction": "a", "output": ""}', "'output' is empty"),
    ("a.jsonl", b'{"instruction": " ", "output": "b"}', "'instruction' is empty"),
    ("a.jsonl", b'{"instruction": "a", "output": "b", "input": 3}', "'input' is int .3., not text"),
    ("a.jsonl", b'{"text": "\\ud800 abc"}', r"'\\ud800'.*half|half.*'\\ud800'"),
    ("a.jsonl", b'{"prompt": "a", "completion": "\\udcff"}', r"'\\udcff'.*half|half.*'\\udcff'"),
    ("a.jsonl", b'{"messages": "hi"}', "'messages' is str .'hi'., not a list"),
    ("a.jsonl", b'{"conversations": {}}', "'conversations' is dict"),
    ("a.jsonl", b'{"prompt": "' + LONG.encode() + b'", "completion": "x"}', "fills the 256 tokens"),
    ("a.csv", b"prompt,completion\na,b\nc\n", "line 3: 1 fields, the header has 2"),
    ("a.csv", b'prompt,completion\n"a,b\nc,d\n', "lines 2-[34]: not CSV"),
    ("a.csv", b'prompt,completion\n"a"b,c\n', "line 2: not CSV"),
    ("a.csv", b"text,text\na,b\n", "line 1: the header names a field twice"),
    ("a.csv", b'"te"xt,a\na,b\n', "line 1: not CSV"),
])
def test_a_bad_file_is_an_error_with_its_line(write, tokenizer, name, content, message):
    path = write(name, content)
    with pytest.raises(ValueError, match=message) as error:
        data.read(path, tokenizer)
    text = str(error.value)
    assert text.count(str(path)) == 1 and "\n" not in text and len(text) < 500


def test_settings_are_checked_before_the_file(tmp_path, tokenizer):
    for length in (1, 0, -5, 2.5, "8", True):
        with pytest.raises(ValueError, match=f"^length={length!r}: an example has at least 2"):
            data.read(tmp_path / "not there.jsonl", tokenizer, length=length)
    endless = SentencePiece(tokenizer.proto)
    endless.eos = None
    with pytest.raises(ValueError, match="no end-of-text id"):
        data.read(tmp_path / "not there.jsonl", endless)
    with pytest.raises(FileNotFoundError, match="not there.jsonl"):
        data.read(tmp_path / "not there.jsonl", tokenizer)
    with pytest.raises(ValueError, match="line 4: no"):
        data.parse({"text": ""}, tokenizer, 8, "line 4: no")


# --- nothing is lost in silence ------------------------------------------------------------------


def test_bad_records_are_skipped_only_when_asked_and_are_counted(write, bare):
    good = '{"prompt": "a", "completion": " b"}'
    fills = '{"prompt": "' + LONG + '", "completion": "x"}'
    rows = [good, "{", "", '{"txt": 1}', good, fills, good]
    path = write("a.jsonl", "\n".join(rows).encode() + b'\n{"text": "\xff"}\n' + good.encode())
    found = data.read(path, bare, skip_bad=True)
    assert (len(found), found.records, len(found.skipped)) == (4, 4, 4)
    reasons = ((2, "not JSON"), (4, "fields"), (6, "fills"), (8, "UTF-8"))
    for (line, reason), text in zip(reasons, found.skipped):
        assert text.startswith(f"{path}, line {line}: ") and reason in text
        assert text in found.summary()
    assert "skipped: 4 bad records" in found.summary()
    with pytest.raises(ValueError) as error:
        data.read(path, bare)
    assert str(error.value) == found.skipped[0]
    path = write("a.csv", 'prompt,completion\na,b\nc\n"d"e,f\ng,h\n"i,j\nk,l\n')
    found = data.questions(path, bare, skip_bad=True)
    assert found.prompts == ["a", "g"]
    places = [text.removeprefix(f"{path}, ").split(": ")[0] for text in found.skipped]
    assert places == ["line 3", "line 4", "lines 6-7"]


def test_a_file_without_any_good_record_is_an_error_all_the_same(write, bare):
    path = write("a.jsonl", "{\n" * 8)
    with pytest.raises(ValueError, match="no record is good, 8 are bad; the first: .*line 1: not"):
        data.read(path, bare, skip_bad=True)


@pytest.mark.parametrize("bad, more", [(5, 0), (9, 4)])
def test_many_skipped_records_are_not_all_listed(write, bare, bad, more):
    path = write("a.jsonl", '{"text": "abc"}\n' + "{\n" * bad)
    text = data.read(path, bare, skip_bad=True).summary()
    assert f"skipped: {bad} bad records" in text and text.count("not JSON") == 5
    assert text.endswith(f"and {more} more") == (more > 0) == (" more" in text)


def test_what_is_cut_off_is_counted(write, bare, tokenizer):
    fits = len(bare.encode("say a b c")) + 1
    rows = [{"prompt": "say", "completion": " a b c"}]
    for length, lost in ((fits, 0), (fits - 1, 1), (fits - 2, 2)):
        found = data.read(write("a.jsonl", rows), bare, length=length)
        assert found[0].cut == lost and found.cut == (lost > 0) and len(found[0].ids) == length
        assert (f"keeps {lost} token" in found.summary()) == (lost > 0)
    messages = [USER, BOT, {"role": "user", "content": LONG}]
    found = data.read(write("a.jsonl", [{"messages": messages}]), tokenizer)
    assert found.cut == 0, "nothing of a question was to be learnt"
    found = data.read(write("a.jsonl", [{"messages": [*messages, BOT]}]), tokenizer)
    assert found.cut == 1 and found[0].cut == len(tokenizer.encode("first\n"))
    assert found.tokens == 256 and found.learnt == data.learnt(found[0]) > 0


# --- questions -----------------------------------------------------------------------------------


def test_questions_are_what_comes_before_the_answer(write, tokenizer, bare):
    rows = [{"prompt": "two is", "completion": " 2\n"}, {"text": "no question"},
            {"messages": [USER, BOT, AGAIN, {"role": "assistant", "content": " second "}, USER]},
            ALPACA[0], {"prompt": "a"}]
    path = write("a.jsonl", rows)
    found = data.questions(path, tokenizer, skip_bad=True)
    assert found.prompts == [
        "two is", "<user>\nhi\n<assistant>\nfirst\n<user>\nagain\n<assistant>\n",
        "<user>\nAdd.\n\n2 and 2\n<assistant>\n"]
    assert found.references == ["2", "second", "4"]
    assert found.ids == [tokenizer.encode(prompt) for prompt in found.prompts]
    assert found.texts == 1 and len(found.skipped) == 1 and "line 5" in found.skipped[0]
    found = data.questions(write("a.json", ALPACA), bare)
    assert found.prompts[1].endswith("### Response:\n")
    assert found.references == ["4", "hi", "hi", "hi"]
    assert data.questions(write("a.txt", "hello"), bare).texts == 1


def test_a_question_has_the_special_tokens_of_its_template_alone(write, bare):
    """A tokenizer that ends each text does not end the question."""
    ends = SentencePiece(bare.proto, user_files.CHAT, add_eos=True)
    [ids] = data.questions(write("a.jsonl", [{"messages": [USER, BOT]}]), ends).ids
    assert ends.encode("hi")[-1] == ends.eos and ends.eos not in ids


# --- what is shown -------------------------------------------------------------------------------


def test_a_preview_marks_what_is_learnt(write, bare):
    said = " \U0001f600 na\u00efve\x1b[31m\u202e\nyes"
    rows = [{"prompt": "caf\u00e9 \u4e2d", "completion": said}, {"text": "word " * 400}]
    found = data.read(write("a.jsonl", rows), bare)
    text = data.preview(found, bare, n=2, color=False)
    assert "caf\u00e9 \u4e2d[[ \U0001f600 na\u00efve\\x1b[31m\\u202e\\n\nyes</s>]]" in text
    assert "\x1b" not in text and "\u202e" not in text
    assert text.startswith(found.summary())
    assert f"{found.tokens:,} tokens, {found.learnt:,} of them learnt" in text
    assert "characters..." in text and len(text) < 2500
    (second,) = text.split("\n\n")[2:]
    n = len(found[1].ids)
    assert second.startswith(f"example 2: {n} tokens, {n - 1} learnt")
    assert "[[word" not in second, "nothing comes before the first token"
    colored = data.preview(found, bare, n=1)
    assert "\x1b[2mcaf\u00e9 \u4e2d\x1b[0m\x1b[32m \U0001f600 na" in colored
    assert "example 2" not in colored


def test_a_preview_of_packed_examples_shows_their_documents(bare):
    parts = [data.completion(bare, "ab", " c", 99), data.completion(bare, "de", " f", 99)]
    text = data.preview(data.pack(parts, 99), bare, color=False)
    assert "ab[[ c</s>]]\n--- document 2\nde[[ f</s>]]" in text and "1 example, " in text


def test_a_preview_keeps_the_spaces_that_a_tokenizer_drops():
    """Llama's tokenizer puts a space before the first word and takes one away in decoding."""

    class Llama:
        pieces = ["\u2581hi", "\u2581there", "<s>", "\u2581"]
        text_of = pieces.__getitem__

        def decode(self, ids):
            text = "".join(self.pieces[i] for i in ids if i != 2).replace("\u2581", " ")
            return text.removeprefix(" ")

    example = data.Example([2, 0, 1, 1, 3], [-100, -100, 1, -100, 3])
    text = data.preview([example], Llama(), color=False)
    assert text.endswith("<s>hi[[ there]] there[[ ]]")


def test_an_error_in_json_names_the_line_once(write, bare):
    path = write("a.jsonl", '{"text": "one"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"line 2: not JSON \(Expecting value: column 9\)$"):
        data.read(path, bare)


def test_errors_that_need_no_tokenizer_come_first(write):
    data.check_file(write("a.jsonl", ALPACA))
    path = write("b.jsonl", [dict(text="one"), dict(prompt="q"), dict(messages=[])])
    with pytest.raises(ValueError, match="b.jsonl, line 2: the fields are 'prompt'"):
        data.check_file(path)
    data.check_file(path, skip_bad=True)
    with pytest.raises(ValueError, match="c.txt is empty"):
        data.check_file(write("c.txt", " "))


def test_a_prompt_without_room_is_not_answered(write, bare):
    path = write("a.jsonl", [dict(prompt=p, completion="a") for p in ("", "hi", "hi " * 50)])
    found = data.questions(path, bare, most=20)
    assert found.prompts == ["hi"] and found.skipped == []
    assert [one.where for one in found.unanswered] == [f"{path}, line {n}" for n in (1, 3)]
    assert pickle.loads(pickle.dumps(found)).unanswered[1].where == f"{path}, line 3"
    assert found.unanswered[0].endswith("the prompt has 0 tokens: 1 to 20 leave room for an answer")
    assert len(data.questions(path, bare).prompts) == 3


def test_a_part_of_600_characters_is_shown_whole():
    whole = "".join(chr(97 + i % 26) for i in range(601))
    assert showing.shorten(whole[:600]) == whole[:600]
    assert showing.shorten(whole) == f"{whole[:300]} ...1 characters... {whole[301:]}"
