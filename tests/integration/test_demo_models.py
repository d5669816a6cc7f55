"""`everruns demo` on a provider: what it claims of a model that nobody scripted, and what it says when it can claim nothing.

Each scene is a command of its own with a fake provider of its own. They mostly wait, so they run side by side, once; only their
starts, which are work, come two at a time.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime

import httpx
import pytest
from msgspec import Struct

from cli.demo_models import Wish, choose, without_default_keys
from cli.demo_story import HINTS, REAL, SIMULATED, DemoFailure, SeenEvent, Teller
from db.database import Database
from db.dev_models import choose_models
from domain.model import USER_ERROR_CODES
from domain.secret import Secret
from tests.conftest import API
from tests.fakes.anthropic_messages import FakeAnthropic
from tests.fakes.openai_chat import FakeGemini
from tests.fakes.openai_responses import FakeOpenAIResponses
from tests.fakes.script import Answer, Call, Usage
from tests.fakes.server import FakeProvider
from tests.processes import Command

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

KEY = "sk-planted-0123456789abcdef0123456789abcdef"
KEYS = {
    "openai": "DEFAULT_OPENAI_API_KEY",
    "anthropic": "DEFAULT_ANTHROPIC_API_KEY",
    "gemini": "DEFAULT_GEMINI_API_KEY",
}
SCENE_SECONDS = 150.0
"""A scene takes about 20; this is a busy machine's, with all of them on it."""

PIECES = [f"Ghent has the better weather, reason number {number}. " for number in range(40)]
WEATHER = Answer(
    text=["I look at both."],
    calls=[Call(name="get_weather", arguments=f'{{"location": "{city}"}}') for city in ("Ghent", "Amsterdam")],
)
BOOKING = Answer(
    calls=[
        Call(name="test_sleep", arguments='{"seconds": 2.5, "label": "looking for a table"}'),
        Call(name="test_effect_once", arguments='{"name": "invitation"}'),
    ]
)
LETTER = Answer(text=PIECES, piece_delay_seconds=0.05, usage=Usage(input=1_000, output=500))
"""Two seconds of streaming; it is long enough to be killed in after five pieces."""


class Scene(Struct, kw_only=True):
    fake: FakeProvider
    script: list[Answer]
    options: list[str] = []
    environment: dict[str, str] = {}
    code: int = -1
    out: str = ""
    err: str = ""

    async def play(self, starting: asyncio.Semaphore) -> None:
        async with self.fake.running():
            self.fake.play(*self.script)
            await self.run(self.fake.url, starting)

    async def run(self, address: str, starting: asyncio.Semaphore) -> None:
        vendor = self.fake.provider_type
        options = ["--provider", vendor, "--base-url", address, *self.options]
        async with AsyncExitStack() as stack:
            async with starting:
                command = Command("demo", *options, environment=self.environment or {KEYS[vendor]: KEY})
                demo = await stack.enter_async_context(command)
                await demo.printed("is a process of its own", SCENE_SECONDS)
            self.code = await demo.wait(SCENE_SECONDS)
            self.out, self.err = demo.out, demo.err

    def claims(self, mark: str) -> list[str]:
        proof = self.out.partition("The proof, after ")[2]
        return re.findall(rf"^  {mark} (.*)$", proof, re.MULTILINE)


@pytest.fixture(scope="module")
async def scenes() -> dict[str, Scene]:
    scenes = {
        "resumed": Scene(fake=FakeOpenAIResponses(), script=[WEATHER, BOOKING, LETTER]),
        "begun anew": Scene(
            fake=FakeAnthropic(),
            script=[WEATHER, LETTER, LETTER],
            options=["--key-env", "MY_KEY", "--model", "claude-sonnet-4-5"],
            environment={"MY_KEY": KEY},
        ),
        "no tool": Scene(fake=FakeGemini(), script=[Answer(text=["Ghent, ", "of course."])]),
        "refused": Scene(fake=FakeOpenAIResponses(), script=[Answer(failure="auth")]),
    }
    # The longest first.
    starting = asyncio.Semaphore(2)
    await asyncio.gather(*(scene.play(starting) for scene in scenes.values()))
    return scenes


