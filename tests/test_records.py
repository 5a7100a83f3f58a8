"""Every kind of record: what of it is learnt, and the conversations that are none."""

import pytest
import user_files
from user_files import AGAIN, ALPACA, BOT, CHAT, USER, learnt, said

from minillm import data
from minillm.model.tokenizer import SentencePiece

bare, tokenizer, write = user_files.bare, user_files.tokenizer, user_files.write
# As Qwen3's: the last turn, and no other, begins with a thought.
THINKING = ("{% for m in messages %}<{{ m['role'] }}>\n"
            "{% if m['role'] == 'assistant' and loop.last %}<think></think>\n{% endif %}"
            "{{ m['content'] | trim }}<end>\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>\n{% endif %}")


def test_prompts_and_texts(write, bare):
    rows = [{"prompt": "two plus two is", "completion": " four é"}, {"text": "hello there"}]
    one, two = data.read(write("a.jsonl", rows), bare)
    assert learnt(bare, one) == " four é" and one.labels[-1] == bare.eos
    assert two.labels[1:] == two.ids[1:] and said(bare, two) == "hello there"
    (three,) = data.read(write("a.csv", 'prompt,completion\n"say ""hi"",\nplease",hi\n'), bare)
    assert learnt(bare, three) == "hi" and said(bare, three) == 'say "hi",\npleasehi'


@pytest.mark.parametrize("length", [2, 3, 7, 50, 100])
def test_a_text_of_any_length_is_learnt_to_its_end(write, bare, length):
    """Also where the last piece would have one token, which could be learnt from nothing."""
    for words in range(1, 9):
        text = "word " * words
        ids = bare.encode(text) + [bare.eos]
        for name, what in (("a.txt", text), ("a.jsonl", [{"text": text}])):
            found = data.read(write(name, what), bare, length=length)
            assert [label for e in found for label in e.labels[1:]] == ids[1:]
            assert max(len(e.ids) for e in found) <= length and found.cut == 0
            assert found.learnt == len(ids) - 1 and found.records == 1


def test_a_conversation_learns_what_the_assistant_says(write, tokenizer):
    messages = [{"role": "system", "content": "be kind"},
                {"role": "user", "content": "say <assistant>\nno"}, BOT, AGAIN,
                {"role": "assistant", "content": "second"}]
    (example,) = data.read(write("a.jsonl", [{"messages": messages}]), tokenizer)
    assert learnt(tokenizer, example) == "first\nsecond\n", "the user's text holds a marker"
    assert said(tokenizer, example) == tokenizer.chat(messages)


def test_sharegpt(write, tokenizer):
    names = [("system", "be kind"), ("human", "hi"), ("gpt", "first"), ("human", "again"),
             ("gpt", "second")]
    told = [{"from": who, "value": what, "weight": 1} for who, what in names]
    as_messages = [{"role": dict(human="user", gpt="assistant").get(who, who), "content": what}
                   for who, what in names]
    rows = [{"conversations": told}, {"conversations": as_messages}, {"messages": as_messages},
            {"messages": told}]
    found = data.read(write("a.jsonl", rows), tokenizer)
    assert list(found) == [found[0]] * 4
    assert learnt(tokenizer, found[0]) == "first\nsecond\n"


def test_alpaca_with_a_chat_template_is_a_conversation(write, tokenizer):
    found = data.read(write("a.json", ALPACA), tokenizer)
    assert [learnt(tokenizer, e) for e in found] == ["4\n", "hi\n", "hi\n", "hi\n"]
    assert [said(tokenizer, e) for e in found] == [
        "<user>\nAdd.\n\n2 and 2\n<assistant>\n4\n", *["<user>\nSay hi.\n<assistant>\nhi\n"] * 2,
        "<system>\nBe kind.\n<user>\nSay hi.\n<assistant>\nhi\n"]


def test_alpaca_without_a_chat_template_is_its_own_prompt(write, bare):
    found = data.read(write("a.json", ALPACA), bare)
    assert [learnt(bare, e) for e in found] == ["4", "hi", "hi", "hi"]
    assert said(bare, found[0]) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:\n4")
    assert said(bare, found[1]) == said(bare, found[2]) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay hi.\n\n### Response:\nhi")
    assert said(bare, found[3]) == "Be kind.\n\n### Instruction:\nSay hi.\n\n### Response:\nhi"


