"""The layouts that public data sets and tools write feedback in: how each is recognised, and what its rows say in the
columns of our own forms.

A new layout is a `Layout` in `LAYOUTS`. Nothing is guessed: a row that does not fit its layout is refused with the
column that is at fault, and a row that prefers neither answer (a tie) gives its prompt alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from trl_ext.feedback.files import Row, Unusable, decoded
from trl_ext.feedback.forms import BAD, FORMS, GOOD, number_of, shared_messages


@dataclass(frozen=True)
class Made:
    """What a row says, in our columns.

    Attributes:
        row: of the layout's form; the prompt alone where nothing was judged.
        columns: our columns to theirs, for messages.
    """

    row: Row
    columns: Mapping[str, str] = field(default_factory=dict)


Numbered = Iterable[tuple[int, Row | Unusable]]


@dataclass(frozen=True)
class Layout:
    """One way in which others write feedback down.

    Attributes:
        name: what the header of a run calls it.
        form: what its rows become, for people; "prompts" where it holds no judgement.
        columns: sets of columns; rows that have all of one set may be of this layout.
        rows: what a row says. It raises `Unusable` with the column and the reason where it cannot tell.
        found_in: data sets and tools that write it.
        becomes: what is read, in a few words.
        fits: whether a row that has the columns is of this layout; one of the first rows is enough.
        gathered: for layouts in which several rows say one thing: from numbered rows to numbered rows.
        plain: its rows are of our form as they are.
    """

    name: str
    form: str
    columns: Sequence[set[str]]
    rows: Callable[[Row], Sequence[Made]]
    found_in: str
    becomes: str
    fits: Callable[[Row], bool] = lambda row: True
    gathered: Callable[[Numbered], Numbered] | None = None
    plain: bool = False


def matched(layout: Layout, columns: set[str], rows: Sequence[Row]) -> int:
    """How many of the columns make these first rows ones of the layout; 0 where they are none."""
    most = max((len(wanted) for wanted in layout.columns if wanted <= columns), default=0)
    return most if most and any(layout.fits(row) for row in rows) else 0


# What cells say ------------------------------------------------------------------------------------------------------


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise Unusable(column, "missing: give a text" if value is None else f"{value!r:.60}: give a text")
    return value


def _one_of(row: Row, column: str, meanings: Mapping[str, Any]) -> Any:
    """What the cell means; numbers and truth values are looked up as they are written."""
    value = row.get(column)
    word = str(value).strip().lower().removesuffix(".0")
    if word not in meanings:
        raise Unusable(column, f"{value!r:.60} is none of {', '.join(meanings)}")
    return meanings[word]


def _parsed(value: Any) -> Any:
    """What JSON says, where a text is some."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _structure(row: Row, column: str, kind: type) -> Any:
    """A list or a mapping; in a table it is JSON."""
    value = _parsed(row.get(column))
    if not isinstance(value, kind):
        raise Unusable(column, f"{row.get(column)!r:.60} is not a {'list' if kind is list else 'record'}")
    return value


def _messages(row: Row, column: str) -> list[Row]:
    value = decoded(row.get(column))
    if not isinstance(value, list) or not all(isinstance(m, dict) and "role" in m for m in value):
        raise Unusable(column, f"{value!r:.60} is not a list of messages with role and content")
    return [{"role": message["role"], "content": message.get("content")} for message in value]


def _said(role: str, text: Any) -> list[Row]:
    return [{"role": role, "content": text}]


def _compared(
    prompt: Any,
    prompt_column: str,
    answers: Sequence[tuple[str, Any]],
    better: int | None,
    strength: float | None = None,
) -> list[Made]:
    """A pair of two answers, each with its column, of which that numbered `better` was preferred; None: neither."""
    if better is None:
        return [Made({"prompt": prompt}, {"prompt": prompt_column})]
    for column, answer in answers:
        if isinstance(answer, list) and not any(str(message["content"] or "").strip() for message in answer):
            raise Unusable(column, "empty: an answer needs some text")
    (chosen_column, chosen), (rejected_column, rejected) = answers[better], answers[1 - better]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "strength": strength}
    return [Made(row, {"prompt": prompt_column, "chosen": chosen_column, "rejected": rejected_column})]


