"""Secrets are masked in what is stored and shown, and refused in recipes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.redact import MASK, MAX_MESSAGE, message, redact, refuse_secrets

SECRET = "hunter22hunter22"
TEXTS = [
    "WANDB_API_KEY={}", "export AWS_SECRET_ACCESS_KEY='{}'", "--password {}", "--hub-token={}",
    'password: "{}"', '{{"api_key": "{}"}}', "Authorization: Bearer {}", "authorization=Basic {}",
    "https://me:{}@example.org/x", "s3://{}@bucket/x", "https://h/x?X-Amz-Signature={}&a=1",
    "https://h/x?a=1&sig={}", "https://h/x?X-Goog-Credential={}", "https://h/x?access_token={}",
    "connecting with db_passwd={} failed", "SESSION_TOKEN={}\nnext line", "curl -H 'Bearer {}'",
]  # fmt: skip
FORMS = [
    "AKIA" + "ABCDEFGH12345678", "ghp_" + "a1" * 18, "hf_" + "a1" * 17, "sk-" + "a1" * 12,
    "xoxb-" + "1" * 12, "eyJ" + "a" * 12 + "." + "b" * 12 + "." + "c" * 12,
    "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_secrets_are_masked_by_what_stands_before_them(text: str) -> None:
    shown = redact(text.format(SECRET), env={})
    assert SECRET not in shown
    assert MASK in shown
    assert redact(shown, env={}) == shown
    with pytest.raises(UserError, match=r"x\.0 holds a secret") as refused:
        refuse_secrets({"x": [text.format(SECRET)]}, "recipe")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("secret", FORMS)
def test_secrets_are_known_by_their_form(secret: str) -> None:
    assert redact(f"before {secret} behind", env={}) == f"before {MASK} behind"


@pytest.mark.parametrize(
    "text",
    [
        "cannot read '/etc/passwd': give a file",
        "s3://bucket/photos", "https://example.org/a?page=2", "shards/digits", "rank 3 of 8",
        "loss 0.5, lr 0.1", "vit_base_patch16_224", "4 epochs", "key=value", "step 12: saved",
    ],
)  # fmt: skip
def test_ordinary_texts_stay(text: str) -> None:
    assert redact(text, env={}) == text
    refuse_secrets({"x": text}, "recipe")


def test_values_of_the_environment_are_masked_wherever_they_turn_up() -> None:
    env = {"MY_SERVICE_TOKEN": SECRET, "HOME": "/home/me", "EMPTY_TOKEN": "", "PIN_TOKEN": "1234"}
    assert (
        redact(f"error at {SECRET}/x in /home/me 1234", env)
        == f"error at {MASK}/x in /home/me 1234"
    )


def test_the_current_folder_is_no_password() -> None:
    env = {"PWD": "/home/ada/photos", "OLDPWD": "/home/ada", "DB_PWD": "correct horse"}
    text = "no folder /home/ada/photos; correct horse"
    assert redact(text, env=env) == f"no folder /home/ada/photos; {MASK}"


def test_values_of_secret_keys_are_masked_at_any_depth() -> None:
    found = redact({"a": [{"api_key": SECRET, "size": 3}], "tokens": 5, "token": True}, env={})
    assert found == {"a": [{"api_key": MASK, "size": 3}], "tokens": 5, "token": True}


def test_a_recipe_with_a_secret_is_refused_without_showing_it() -> None:
    with pytest.raises(UserError, match=r"data\.path holds a secret") as refused:
        load_recipe("digits", [f"data.path=https://me:{SECRET}@host/x"])
    assert SECRET not in str(refused.value)


def test_messages_have_an_end() -> None:
    assert len(message(UserError("x" * 10**6))) == MAX_MESSAGE
    assert SECRET not in message(UserError(f"password={SECRET}"))


HARD = st.sampled_from(
    ["token", "=", ":", " ", "--", "-", "eyJ", "://", "@", "a", "\n", "sk-", "."]
)


@settings(deadline=None)
@given(st.lists(HARD, max_size=30), st.integers(1, 20_000))
def test_long_texts_take_no_long_time(parts: list[str], times: int) -> None:
    text = "".join(parts) * times  # quadratic patterns would run into the tests' time limit
    assert isinstance(redact(text, env={}), str)
