"""Errors that may pass are met by trying again, for a while; then they have a name."""

import errno
import pickle

import pytest
from botocore.exceptions import EndpointConnectionError, ReadTimeoutError

from dicmh_ray.archive import open_store, retrying
from dicmh_ray.archive.retrying import RetryPolicy, may_pass
from dicmh_ray.archive.store import MemoryStore
from dicmh_ray.errors import CommitUnknownError, StoreAccessError, StoreUnavailableError
from tests.archive.test_store import HttpError

QUICK = RetryPolicy(tries=4, base_s=0.0)


class Flaky(MemoryStore):
    """Fails a number of requests before it serves one."""

    def __init__(self, uri, error, failures):
        super().__init__(uri, retry=QUICK)
        self.error, self.failures, self.asked = error, failures, 0
        self._fs = self

    def fail(self, *args, **options):
        self.asked += 1
        if self.failures:
            self.failures -= 1
            raise self.error
        return b"0123456789"[options.get("start", 0) : options.get("end")]

    cat_file = pipe_file = info = find = rm_file = fail


@pytest.fixture
def address(tmp_path):
    return f"memory://{tmp_path.as_posix().strip('/')}"


@pytest.mark.parametrize(
    "error",
    [
        HttpError(500),
        HttpError(503),
        HttpError(429),
        TimeoutError(),
        ConnectionResetError(),
        ReadTimeoutError(endpoint_url="http://s3"),
        EndpointConnectionError(endpoint_url="http://s3"),
    ],
    ids=repr,
)
def test_three_failures_are_lived_through_and_the_fourth_has_a_name(address, error):
    store = Flaky(address, error, failures=3)
    assert store.get("x") == b"0123456789"
    assert store.asked == 4
    store = Flaky(address, error, failures=4)
    for ask in (
        lambda: store.get("data/x"),
        lambda: store.get_range("data/x", 1, 2),
        lambda: store.put("data/x", b""),
        lambda: store.size("data/x"),
        lambda: store.modified("data/x"),
        lambda: store.delete("data/x"),
        lambda: store.list("data/x"),
        lambda: store.list_objects("data/x"),
    ):
        store.failures = 4
        with pytest.raises(StoreUnavailableError, match=r"data/x: no answer in 4 tries") as caught:
            ask()
        assert (caught.value.name, caught.value.tries) == ("data/x", 4)
        assert isinstance(caught.value, ConnectionError)


@pytest.mark.parametrize("error", [FileNotFoundError("x"), HttpError(400), OSError(errno.ENOSPC)])
def test_what_will_not_pass_is_not_tried_again(address, error):
    store = Flaky(address, error, failures=3)
    with pytest.raises(OSError, match=str(error)) as caught:
        store.get("x")
    assert store.asked == 1
    assert not isinstance(caught.value, StoreUnavailableError)


def test_a_refusal_is_named_at_once(address):
    class NoCredentialsError(Exception):
        """As botocore's."""

    for error in (PermissionError("no"), NoCredentialsError("none found")):
        store = Flaky(address, error, failures=1)
        with pytest.raises(StoreAccessError, match="x: refused: "):
            store.get("x")
        with pytest.raises(StoreAccessError):
            Flaky(address, error, failures=9).put("x", b"")


def test_a_short_answer_is_asked_for_once_more_before_it_is_damage(address):
    store = Flaky(address, None, failures=0)
    answers = [b"34", b"3456"]
    store.cat_file = lambda *args, **options: answers.pop(0)
    assert store.get_range("x", 3, 4) == b"3456"


def test_no_message_tells_a_secret_of_the_options():
    options = {"key": "access-key-1", "client_kwargs": {"aws_session_token": "token-value-2"}}
    store = open_store("memory://somebody:password-3@host/x", options | {"skip": "visible"})
    told = store._describe(OSError("access-key-1 token-value-2 password-3 somebody visible"))
    assert told == "OSError: *** *** *** *** visible"
    assert "password-3" not in repr(store)


def test_waits_double_up_to_a_cap_and_are_random():
    policy = RetryPolicy(tries=8, base_s=1.0, cap_s=4.0)
    longest = [max(policy.wait_s(tried) for _ in range(300)) for tried in range(1, 6)]
    for found, cap in zip(longest, [1, 2, 4, 4, 4], strict=True):
        assert 0.8 * cap < found <= cap
    assert min(policy.wait_s(3) for _ in range(300)) < 0.4


def test_a_policy_is_checked_and_travels_with_its_store(address):
    for wrong in ({"tries": 0}, {"base_s": -1.0}, {"cap_s": -1.0}):
        with pytest.raises(ValueError, match="a retry policy needs"):
            RetryPolicy(**wrong)
    store = open_store(address, retry=RetryPolicy(tries=2))
    assert pickle.loads(pickle.dumps(store)).retry == RetryPolicy(tries=2)
    assert open_store(address).retry is retrying.DEFAULT_RETRY


def test_a_timeout_that_the_server_tells_may_pass():
    error = TimeoutError("RequestTimeout")
    error.__cause__ = HttpError(400)
    assert may_pass(error)
    assert not may_pass(HttpError(403))


def test_a_put_that_nobody_can_settle_is_tried_no_further(address):
    store = Flaky(address, TimeoutError(), failures=99)
    store._create = lambda path, data: store.fail()
    with pytest.raises(CommitUnknownError, match="c may have been published"):
        store.put_if_absent("c", b"")
    assert store.asked == 1 + 4
