"""The clients without a farm: what is sent again, how errors come back, whose key goes where."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from latentfarm.api.problems import problem_of
from latentfarm.client import calls, flows
from latentfarm.client.flows import Call, Flow, Reply, asked, run
from latentfarm.client.problems import refuse_problem
from latentfarm.client.profiles import Profile, Profiles, address_of, profiles_file, read_profiles, write_profiles
from latentfarm.jobs import WaitTimeout
from latentfarm.testing import MemoryFarm
from latentfarm_shared.errors import (
    AlreadyTaken,
    BadSettings,
    Busy,
    EmbeddingInUse,
    EmbeddingRefused,
    FarmError,
    InvalidField,
    NotAllowed,
    Unavailable,
    UnknownName,
    UsageError,
)
from latentfarm_shared.specs import JobSpec


class Script:
    """Answers with one reply after the other and remembers what it was asked."""

    def __init__(self, *replies: Reply) -> None:
        self.replies, self.calls = list(replies), list[Call]()

    def send(self, call: Call, _data: bytes) -> Reply:
        self.calls.append(call)
        return self.replies.pop(0)


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr("latentfarm.client.flows.time.sleep", slept.append)
    return slept


def full(after: str) -> Reply:
    return Reply(429, b"{}", {"retry-after": after})


SAFE, UNSAFE = Call("GET", "/x"), Call("POST", "/x")


@pytest.mark.parametrize(
    ("call", "replies", "sent"),
    [
        (SAFE, [Reply(200)], 1),
        (SAFE, [Reply(0, b"gone"), Reply(503), Reply(200)], 3),
        (SAFE, [Reply(502)] * 9, flows.TRIES),
        (SAFE, [Reply(500)], 1),
        (SAFE, [Reply(404)], 1),
        (UNSAFE, [Reply(0, b"gone")], 1),
        (UNSAFE, [Reply(503)], 1),
        (UNSAFE, [full("2"), Reply(202)], 2),
        (SAFE, [full("3600")], 1),
    ],
)
def test_calls_are_sent_again_where_that_is_safe_and_may_help(call: Call, replies: list[Reply], sent: int) -> None:
    script = Script(*replies)
    run(asked(call), script)
    assert len(script.calls) == sent


def test_retry_after_is_kept_to_and_pauses_grow(pauses: list[float]) -> None:
    run(asked(SAFE), Script(full("7"), Reply(0), Reply(0), Reply(0), Reply(200)))
    assert pauses[0] == 7
    assert all(
        flows.FIRST_PAUSE_S * 2**n / 2 <= pause <= flows.FIRST_PAUSE_S * 2**n for n, pause in enumerate(pauses[1:], 1)
    )


def test_waiting_keeps_to_its_time_while_the_farm_is_away(pauses: list[float]) -> None:
    script = Script(*[Reply(503, b"{}", {"retry-after": "30"})] * 9)
    with pytest.raises(WaitTimeout):
        run(calls.waited("abc", 0.0, lambda _status: None), script)
    assert sum(pauses) <= 1
    with pytest.raises(Unavailable):
        run(calls.waited("abc", None, lambda _status: None), Script(*[Reply(0, b"gone")] * 9))


def test_removal_whose_answer_was_lost_is_not_sent_again() -> None:
    script = Script(Reply(0, b"gone"))
    with pytest.raises(Unavailable):
        run(calls.remove_embedding("x", force=False), script)
    assert len(script.calls) == 1


def test_folder_is_taken_in_file_by_file(tmp_path: Path) -> None:
    for name in ("a.pt", "deep/b.safetensors", "readme.txt", "a.preview.png", "empty.pt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" if name != "empty.pt" else b"")
    with (tmp_path / "checkpoint.safetensors").open("wb") as file:
        file.truncate(calls.MOST_UPLOAD + 1)
    refusal = problem_of(UnknownName("x", "y")).model_dump_json().encode()
    script = Script(Reply(201, b'{"items": []}'), Reply(422, refusal))
    found = run(calls.add_all(tmp_path, None, None, allow_word=False), script)

    assert [call.file_name for call in script.calls] == ["a.pt", "b.safetensors"]
    assert [str(added.error) for added in found] == [
        f"{tmp_path / 'checkpoint.safetensors'}: has over 32 MiB, so it is no embedding",
        "there is no x called 'y'",
    ]
    with pytest.raises(InvalidField, match="not with a folder"):
        run(calls.add_all(tmp_path, "name", None, allow_word=False), Script())


def test_source_of_which_every_file_is_refused_says_why() -> None:
    problem = problem_of(EmbeddingRefused("x", "it is disabled")).model_dump()
    reply = Reply(201, json.dumps({"items": [{"source": "x", "embeddings": [], "error": problem}]}).encode())
    with pytest.raises(EmbeddingRefused, match="disabled"):
        run(calls.add_embedding("civitai:1", None, None, allow_word=False), Script(reply))


def test_standard_input_is_read_once_however_often_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    class Away(Script):
        def send(self, call: Call, data: bytes) -> Reply:
            sent.append(data)
            return super().send(call, data)

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b'{"prompt": "a"}')))
    status = MemoryFarm().generate("a").status().model_dump(mode="json")
    done = Reply(202, json.dumps({"jobs": [status]}).encode())
    assert run(calls.submit_file(Path("-"), anew=False, defaults={}), Away(Reply(503), done)) == [status["id"]]
    assert sent == [b'{"prompt": "a"}'] * 2


def test_one_file_that_cannot_be_read_stops_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.pt", "b.pt", "deep/a.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) if path.name != "a.pt" else read(Path("/nowhere")))
    found = run(calls.add_all(tmp_path, None, None, allow_word=False), Script(Reply(201, b'{"items": []}')))
    assert ["cannot be read" in str(found[0].error), "name of another file" in str(found[1].error)] == [True, True]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidField, match="no embeddings"):
        run(calls.add_all(tmp_path / "empty", None, None, allow_word=False), Script())


def test_submission_that_is_sent_again_has_the_same_id() -> None:
    script = Script(Reply(0, b"gone"), Reply(202, b'{"id": "abc"}'))
    assert run(calls.submit(JobSpec.check({"prompt": "a girl"})), script) == "abc"
    first, again = script.calls
    assert first.json["id"] == again.json["id"]


@pytest.mark.parametrize(
    "error",
    [
        InvalidField("steps", "should be at most 150", 7),
        UnknownName("sampler", "Eular", ("Euler",)),
        EmbeddingRefused("x", "it is disabled"),
        EmbeddingInUse("x", 3),
        AlreadyTaken("job", "abc", "is somebody else's"),
        NotAllowed("this API key has expired", is_known=False),
        Busy("too much is waiting", 5),
        Unavailable("Redis", "it is gone", "start it"),
    ],
)
def test_errors_come_back_as_what_they_were(error: FarmError) -> None:
    problem = problem_of(error)
    with pytest.raises(type(error)) as caught:
        refuse_problem(Reply(problem.status, problem.model_dump_json().encode()))
    told = caught.value

    assert str(told) == str(error)
    assert (told.code, told.exit_code) == (error.code, error.exit_code)
    names: Mapping[type[FarmError], tuple[str, ...]] = {
        InvalidField: ("field", "line"), UnknownName: ("kind", "name", "suggestions"),
        Busy: ("retry_after_s", "reason"), NotAllowed: ("reason", "is_known"), EmbeddingInUse: ("name", "jobs"),
        AlreadyTaken: ("kind", "name", "reason"), Unavailable: ("service", "reason", "advice"),
    }  # fmt: skip
    for name in names.get(type(error), ()):
        assert getattr(told, name) == getattr(error, name), name


def test_errors_without_details_are_told_in_words() -> None:
    problem = {"title": "steps: is too much", "code": "INVALID_FIELD", "field": "steps", "status": 422}
    with pytest.raises(InvalidField, match="is too much") as caught:
        refuse_problem(Reply(422, json.dumps(problem).encode()))
    assert (caught.value.field, caught.value.reason) == ("steps", "is too much")
    unknown = {"title": "the body is too large", "code": "TOO_LARGE", "status": 413}
    with pytest.raises(UsageError, match="too large") as other:
        refuse_problem(Reply(413, json.dumps(unknown).encode()))
    assert (other.value.code, other.value.exit_code) == ("TOO_LARGE", 2)


FLOWS: list[Callable[[], Flow[object]]] = [
    calls.whoami,
    lambda: calls.status("x"),
    lambda: calls.png("x", 0),
    calls.workers,
    lambda: calls.statuses(3, None),
    lambda: calls.limits("x"),
]


@pytest.mark.parametrize("flow", FLOWS, ids=range(len(FLOWS)))
@pytest.mark.parametrize(
    "reply", [Reply(200, b"<html>login</html>"), Reply(301, b"", {"location": "https://sso"}), Reply(200, b"[3]")]
)
def test_pages_of_something_else_are_no_answers(flow: Callable[[], Flow[object]], reply: Reply) -> None:
    with pytest.raises(Unavailable, match="not as a farm does"):
        run(flow(), Script(reply))


@pytest.mark.parametrize("details", [[{"a": 1}, "x"], [["a"], "x"], [5], "x", {"x": 1}, ["too", "many", 1, 2, 3, 4]])
def test_details_that_mean_nothing_here_leave_the_words(details: object) -> None:
    problem = {"title": "steps: is too much", "code": "INVALID_FIELD", "field": "steps", "details": details}
    with pytest.raises(InvalidField, match="is too much"):
        refuse_problem(Reply(422, json.dumps(problem).encode()))


@pytest.mark.parametrize("items", [5, [5], [{"error": {"x": 1}}], [{"error": 5}], [{"embeddings": 3}]])
def test_nonsense_about_files_is_no_answer(items: object) -> None:
    reply = Reply(201, json.dumps({"items": items}).encode())
    with pytest.raises(Unavailable, match="not as a farm does"):
        run(calls.add_embedding("civitai:1", None, None, allow_word=False), Script(reply))


@pytest.mark.parametrize("content", [b"<html>bad gateway</html>", b"", b"[]", b'{"title": 3}'])
def test_answer_of_something_that_is_no_farm_says_so(content: bytes) -> None:
    with pytest.raises(Unavailable, match="not as a farm does"):
        refuse_problem(Reply(404, content))


def test_profiles_are_kept_for_the_user_alone(tmp_path: Path) -> None:
    environ = {"LATENTFARM_CONFIG": str(tmp_path / "config")}
    found = Profiles(current="studio", profiles={"studio": Profile(url="https://farm", api_key="lf_x")})
    write_profiles(found, environ)
    write_profiles(found, environ)

    assert read_profiles(environ) == found
    assert profiles_file(environ).stat().st_mode & 0o077 == 0
    profiles_file(environ).write_text("{")
    with pytest.raises(BadSettings, match="log in again"):
        read_profiles(environ)


def test_key_of_one_farm_is_not_sent_to_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATENTFARM_CONFIG", str(tmp_path))
    with pytest.raises(InvalidField, match="login"):
        address_of(None, None)
    monkeypatch.setenv("LATENTFARM_API_KEY", "lf_mine")
    assert address_of("https://one", None) == ("https://one", None)
    monkeypatch.setenv("LATENTFARM_API_URL", "https://one")
    assert address_of("https://one/", None) == ("https://one", "lf_mine")
    assert address_of("https://one", "") == ("https://one", None)
    assert address_of("https://other", None) == ("https://other", None)
    assert address_of(None, None) == ("https://one", "lf_mine")
    monkeypatch.setenv("LATENTFARM_API_URL", "farm.example.com")
    assert address_of("https://other", None) == ("https://other", None)
    with pytest.raises(InvalidField, match="farm's address"):
        address_of(None, None)
    monkeypatch.delenv("LATENTFARM_API_URL")
    write_profiles(Profiles(current="a", profiles={"a": Profile(url="https://a", api_key="lf_a")}))
    assert address_of(None, None) == ("https://a", "lf_a")
    assert json.loads(profiles_file().read_text())["current"] == "a"