def test_a_template_that_writes_the_last_turn_another_way(write, bare):
    thinking = SentencePiece(bare.proto, THINKING)
    messages = [USER, BOT, AGAIN, {"role": "assistant", "content": " second "}]
    (example,) = data.read(write("a.jsonl", [{"messages": messages}]), thinking)
    assert learnt(thinking, example) == "first<end>\n<think></think>\nsecond<end>\n"
    counting = SentencePiece(bare.proto, "{{ messages | length }}" + CHAT)
    with pytest.raises(ValueError, match="line 1: .* when message 2 is added"):
        data.read(write("a.jsonl", [{"messages": messages}]), counting)


def test_a_record_of_two_kinds_is_read_as_the_more_structured_and_says_so(write, tokenizer):
    rows = [{"text": "all of it", "prompt": "a", "completion": " b"},
            {"text": "all of it", "messages": [USER, BOT], "id": 7}, {"text": "alone"}]
    found = data.read(write("a.jsonl", rows), tokenizer)
    assert [learnt(tokenizer, e) for e in found[:2]] == [" b", "first\n"]
    assert found.kinds == {("prompt", "completion"): 1, ("messages",): 1, ("text",): 1}
    assert found.unread == {("text",): 2}
    assert "1 record of prompt and completion" in found.summary()
    assert "not read: text, beside another kind in 2 records" in found.summary()


def test_a_text_ends_once(write, bare):
    """With a tokenizer that ends each text itself, and with one that does not."""

    class Ending(SentencePiece):
        def spans(self, text):
            ids, offsets = super().spans(text)
            return ids + [self.eos], offsets + [(len(text), len(text))]

    ending = Ending(bare.proto)
    path = write("a.jsonl", [{"prompt": "a", "completion": " b"}, {"text": "all of it"}])
    assert data.read(path, ending) == data.read(path, bare)
    assert data.read(path, ending)[0].labels[-1] == ending.eos
    assert data.questions(path, ending).ids == data.questions(path, bare).ids
    start = [data.task("language", t, "test", length=64).examples[0] for t in (ending, bare)]
    assert start[0] == start[1]


@pytest.mark.parametrize("messages, message", [
    ([USER], "none of the 1 messages is the assistant's"),
    ([], "none of the 0 messages"),
    ([{"role": "user"}, BOT], "message 1 needs the texts 'role' and 'content'"),
    ([USER, {"role": "assistant", "content": None}], "message 2 needs the texts"),
    ([USER, "hi"], "message 2 needs the texts .* it is str .'hi'."),
    ([{"from": "human", "value": 3}, BOT], "message 1 needs the texts"),
    ([USER, {"role": "asistant", "content": "a"}],
     "message 2: the role 'asistant' is unknown; did you mean 'assistant'"),
    ([USER, {"role": "gpt", "content": "a"}], "the role 'gpt' is unknown; known: system"),
    ([{"from": "humans", "value": "a"}, BOT], "the role 'humans' is unknown; did you mean 'human'"),
    ([USER, {"role": "assistant", "content": " "}], "message 2: the assistant says nothing"),
    ([USER, {"from": "gpt", "value": ""}], "message 2: the assistant says nothing"),
    ([USER, {"role": "assistant", "content": "\ud800"}], "half"),
])
def test_a_bad_conversation_is_an_error_with_its_line(write, tokenizer, messages, message):
    field = "conversations" if "from" in str(messages) else "messages"
    path = write("a.jsonl", [{"messages": [USER, BOT]}, {field: messages}])
    for use in (data.read, data.questions):
        with pytest.raises(ValueError, match=f"line 2: .*{message}"):
            use(path, tokenizer)


def test_a_conversation_needs_a_chat_template(write, bare):
    with pytest.raises(ValueError, match="line 1: .*chat template"):
        data.read(write("a.jsonl", [{"messages": [USER, BOT]}]), bare)


def test_fields_that_are_not_read_are_named(bare, write):
    rows = [{"text": "one two", "label": 1, "id": None}, {"text": "three", "label": 0, "note": "x"}]
    found = data.read(write("a.jsonl", rows), bare)
    assert found.ignored == {"label": 2, "note": 1}
    assert "\nnot read: 'label' in 2 records, 'note' in 1 record" in found.summary()
    rows = [*ALPACA, {"instruction": "a", "output": "b", "text": "ab"},
            {"prompt": "a", "completion": "b", "system": "c"}]
    found = data.read(write("b.jsonl", rows), bare)
    assert found.ignored == {"system": 1}, "an instruction reads it, a prompt does not"
    many = {"text": "a", **{f"f{i}": 1 for i in range(10)}}
    assert "'f7' in 1 record, and 2 more" in data.read(write("c.jsonl", [many]), bare).summary()
    assert "not read" not in data.read(write("d.jsonl", [{"text": "a"}]), bare).summary()