def _columns_compared(row: Row, prompt: str, first: str, second: str, better: int | None) -> list[Made]:
    """The same of texts that have a column each."""
    answers = [(column, _text(row, column)) for column in (first, second)]
    return _compared(_text(row, prompt), prompt, answers, better)


# hh-rlhf -------------------------------------------------------------------------------------------------------------

TURN = re.compile(r"(?:^|(?:\r?\n){2})(Human|Assistant):")  # Excel ends lines with \r\n


def _is_transcript(text: Any) -> bool:
    return isinstance(text, str) and bool(TURN.match(text)) and any(map(_is_of_assistant, TURN.finditer(text)))


def _is_of_assistant(turn: re.Match[str]) -> bool:
    return turn.start() > 0 and turn[1] == "Assistant"


def _turns(row: Row, column: str) -> list[str]:
    """A transcript cut before each of its turns; put together they are the transcript."""
    text = _text(row, column)
    starts = [turn.start() for turn in TURN.finditer(text)]
    if not starts or starts[0] > 0:
        raise Unusable(column, f"{text!r:.60} is no transcript that begins with 'Human:' or 'Assistant:'")
    return [text[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


def _transcripts(row: Row) -> list[Made]:
    """The prompt is made of whole turns, those that both begin with, up to the last "Assistant:" before they part. So
    answers that begin alike keep their beginning."""
    chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    names = [TURN.match(turns[common]) for turns in (chosen, rejected)]
    while common and not all(name and name[1] == "Assistant" for name in names):
        common -= 1
        names = [TURN.match(turns[common]) for turns in (chosen, rejected)]
    if common == 0 or names[0] is None:
        raise Unusable("rejected", "shares no turn with 'chosen' before an 'Assistant:', so no prompt can be told")
    prompt = "".join(chosen[:common]) + names[0][0]
    answers = [(name, "".join(turns)[len(prompt) :]) for name, turns in (("chosen", chosen), ("rejected", rejected))]
    return _compared(prompt, "chosen", answers, better=0)


# One row, one comparison ----------------------------------------------------------------------------------------------


def _scored_conversations(row: Row) -> list[Made]:
    pair = {name: row.get(name) for name in ("prompt", "chosen", "rejected")}
    better, worse = (row.get(name) for name in ("score_chosen", "score_rejected"))
    if better in (None, "") or worse in (None, ""):
        return [Made(pair)]
    lead = number_of(better, "score_chosen") - number_of(worse, "score_rejected")
    if lead < 0:
        raise Unusable("score_chosen", f"{better} is below score_rejected {worse}: the pair is the wrong way round")
    return [Made(pair if lead else {"prompt": FORMS["pairs"].record(pair).prompt})]


def _shp(row: Row) -> list[Made]:
    better = _one_of(row, "labels", {"1": 0, "0": 1})
    return _columns_compared(row, "history", "human_ref_A", "human_ref_B", better)


def _safe_rlhf(row: Row) -> list[Made]:
    better = _one_of(row, "better_response_id", {"0": 0, "1": 1})
    return _columns_compared(row, "prompt", "response_0", "response_1", better)


def _graded(row: Row, prompt: Any, column: str, answers: Sequence[tuple[str, Any]], verdict: str) -> list[Made]:
    """A verdict from -3, the first is much better, to 3, the second is; 0: they are equal."""
    grade = number_of(row.get(verdict), verdict)
    if abs(grade) > 3:
        raise Unusable(verdict, f"{row.get(verdict)!r} is not between -3 and 3")
    return _compared(prompt, column, answers, None if grade == 0 else int(grade > 0), abs(grade) or None)


def _helpsteer3(row: Row) -> list[Made]:
    answers = [(column, _said("assistant", _text(row, column))) for column in ("response1", "response2")]
    return _graded(row, _messages(row, "context"), "context", answers, "overall_preference")


def _helpsteer2_preference(row: Row) -> list[Made]:
    answers = [(column, _text(row, column)) for column in ("response_1", "response_2")]
    return _graded(row, _text(row, "prompt"), "prompt", answers, "preference_strength")


def _battle(answers: Sequence[tuple[str, list[Row]]], better: int | None) -> list[Made]:
    """Of two conversations that begin with the same messages."""
    shared = list(shared_messages([conversation for _, conversation in answers]))
    while shared and shared[-1]["role"] == "assistant":
        shared.pop()
    if not shared:
        raise Unusable(answers[1][0], f"begins with no message of {answers[0][0]!r}, so no prompt can be told")
    rest = [(column, conversation[len(shared) :]) for column, conversation in answers]
    return _compared(shared, answers[0][0], rest, better)


def _arena(row: Row) -> list[Made]:
    ties = dict.fromkeys(("tie", "tie (bothbad)", "both_bad", "bothbad"))
    better = _one_of(row, "winner", {"model_a": 0, "model_b": 1, **ties})
    battle = [(column, _messages(row, column)) for column in ("conversation_a", "conversation_b")]
    if row.get("turn") is not None:
        turns = int(number_of(row["turn"], "turn"))
        battle = [(column, _until_turn(conversation, turns)) for column, conversation in battle]
    return _battle(battle, better)


def _until_turn(conversation: list[Row], turns: int) -> list[Row]:
    """What was judged: so many questions with what answers them."""
    asked = [place for place, message in enumerate(conversation) if message["role"] == "user"]
    return conversation[: asked[turns]] if 0 < turns < len(asked) else conversation


def _arena_table(row: Row) -> list[Made]:
    flags = [_one_of(row, name, {"1": 1, "0": 0}) for name in ("winner_model_a", "winner_model_b")]
    if flags == [1, 1]:
        raise Unusable("winner_model_b", "both models are said to have won")
    asked, battle = _structure(row, "prompt", list), []
    for column in ("response_a", "response_b"):
        answered = _structure(row, column, list)
        if len(answered) != len(asked):
            raise Unusable(column, f"{len(answered)} answers to {len(asked)} prompts")
        for name, texts in (("prompt", asked), (column, answered)):
            if not all(isinstance(text, str) for text in texts):
                raise Unusable(name, "a list that holds more than texts")
        turns = zip(asked, answered, strict=True)
        battle.append((column, [m for q, a in turns for m in (*_said("user", q), *_said("assistant", a))]))
    return _battle(battle, None if flags == [0, 0] else flags[1])


def _orca(row: Row) -> list[Made]:
    asked = [name for name in ("question", "input", "prompt") if row.get(name)] or ["question"]
    if len(asked) > 1:
        raise Unusable(asked[1], f"asks beside {asked[0]!r}: make one of the two, or drop the one that is not asked")
    tie = str(row.get("status")).lower() == "tie"  # as distilabel marks it
    return _asked_and_answered(row, asked[0], _text(row, asked[0]), [], None if tie else 0)


def _asked_and_answered(row: Row, asked: str, text: str, history: list[Row], better: int | None = 0) -> list[Made]:
    """A pair of messages, with what the row has as system."""
    system = _said("system", _text(row, "system")) if row.get("system") else []
    answers = [(column, _said("assistant", _text(row, column))) for column in ("chosen", "rejected")]
    return _compared([*system, *history, *_said("user", text)], asked, answers, better)


def _alpaca(row: Row) -> list[Made]:
    """The input follows the instruction on a line of its own, as LLaMA-Factory has it."""
    history = []
    for turn in _structure(row, "history", list) if row.get("history") else []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Unusable("history", f"{turn!r:.60} is not a question with its answer")
        history += [*_said("user", turn[0]), *_said("assistant", turn[1])]
    given = _text(row, "input") if row.get("input") else ""
    text = "\n".join(part for part in (_text(row, "instruction"), given) if part)
    return _asked_and_answered(row, "instruction", text, history)


# Posts and their summaries --------------------------------------------------------------------------------------------


def _post(row: Row) -> str:
    """The query of Stiennon et al. 2020 (arXiv:2009.01325), appendix B: what there is of it, and "TL;DR:"."""
    info = _structure(row, "info", dict)
    text = info.get("post") or info.get("article")
    if not isinstance(text, str):
        raise Unusable("info", "holds neither 'post' nor 'article'")
    names = {"SUBREDDIT": f"r/{info['subreddit']}" if info.get("subreddit") else None, "TITLE": info.get("title")}
    parts = [f"{name}: {value}" for name, value in names.items() if value]
    return "\n\n".join([*parts, f"{'POST' if info.get('post') else 'ARTICLE'}: {text}", "TL;DR:"])


def _summaries(row: Row) -> list[Made]:
    both = _structure(row, "summaries", list)
    if len(both) != 2 or not all(isinstance(summary, dict) for summary in both):
        raise Unusable("summaries", f"{len(both)} where two are compared, each with its text")
    answers = [("summaries", _text(summary, "text")) for summary in both]
    return _compared(_post(row), "info", answers, _one_of(row, "choice", {"0": 0, "1": 1}))


def _summary_axes(row: Row) -> list[Made]:
    prompt, summary = _post(row), _structure(row, "summary", dict)
    grade = (summary.get("axes") or {}).get("overall")
    if grade is None:
        return [Made({"prompt": prompt}, {"prompt": "info"})]
    rated = {"prompt": prompt, "completion": summary.get("text"), "rating": number_of(grade, "summary")}
    return [Made(rated, {"prompt": "info", "completion": "summary"})]


# Ratings and labels --------------------------------------------------------------------------------------------------


def _ultrafeedback(row: Row) -> list[Made]:
    """The rating is the mean over the aspects that were rated; where none was, what the row says of the whole."""
    prompt, made = _text(row, "instruction"), []
    columns = {"prompt": "instruction", "completion": "completions", "rating": "completions"}
    for answer in map(_parsed, _structure(row, "completions", list)):
        if not isinstance(answer, dict):
            raise Unusable("completions", f"{answer!r:.60} is not a record with 'response'")
        annotations = _parsed(answer.get("annotations")) or {}
        if not isinstance(annotations, dict):
            raise Unusable("completions", f"the annotations {annotations!r:.40} are no record of aspects")
        aspects = [aspect for aspect in annotations.values() if isinstance(aspect, dict)]
        given = [aspect.get("Rating") for aspect in aspects]
        ratings = [number_of(rating, "completions") for rating in given if rating not in (None, "", "N/A")]
        fallback = next((answer[name] for name in ("fine-grained_score", "overall_score") if answer.get(name)), None)
        rating = fmean(ratings) if ratings else fallback
        if rating is None:
            raise Unusable("completions", f"the answer {answer.get('response')!r:.40} has no rating")
        made.append(Made({"prompt": prompt, "completion": answer.get("response"), "rating": rating}, columns))
    return made or [Made({"prompt": prompt}, columns)]


def _helpsteer(row: Row) -> list[Made]:
    rated = {"prompt": _text(row, "prompt"), "completion": row.get("response"), "rating": row.get("helpfulness")}
    return [Made(rated, {"completion": "response", "rating": "helpfulness"})]


def _labelled(row: Row) -> list[Made]:
    return [Made(row)]


SENTIMENT = {"1": True, "0": False, "pos": True, "neg": False, "positive": True, "negative": False}


def _is_labelled_text(row: Row) -> bool:
    others = {"prompt", "chosen", "rejected", "completion", "completions", "response"} & set(row)
    return not others and isinstance(row.get("text"), str) and str(row.get("label")).lower() in SENTIMENT


def _imdb(row: Row) -> list[Made]:
    good = _one_of(row, "label", SENTIMENT)
    return [Made({"completion": row.get("text"), "label": good}, {"completion": "text"})]


# Conversations -------------------------------------------------------------------------------------------------------

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt"), "assistant"),
    "system": "system",
}


def _sharegpt_turn(turn: Any, column: str) -> Row:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise Unusable(column, f"{turn!r:.60} is no turn with 'from' and 'value'")
    if turn.get("from") not in SHAREGPT_ROLES:
        raise Unusable(column, f"{turn.get('from')!r:.40} speaks, who is none of {', '.join(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}


def _is_sharegpt(row: Row) -> bool:
    turns = _parsed(row.get("conversations"))
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and {"from", "value"} <= set(turns[0])


def _sharegpt_messages(row: Row) -> list[Row]:
    messages = [_sharegpt_turn(turn, "conversations") for turn in _structure(row, "conversations", list)]
    return [*(_said("system", _text(row, "system")) if row.get("system") else []), *messages]


def _sharegpt(row: Row) -> list[Made]:
    """What comes before the assistant's last turn."""
    messages = _sharegpt_messages(row)
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise Unusable("conversations", "nobody asks anything in it")
    return [Made({"prompt": messages}, {"prompt": "conversations"})]


def _sharegpt_pair(row: Row) -> list[Made]:
    prompt, answers = _sharegpt_messages(row), []
    for column in ("chosen", "rejected"):
        turns = _structure(row, column, list) if isinstance(row.get(column), list) else [_structure(row, column, dict)]
        answers.append((column, [_sharegpt_turn(turn, column) for turn in turns]))
    return _compared(prompt, "conversations", answers, better=0)


OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


def _gathered_trees(rows: Numbered) -> Iterator[tuple[int, Row | Unusable]]:
    """A row for each message of a prompter: its conversation, with the replies that were ranked. Messages may come in
    any order, as in the data set's files."""
    messages: dict[str, tuple[int, Row]] = {}
    for line, row in _flattened_trees(rows):
        if isinstance(row, Unusable):
            yield line, row
        elif not isinstance(row.get("message_id"), str) or row["message_id"] in messages:
            yield line, Unusable("message_id", f"{row.get('message_id')!r:.60} names no message, or another one too")
        elif row.get("role") not in OASST_ROLES:
            yield line, Unusable("role", f"{row.get('role')!r:.60} is none of {', '.join(OASST_ROLES)}")
        else:
            messages[row["message_id"]] = line, row
    replies: dict[str, list[Row]] = {}
    for line, row in list(messages.values()):
        parent = row.get("parent_id")
        if parent and parent not in messages:
            yield line, Unusable("parent_id", f"{parent!r:.60} is no message of the file")
        elif parent and row["role"] == "assistant" and row.get("rank") not in (None, "") and not row.get("deleted"):
            replies.setdefault(parent, []).append(row)
    for name, (line, row) in messages.items():
        if row["role"] == "prompter" and not row.get("deleted"):
            try:
                yield line, {"path": _path_to(name, messages), "replies": replies.get(name, [])}
            except Unusable as bad:
                yield line, bad


def _flattened_trees(rows: Numbered) -> Iterator[tuple[int, Row | Unusable]]:
    """Each message of trees that are nested, as in the data set's files `...trees.jsonl`; other rows as they are."""
    for line, row in rows:
        if isinstance(row, Unusable) or "message_id" in row:
            yield line, row
            continue
        waiting = [(None, _parsed(row.get("prompt")))]
        while waiting:
            parent, message = waiting.pop()
            if not isinstance(message, dict):
                yield line, Unusable("prompt", f"{message!r:.60} is no message with its replies")
                continue
            yield line, {**message, "parent_id": parent}
            replies = reversed(message.get("replies") or [])
            waiting += [(message.get("message_id"), reply) for reply in replies]


def _path_to(name: str, messages: Mapping[str, tuple[int, Row]]) -> list[Row]:
    """The conversation that ends with this message."""
    path: list[Row] = []
    seen: set[str] = set()
    while name:
        if name in seen or name not in messages:
            raise Unusable("parent_id", f"{name!r:.60} leads to no beginning of the conversation")
        seen.add(name)
        row = messages[name][1]
        path += _said(OASST_ROLES[row["role"]], row.get("text"))
        name = row.get("parent_id") or ""
    return path[::-1]


def _ranked_replies(row: Row) -> list[Made]:
    columns = {"prompt": "text", "completions": "text", "ranks": "rank"}
    if len(row["replies"]) < 2:
        return [Made({"prompt": row["path"]}, columns)]
    ranks = [number_of(reply["rank"], "rank") + 1 for reply in row["replies"]]  # theirs begin at 0
    answers = [_said("assistant", reply.get("text")) for reply in row["replies"]]
    return [Made({"prompt": row["path"], "completions": answers, "ranks": ranks}, columns)]


# Exports of tools: fields and questions have the names that their users gave them -------------------------------------

ASKED = ("prompt", "instruction", "question", "input", "query", "context")
ANSWERED = ("completion", "response", "answer", "output", "generation", "text")
SIDES = (("1", "2"), ("a", "b"), ("A", "B"), ("left", "right"))


def _annotated(row: Row, fields: Sequence[str], question: str, verdicts: Sequence[Any]) -> list[Made]:
    """What people said to one question about these fields of the row."""
    asked = next((name for name in ASKED if name in fields), "prompt")
    prompt = _text(row, asked) if asked in fields else ""
    if not verdicts:
        return [Made({"prompt": prompt}, {"prompt": asked})]
    if all(isinstance(verdict, (int, float)) and not isinstance(verdict, bool) for verdict in verdicts):
        answer = _answer_of(fields, question)
        rated = {"prompt": prompt, "completion": row[answer], "ratings": list(verdicts)}
        return [Made(rated, {"completion": answer, "ratings": question})]
    words = [str(verdict).strip().lower() for verdict in verdicts]
    if all(word in GOOD | BAD for word in words):
        answer = _answer_of(fields, question)
        rows = [{"prompt": prompt, "completion": row[answer], "label": word} for word in words]
        return [Made(labelled, {"completion": answer, "label": question}) for labelled in rows]
    both = [
        (name, name.removesuffix(first) + second)
        for name in fields
        for first, second in SIDES
        if name.endswith(first) and name.removesuffix(first) + second in fields
    ]
    if len(both) != 1:
        raise Unusable(question, f"{verdicts!r:.60}: neither numbers, nor good or bad, nor one of two answers")
    sides: dict[str, int | None] = {"left": 0, "right": 1, both[0][0].lower(): 0, both[0][1].lower(): 1, "tie": None}
    made = []
    for verdict in verdicts:
        better = _one_of({question: verdict}, question, sides)
        answers = [(name, _text(row, name)) for name in both[0]]
        made += _compared(prompt, asked, answers, better)
    return made


def _answer_of(fields: Sequence[str], question: str) -> str:
    """The column of the one answer that was judged."""
    found = [name for name in ANSWERED if name in fields]
    if len(found) != 1:
        which = "several columns may hold" if found else "no column holds"
        raise Unusable(question, f"{which} the answer that it is about: rename it, as in text=completion")
    return found[0]


def _the_question(names: Sequence[str], suffix: str = "") -> str:
    if len(names) != 1:
        listed = ", ".join(names) or "none"
        raise Unusable(
            "", f"holds the questions {listed}: rename one, as in {(names or ['quality'])[0]}{suffix}=ratings"
        )
    return names[0]


def _is_own(row: Row) -> bool:
    """Whether a verdict was renamed to a column of ours."""
    return bool({"rating", "ratings", "label", "chosen", "ranks"} & set(row))


def _argilla(row: Row) -> list[Made]:
    questions = [name.removesuffix(".responses") for name in row if name.endswith(".responses")]
    question = _the_question(questions, ".responses")
    column = f"{question}.responses"
    values = row.get(column) or []
    states = row.get(f"{column}.status") or ["submitted"] * len(values)
    if not isinstance(values, list) or len(values) != len(states):
        raise Unusable(column, f"{len(states)} states for {values!r:.60}")
    kept = [value for value, state in zip(values, states, strict=True) if state == "submitted" and value is not None]
    return _annotated(row, [name for name in row if "." not in name], column, kept)


def _argilla1_answers(value: Any) -> list[Row] | None:
    """(user, value, status) of a question's cell, as records or, as `datasets` keeps them, as lists."""
    if isinstance(value, dict) and {"user_id", "value", "status"} <= set(value):
        return [{"value": v, "status": s} for v, s in zip(value["value"] or [], value["status"] or [], strict=True)]
    if isinstance(value, list) and value and all(isinstance(v, dict) and {"value", "status"} <= set(v) for v in value):
        return value
    return None


def _argilla1(row: Row) -> list[Made]:
    answered = {name: answers for name, value in row.items() if (answers := _argilla1_answers(value)) is not None}
    if not answered:  # nobody has answered yet
        return [Made({"prompt": ""})]
    question = _the_question(list(answered))
    answers = _argilla1_answers(row[question]) or []
    kept = [answer["value"] for answer in answers if answer["status"] == "submitted"]
    return _annotated(row, [name for name in row if name not in answered], question, kept)


def _label_studio(row: Row) -> list[Made]:
    fields = _structure(row, "data", dict)
    verdicts: dict[str, list[Any]] = {}
    for annotation in _structure(row, "annotations", list):
        for result in [] if annotation.get("was_cancelled") else annotation.get("result") or []:
            value = result.get("value") or {}
            said = value.get("rating", value.get("selected", value.get("choices")))
            said = said[0] if isinstance(said, list) and len(said) == 1 else said
            if said is not None:
                verdicts.setdefault(result.get("from_name", "annotations"), []).append(said)
    question = _the_question(list(verdicts)) if verdicts else "annotations"
    made = _annotated(fields, list(fields), question, verdicts.get(question, []))
    return [
        Made(m.row, {**dict.fromkeys(m.row, "data"), "ratings": "annotations", "label": "annotations"}) for m in made
    ]


# The table -----------------------------------------------------------------------------------------------------------

# In the order in which rows are held against them.
LAYOUTS: list[Layout] = [
    Layout(
        "hh-rlhf",
        "pairs",
        [{"chosen", "rejected"}],
        _transcripts,
        "Anthropic/hh-rlhf",
        "the prompt is the turns that both begin with, up to the last `Assistant:` before they part",
        lambda row: not row.get("prompt") and all(_is_transcript(row.get(name)) for name in ("chosen", "rejected")),
    ),
    Layout(
        "ultrafeedback_binarized",
        "pairs",
        [{"chosen", "rejected", "score_chosen", "score_rejected"}],
        _scored_conversations,
        "HuggingFaceH4/ultrafeedback_binarized, trl-lib/ultrafeedback_binarized",
        "the prompt is the messages that both begin with; equal scores prefer neither",
        lambda row: all(isinstance(decoded(row.get(name)), list) for name in ("chosen", "rejected")),
    ),
    Layout(
        "UltraFeedback",
        "ratings",
        [{"instruction", "completions"}],
        _ultrafeedback,
        "openbmb/UltraFeedback",
        "the rating is the mean over the aspects in `annotations`, else `fine-grained_score`, else `overall_score`",
        lambda row: "response" in str(row.get("completions"))[:2000],
    ),
    Layout(
        "HelpSteer2",
        "ratings",
        [{"prompt", "response", "helpfulness"}],
        _helpsteer,
        "nvidia/HelpSteer2, nvidia/HelpSteer",
        "the rating is `helpfulness`; `response=completion correctness=rating` takes another",
    ),
    Layout(
        "HelpSteer2 preference",
        "pairs",
        [{"prompt", "response_1", "response_2", "preference_strength"}],
        _helpsteer2_preference,
        "nvidia/HelpSteer2, folder preference",
        "below 0 the first is better; the strength is the distance from 0",
    ),
    Layout(
        "HelpSteer3",
        "pairs",
        [{"context", "response1", "response2", "overall_preference"}],
        _helpsteer3,
        "nvidia/HelpSteer3",
        "below 0 the first is better; the strength is the distance from 0",
    ),
    Layout(
        "SHP",
        "pairs",
        [{"history", "human_ref_A", "human_ref_B", "labels"}],
        _shp,
        "stanfordnlp/SHP, stanfordnlp/SHP-2",
        "where `labels` is 1, A is better; where it is 0, B is",
    ),
    Layout(
        "PKU-SafeRLHF",
        "pairs",
        [{"prompt", "response_0", "response_1", "better_response_id"}],
        _safe_rlhf,
        "PKU-Alignment/PKU-SafeRLHF",
        "by `better_response_id`; `safer_response_id=better_response_id` takes the other verdict",
    ),
    Layout(
        "arena battles",
        "pairs",
        [{"conversation_a", "conversation_b", "winner"}],
        _arena,
        "lmsys/chatbot_arena_conversations, lmarena-ai/arena-human-preference-100k",
        "by `winner`; the prompt is the messages that both begin with, the answers go to `turn`, where there is one",
    ),
    Layout(
        "arena table",
        "pairs",
        [{"prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"}],
        _arena_table,
        "lmsys/lmsys-arena-human-preference-55k",
        "by the columns `winner_...`; prompts and responses are JSON lists of turns",
    ),
    Layout(
        "summarize_from_feedback comparisons",
        "pairs",
        [{"info", "summaries", "choice"}],
        _summaries,
        "openai/summarize_from_feedback, comparisons",
        "by `choice`; the prompt has subreddit, title, post and `TL;DR:`",
    ),
    Layout(
        "summarize_from_feedback axis",
        "ratings",
        [{"info", "summary"}],
        _summary_axes,
        "openai/summarize_from_feedback, axis",
        "the rating is the axis `overall`",
        lambda row: "axes" in str(row.get("summary")),
    ),
    Layout(
        "oasst1 trees",
        "rankings",
        [{"message_id", "parent_id", "text", "role", "rank"}, {"message_tree_id", "tree_state", "prompt"}],
        _ranked_replies,
        "OpenAssistant/oasst1, OpenAssistant/oasst2",
        "the replies to one message by `rank`, 0 the best; the prompt is the conversation up to it",
        gathered=_gathered_trees,
    ),
    Layout(
        "orca pairs",
        "pairs",
        [{"system", asked, "chosen", "rejected"} for asked in ("question", "input", "prompt")],
        _orca,
        "Intel/orca_dpo_pairs, argilla/distilabel-intel-orca-dpo-pairs",
        "system and question are the messages of the prompt; where `status` is tie, neither is preferred",
        lambda row: isinstance(row.get("chosen"), str) and not str(row["chosen"]).startswith('[{"role"'),
    ),
    Layout(
        "Alpaca pairs",
        "pairs",
        [{"instruction", "chosen", "rejected"}, {"instruction", "input", "system", "chosen", "rejected"}],
        _alpaca,
        "LLaMA-Factory's preference data",
        "system, `history` and `instruction` with `input` are the messages of the prompt",
        lambda row: isinstance(row.get("chosen"), str) and not row.get("prompt"),
    ),
    Layout(
        "ShareGPT pairs",
        "pairs",
        [{"conversations", "chosen", "rejected"}],
        _sharegpt_pair,
        "LLaMA-Factory's preference data",
        "the prompt is `system` and `conversations`",
        _is_sharegpt,
    ),
    Layout(
        "ShareGPT turns",
        "prompts",
        [{"conversations"}],
        _sharegpt,
        "ShareGPT, teknium/OpenHermes-2.5",
        "no judgement: prompts for PPO, up to the last turn of the human",
        _is_sharegpt,
    ),
    Layout(
        "KTO",
        "labels",
        [{"prompt", "completion", "label"}],
        _labelled,
        "trl-lib/kto-mix-14k",
        "our own labels",
        lambda row: not {"rating", "ratings"} & set(row),
        plain=True,
    ),
    Layout(
        "imdb",
        "labels",
        [{"text", "label"}],
        _imdb,
        "stanfordnlp/imdb",
        "the text is an answer without a prompt, good where `label` is 1 or pos",
        _is_labelled_text,
    ),
    Layout(
        "Argilla",
        "ratings, labels or pairs",
        [{"id", "status"}],
        _argilla,
        "Argilla 2, `records.to_datasets()`",
        "submitted responses to the one question: numbers, good or bad, or one of two fields",
        lambda row: not _is_own(row) and any(name.endswith(".responses.status") for name in row),
    ),
    Layout(
        "Argilla 1",
        "ratings, labels or pairs",
        [{"external_id", "metadata"}],
        _argilla1,
        "Argilla 1, `FeedbackDataset`",
        "the same",
        lambda row: not _is_own(row) and any(_argilla1_answers(value) is not None for value in row.values()),
    ),
    Layout(
        "Label Studio",
        "ratings, labels or pairs",
        [{"data", "annotations"}],
        _label_studio,
        "Label Studio, export as JSON",
        "annotations by the one control: a rating, a choice of good or bad, or the left or right of two texts",
    ),
]