def test_a_resumed_generation_is_proven_to_be_one_and_every_claim_is_shown(scenes: dict[str, Scene]) -> None:
    scene = scenes["resumed"]
    assert scene.code == 0, scene.out + scene.err
    assert scene.err == ""
    assert not scene.claims("✗")
    assert not scene.claims("–")
    claims = scene.claims("✓")
    assert len(claims) == 11
    (once,) = [claim for claim in claims if claim.startswith("one generation, no text taken back: response resp_")]
    assert once.endswith("0 times taken back")
    assert "the same generation goes on after" in scene.out
    assert "4 results for 4 calls" in scene.out
    assert "1 line(s) in the file that stands for the world, for 1 call(s)" in scene.out
    assert len(re.findall(r"SIGKILL  worker \d+ dies", scene.out)) == 2
    assert isinstance(scene.fake, FakeOpenAIResponses)
    assert scene.fake.generations_started == 3
    assert [one for one in scene.fake.requests if "starting_after" in one.query]
    assert KEY in str(scene.fake.requests[0].headers)


def test_the_flagship_answers_and_what_it_cost_is_told(scenes: dict[str, Scene]) -> None:
    out = scenes["resumed"].out
    assert "OpenAI · gpt-6.1-sol answers at http://127.0.0.1:" in out
    assert "s by OpenAI · gpt-6.1-sol:" in out
    assert re.search(
        r"✓ the turn tells what it cost: \$0\.\d{4} by the price list, 1,022 tokens in, 514 out$", out, re.MULTILINE
    )


def test_what_cannot_be_resumed_is_told_as_begun_anew_and_what_the_model_did_not_do_as_not_shown(
    scenes: dict[str, Scene],
) -> None:
    scene = scenes["begun anew"]
    assert scene.code == 0, scene.out + scene.err
    assert not scene.claims("✗")
    assert scene.claims("–") == [
        "the worker was killed in the middle of a tool, the turn went on: "
        "not shown: no tool ran long enough to be caught in",
        "no invitation was sent twice: not shown: the model sent none",
    ]
    assert "another worker takes it over after" in scene.out
    assert "what the provider takes for the answer that was cut off is not in it" in scene.out
    assert "one generation" not in scene.out, "it is not claimed where there are two"
    assert "Anthropic · claude-sonnet-4-5 answers" in scene.out
    assert len(scene.fake.requests) == 3
    assert KEY in str(scene.fake.requests[0].headers)


def test_a_model_that_calls_no_tool_and_writes_little_proves_little_and_the_demo_says_so(
    scenes: dict[str, Scene],
) -> None:
    scene = scenes["no tool"]
    assert scene.code == 0, scene.out + scene.err
    assert scene.claims("–") == [
        "the worker was killed in the middle of the model's answer, the turn went on: "
        "not shown: no text grew past 200 characters",
        "the worker was killed in the middle of a tool, the turn went on: not shown: the model called no tool",
        "one result per tool call: not shown: the model called no tool",
        "no invitation was sent twice: not shown: the model sent none",
    ]
    assert not scene.claims("✗")
    assert "SIGKILL" not in scene.out


def test_a_refused_key_is_told_in_one_line_with_its_code(scenes: dict[str, Scene]) -> None:
    scene = scenes["refused"]
    assert scene.code == 1
    assert scene.err == (
        "everruns: OpenAI · gpt-6.1-sol: There is a misconfiguration with the AI provider. Please contact support. "
        "(provider_misconfigured) The provider refused the key in DEFAULT_OPENAI_API_KEY: is it right, and may it use this "
        "model?\n"
    )
    assert "The proof" not in scene.out
    assert "Incorrect API key provided" not in scene.out, "the provider's own words are not for users"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("provider_unavailable", "The provider at http://here cannot be reached from here, or is in trouble."),
        ("provider_quota_exhausted", "The account of the key in MY_KEY has nothing left to spend."),
        ("content_filtered", ""),
    ],
)
def test_every_failure_is_told_in_words_for_users_with_its_code_and_what_can_be_done(code: str, told: str) -> None:
    teller = Teller(story=REAL, model="m", provider="P", address="http://here", key_variable="MY_KEY")
    data: dict[str, object] = {"error": "Sorry.", "error_code": code}
    failed = SeenEvent(id="", type="turn.failed", ts=datetime.now(UTC), sequence=1, data=data)
    assert str(teller.failure(failed)) == f"P · m: Sorry. ({code}) {told}".rstrip()


def test_every_hint_is_for_an_error_code_there_is() -> None:
    assert set(HINTS) <= set(USER_ERROR_CODES)


def test_no_key_is_ever_printed(scenes: dict[str, Scene]) -> None:
    assert not [name for name, scene in scenes.items() if KEY in scene.out + scene.err]


