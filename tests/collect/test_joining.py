from scepsy.collect.joining import BY_HEADER, BY_INFERENCE, BY_TRACEPARENT, Joiner

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
S = 1_000_000_000


def test_traceparent_counts_first():
    joiner = Joiner()
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-00", "x-session-id": "s"}
    place = joiner.join(headers, "1.2.3.4", 0)
    assert (place.trace, place.parent, place.joined_by, place.sampled) == (TRACE, SPAN, BY_TRACEPARENT, "00")
    joiner.leave(place, 1)
    assert joiner.finished(10**12 * S, everything=True) == []


def test_a_broken_traceparent_is_none():
    for broken in ("", "x", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-{SPAN}-01"):
        assert Joiner().join({"traceparent": broken}, "c", 0).joined_by == BY_INFERENCE


def test_a_conversation_is_an_execution_until_its_pause():
    joiner = Joiner(header_gap_s=60)
    first = joiner.join({"x-session-id": "a"}, "c", 0)
    other = joiner.join({"x-session-id": "b"}, "c", 1 * S)
    joiner.leave(first, 10 * S)
    joiner.leave(other, 10 * S)
    second = joiner.join({"x-session-id": "a"}, "another client", 69 * S)
    assert second.joined_by == BY_HEADER
    assert (second.trace, second.parent) == (first.trace, first.parent)
    assert other.trace != first.trace
    assert [group.trace for group in joiner.finished(71 * S)] == [other.trace]
    joiner.leave(second, 75 * S)
    third = joiner.join({"x-session-id": "a"}, "c", 136 * S)
    assert third.trace != first.trace
    (group,) = joiner.finished(137 * S)
    assert (group.trace, group.start_ns, group.end_ns, group.joined_by) == (
        first.trace,
        0,
        75 * S,
        BY_HEADER,
    )


def test_a_session_in_the_baggage_is_a_conversation():
    joiner = Joiner()
    places = [
        joiner.join({"baggage": baggage}, "c", 0)
        for baggage in ("session.id=s1", "user.id=u, session.id=s1;p=1", "gen_ai.conversation.id=s2", "mysession.id=s1")
    ]
    assert [place.joined_by for place in places] == [BY_HEADER] * 3 + [BY_INFERENCE]
    assert places[0].trace == places[1].trace != places[2].trace


def test_clients_are_told_apart_by_address_program_and_key():
    joiner = Joiner(inferred_gap_s=10)
    who = [("c", {}), ("d", {}), ("c", {"user-agent": "x"}), ("c", {"authorization": "Bearer 1"})]
    places = [joiner.join(headers, client, 0) for client, headers in who]
    assert len({place.trace for place in places}) == 4
    assert joiner.join({}, "c", 5 * S).trace == places[0].trace


def test_a_running_call_holds_its_execution_open():
    joiner = Joiner(inferred_gap_s=10)
    place = joiner.join({}, "c", 0)
    assert joiner.finished(100 * S) == []
    assert joiner.join({}, "c", 101 * S).trace == place.trace
    joiner.leave(place, 102 * S)
    assert joiner.finished(200 * S) == []
    joiner.leave(place, 103 * S)
    assert len(joiner.finished(200 * S)) == 1
    assert joiner.finished(300 * S) == []
    joiner.leave(place, 400 * S)  # of an execution that was told already


def test_at_the_end_everything_is_finished():
    joiner = Joiner()
    joiner.join({"x-scepsy-workflow": "research"}, "c", 0)
    assert [group.workflow for group in joiner.finished(1, everything=True)] == ["research"]


def test_nothing_secret_is_kept():
    joiner = Joiner()
    joiner.join({"authorization": "Bearer sk-secret", "x-session-id": ""}, "c", 0)
    joiner.join({"x-session-id": "private"}, "c", 0)
    assert "secret" not in repr(joiner._groups)
    assert "private" not in repr(joiner._groups)
