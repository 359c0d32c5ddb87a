"""Does the soak send what it says, always the same, and tell ties and what cannot be compared from differences?"""

import os
import signal
import threading
import time
from argparse import Namespace
from itertools import islice

import pytest

from benchmarks import soak, soak_client
from benchmarks.soak_check import compare
from benchmarks.soak_client import Answer, Tally, send
from benchmarks.soak_jobs import CHOICES, ENDINGS, KINDS, Job, Sent, Sizes, make_jobs, order
from sgl_lim.programs.endpoint import EndpointError

SIZES = Sizes(longest=200, output=16, tokens=(12, 512))


def test_a_pool_has_every_kind_and_a_seed_makes_it_again():
    jobs = make_jobs(40, 3, SIZES)
    assert jobs == make_jobs(40, 3, SIZES) != make_jobs(40, 4, SIZES)
    assert {job.kind for job in make_jobs(1, 0, SIZES)} == {job.kind for job in jobs} == set(KINDS)
    assert [job.number for job in jobs] == list(range(40))
    for job in jobs:
        assert (len(job.turns) > 1) == (job.kind == "session")
        for body in job.turns:
            assert 0 < len(body["input_ids"]) <= SIZES.longest and set(body["input_ids"]) <= set(range(12, 512))
            assert body["sampling_params"]["max_new_tokens"] <= SIZES.output
            assert (body["sampling_params"]["temperature"] == 0) == job.greedy
    heads = {tuple(job.turns[0]["input_ids"][: SIZES.longest // 2]) for job in jobs if job.kind == "fork"}
    assert len(heads) < sum(job.kind == "fork" for job in jobs), "some forks share a prefix"


def test_every_other_job_asks_for_an_adapter_where_there_are_some():
    jobs = make_jobs(40, 3, SIZES, ["one", "two"])
    asked = [{turn.get("lora_path") for turn in job.turns} for job in jobs]
    assert all(len(names) == 1 for names in asked)
    assert [names != {None} for names in asked] == [place % 2 == 1 for place in range(40)]
    assert set().union(*asked) == {None, "one", "two"}


def test_jobs_come_in_every_way_in_an_order_that_the_seed_decides():
    jobs = make_jobs(40, 3, SIZES)
    first = list(islice(order(jobs, 5), 400))
    assert first == list(islice(order(jobs, 5), 400)) != list(islice(order(jobs, 6), 400))
    assert {sent.ending for sent in first} == set(ENDINGS)
    assert all(sent.ending == "whole" for sent in first if sent.job.kind == "session" or sent.job.refused)
    forks = [place for place, sent in enumerate(first[:-1]) if sent.job.kind == "fork"]
    assert any(first[place + 1].job.kind == "fork" for place in forks)


def job_of(kind="long", turns=1, number=7):
    body = {"input_ids": [20] * 50, "sampling_params": {"temperature": 0, "max_new_tokens": 3}}
    return Job(number, kind, (body,) * turns)


def answer(tokens, *, job=None, turn=0, retracted=False, cached=0, context=200, top=(), earlier=()):
    return Answer(job or job_of(), turn, tuple(tokens), retracted, cached, context, top, earlier)


TOP = ({1: -0.5, 2: -0.5004, 3: -4.0}, {5: -0.1}, {6: -0.2})
"""Of an answer alone: its first token might as well have been 2."""


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (answer([1, 5, 6]), "equal"),
        (answer([2, 8, 9]), "ties"),
        (answer([3, 5, 6]), "differences"),
        (answer([9, 5, 6]), "differences"),
        (answer([1, 5]), "differences"),
        (answer([1, 5, 6, 7]), "differences"),
        # Prefilled again after a retraction: densely, where decode was sparse.
        (answer([3, 5, 6], retracted=True), "aside"),
        (answer([3, 5, 6], retracted=True, context=128), "differences"),
    ],
)
def test_an_answer_is_compared_with_that_alone(found, kind):
    result = compare([found], lambda job: [answer([1, 5, 6], top=TOP)], tie=1e-3, dense_up_to=128)
    counted = {"equal": result.equal, "ties": len(result.ties), "differences": len(result.differences)}
    assert {**counted, "aside": result.aside} == {name: int(name == kind) for name in (*counted, "aside")}
    assert result.compared == (kind != "aside")
    for one in result.ties:
        assert "token 0 of 3: 2, alone 1 (4.00e-04 below" in str(one)


def test_a_turn_whose_history_was_prefilled_again_is_no_difference():
    job = job_of("session", turns=2)
    alone = [answer([1], job=job, top=TOP[:1]), answer([5], job=job, turn=1, cached=60, top=TOP[1:2])]
    found = [answer([1], job=job), answer([6], job=job, turn=1, cached=40), answer([6], job=job, turn=1, cached=60)]
    result = compare(found, lambda job: alone, tie=0, dense_up_to=128)
    assert (result.equal, result.aside, len(result.differences)) == (1, 1, 1)


def test_a_turn_after_another_answer_has_another_prompt():
    """The earlier turn counts, as a tie or a difference; the later one cannot."""
    job = job_of("session", turns=2)
    its = [answer([1, 5, 6], job=job, top=TOP), answer([4], job=job, turn=1, top=({4: -0.1},), earlier=((1, 5, 6),))]
    tied = [answer([2, 8, 9], job=job), answer([7], job=job, turn=1, earlier=((2, 8, 9),))]
    same = [answer([1, 5, 6], job=job), answer([7], job=job, turn=1, earlier=((1, 5, 6),))]
    result = compare([*tied, *same], lambda _: its, tie=1e-3, dense_up_to=None)
    assert (result.equal, len(result.ties), result.aside) == (1, 1, 1)
    assert [difference.answer for difference in result.differences] == same[1:]


def test_a_session_tells_what_its_turns_answered(monkeypatch):
    def reply(body):
        return "name" if "input_ids" not in body else {**item(id="r"), "output_ids": [len(body["input_ids"])]}

    tally = replies(monkeypatch, reply)
    monkeypatch.setattr(soak_client, "post", lambda *_: None)
    job = Job(7, "session", tuple({"input_ids": [20] * length} for length in (3, 4, 5)))
    answers = soak_client.session("url", job, tally)
    assert [one.earlier for one in answers] == [(), ((3,),), ((3,), (4,))]


def test_jobs_are_asked_alone_once_and_sampled_ones_not_at_all():
    asked = []

    def ask(job):
        asked.append(job.number)
        return [answer([1], top=TOP)]

    sampled = answer([4], job=job_of("sampled", number=8))
    assert compare([answer([1]), sampled, answer([1])], ask, tie=0, dense_up_to=None).equal == 2
    assert asked == [7]


def replies(monkeypatch, reply):
    """Let the server answer each request by `reply(body)`; it may raise an error."""
    monkeypatch.setattr(soak_client, "request_json", lambda url, body, **options: reply(body))
    return Tally()


def item(reason="length", **meta):
    plain = {"finish_reason": {"type": reason}, "cached_tokens": 0, "prompt_tokens": 50, "num_retractions": 0}
    return {"output_ids": [1, 2], "meta_info": {**plain, **meta}}


def test_a_hopeless_grammar_has_to_be_refused_or_to_get_no_answer(monkeypatch):
    def refuse(body):
        raise EndpointError("http://host/generate: HTTP 400 Bad Request")

    def end(body):
        return {**item("stop"), "output_ids": [2]}

    for reply, refused, failures in ((refuse, 1, 0), (end, 1, 0), (lambda body: item(), 0, 1)):
        tally = replies(monkeypatch, reply)
        send("url", Sent(job_of("hopeless"), "whole", 0), tally)
        assert (tally.refused, len(tally.failures)) == (refused, failures)


def test_an_error_and_an_answer_that_was_ended_are_failures(monkeypatch):
    def fail(body):
        raise EndpointError("http://host/generate: no answer")

    for reply in (fail, lambda body: item("abort")):
        tally = replies(monkeypatch, reply)
        send("url", Sent(job_of(), "whole", 0), tally)
        assert len(tally.failures) == 1 and not tally.answers and "long 7 (whole)" in tally.failures[0]


def test_all_answers_of_a_parallel_job_are_kept(monkeypatch):
    tally = replies(monkeypatch, lambda body: [item(num_retractions=n) for n in range(CHOICES)])
    send("url", Sent(job_of("parallel"), "whole", 0), tally)
    assert [(one.tokens, one.retracted, one.context) for one in tally.answers] == [
        ((1, 2), n > 0, 52) for n in range(CHOICES)
    ]


LOAD = Namespace(seconds=60.0, clients=3, seed=0, no_pauses=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_load_and_what_was_answered_stays(monkeypatch, capsys, number):
    def send(url, sent, tally):
        tally.count("requests")
        time.sleep(0.01)
        if tally.requests == 9:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(soak, "send", send)
    before, tally = signal.getsignal(number), Tally()
    lasted = soak.run_load("", make_jobs(8, 0, SIZES), LOAD, tally)
    assert lasted < 20 and tally.requests >= 9
    assert f"the load ended after {lasted} s" in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_a_load_ends_when_all_clients_have_given_up(monkeypatch):
    monkeypatch.setattr(soak, "send", lambda url, sent, tally: tally.failures.append("gone"))
    tally = Tally()
    assert soak.run_load("", make_jobs(8, 0, SIZES), LOAD, tally) < 20
    assert len(tally.failures) > LOAD.clients


def test_pauses_end_with_the_load(monkeypatch):
    ended = threading.Event()
    ended.set()
    monkeypatch.setattr(soak_client, "post", lambda *_: pytest.fail("the load has ended"))
    soak_client.pause_now_and_then("", 0, ended, Tally())


def test_all_differences_are_told_by_job_and_turn(capsys):
    differ = [answer([3, 5, 6])] * 30 + [answer([9, 5, 6], job=job_of("fork", number=8))]
    result = compare(differ, lambda job: [answer([1, 5, 6], job=job, top=TOP)], tie=1e-3, dense_up_to=128)
    soak.report(Tally(), result)
    told = capsys.readouterr().err
    assert "differs: long 7, turn 0: 30 times" in told and "differs: fork 8, turn 0: 1 times" in told
    assert "differs: and 11 more" in told