# What was asked for


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        (Wish(provider="nobody"), "--provider was given `nobody`; accepted: anthropic, azure_openai"),
        (Wish(provider="openai"), "--provider openai needs a key; set DEFAULT_OPENAI_API_KEY"),
        (Wish(provider="openrouter", model="x"), "--provider openrouter needs a key; name the variable that holds it"),
        (Wish(provider="openrouter", key_variable="UNSET"), "--key-env was given `UNSET`, which is not set"),
        (Wish(provider="openrouter", key_variable="MY_KEY"), "--provider openrouter needs a --model"),
        (Wish(provider="openai_completions", model="qwen3"), "--base-url is required"),
        (Wish(provider="anthropic", base_url="ftp://here"), "--base-url must be an http:// or https:// URL"),
        (Wish(provider="anthropic", base_url="http://me:secret@here"), "--base-url must not carry a user name"),
        (Wish(base_url="http://127.0.0.1"), "--base-url needs a --provider"),
        (Wish(key_variable="MY_KEY"), "--key-env needs a --provider"),
        (Wish(provider="anthropic", simulated=True), "--simulated and --provider exclude each other"),
    ],
)
def test_a_wish_that_cannot_be_fulfilled_is_refused_before_anything_starts(wish: Wish, told: str) -> None:
    with pytest.raises(DemoFailure) as refused:
        wish.check({"anthropic"}, {"MY_KEY": KEY})
    assert str(refused.value).startswith(told)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "wish",
    [
        Wish(),
        Wish(simulated=True),
        Wish(provider="anthropic"),
        Wish(provider="openai", key_variable="MY_KEY"),
        Wish(provider="openai_completions", base_url="http://127.0.0.1:11434/v1", model="qwen3"),
    ],
)
def test_a_wish_that_can_be_fulfilled_is_taken(wish: Wish) -> None:
    wish.check({"anthropic"}, {"MY_KEY": KEY})


def test_no_key_is_left_for_a_simulated_story() -> None:
    assert without_default_keys({"PATH": "/bin", **dict.fromkeys(KEYS.values(), KEY)}) == {"PATH": "/bin"}


# Which model that is


@pytest.fixture
async def api(database: Database, live_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """As the demo finds it when two default keys are set."""
    await choose_models(database, {name: Secret(KEY) for name in KEYED})
    async with httpx.AsyncClient(base_url=f"{live_url}{API}/", trust_env=False) as client:
        yield client


KEYED = ("anthropic", "gemini")


@pytest.mark.parametrize(
    ("wish", "chosen"),
    [
        (Wish(), "Anthropic · claude-opus-5-5"),
        (Wish(provider="gemini"), "Google Gemini · gemini-3.8-flash"),
        (Wish(model="claude-haiku-5-5"), "Anthropic · claude-haiku-5-5"),
        (Wish(provider="anthropic", model="claude-of-tomorrow"), "Anthropic · claude-of-tomorrow"),
    ],
)
async def test_the_first_key_or_what_was_asked_for_decides_on_the_provider_that_is_there(
    api: httpx.AsyncClient, wish: Wish, chosen: str
) -> None:
    teller = await choose(api, wish, keyed_types=KEYED, environ={})
    assert teller.name == chosen
    assert teller.story is REAL
    assert not teller.background
    assert teller.is_priced is ("tomorrow" not in chosen)
    model = (await api.get(f"models/{teller.model_id}")).json()
    assert f"{model['provider_name']} · {model['model_id']}" == chosen
    listed = (await api.get("providers")).json()["data"]
    assert sorted(one["provider_type"] for one in listed) == ["anthropic", "gemini", "llmsim"], "none was added"


@pytest.mark.parametrize("wish", [Wish(model="llmsim-model"), Wish(provider="llmsim")])
async def test_the_simulated_model_tells_the_scripted_story_whoever_asks_for_it(
    api: httpx.AsyncClient, wish: Wish
) -> None:
    teller = await choose(api, wish, keyed_types=KEYED, environ={})
    assert teller.story is SIMULATED
    assert (await api.get(f"models/{teller.model_id}")).json()["model_id"] == "llmsim-model"


async def test_a_provider_of_ones_own_gets_its_key_and_background_where_it_can_be_resumed(
    api: httpx.AsyncClient,
) -> None:
    wish = Wish(provider="openai", model="mine", base_url="http://127.0.0.1:9/v1", key_variable="MY_KEY")
    teller = await choose(api, wish, keyed_types=KEYED, environ={"MY_KEY": KEY})
    assert teller.background
    model = (await api.get(f"models/{teller.model_id}")).json()
    assert model["options"] == {"background": True}
    provider = (await api.get(f"providers/{model['provider_id']}")).json()
    assert (provider["base_url"], provider["api_key_set"]) == ("http://127.0.0.1:9/v1", True)


async def test_without_any_key_nothing_is_chosen_but_the_scripted_story(api: httpx.AsyncClient) -> None:
    assert await choose(api, Wish(), keyed_types=(), environ={}) == Teller(story=SIMULATED)
