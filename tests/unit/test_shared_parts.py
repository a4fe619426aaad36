import inspect
import pickle
from pathlib import Path

import pytest
from latentfarm_shared import errors
from latentfarm_shared.images import content_id, image_key
from latentfarm_shared.infotext import format_infotext
from latentfarm_shared.library import check_name
from latentfarm_shared.names import effective_schedule, resolve_sampler
from latentfarm_shared.records import Lock, family_of
from latentfarm_shared.settings import FarmFile, Settings
from latentfarm_shared.specs import JobSpec, expand

from tests.conftest import checkpoint, embedding

FARM = FarmFile(
    redis_url="redis://127.0.0.1:7000/0",
    redis_password="p w",
    s3_endpoint="http://127.0.0.1:7001",
    s3_access_key="a",
    s3_secret_key="s",
    s3_bucket="latentfarm",
    pid=1,
)

EXAMPLES = [
    errors.InvalidField("steps", "too many", 3),
    errors.UnknownName("embedding", "x", ("y",)),
    errors.EmbeddingRefused("x", "why"),
    errors.UnreadableFile("f", "empty"),
    errors.BadSettings("LATENTFARM_X", "bad"),
    errors.MissingExtra("local", "the embedded farm"),
    errors.Unavailable("Redis", "no answer", "start it"),
    errors.NoFarm("in /x"),
    errors.RenderError("broke"),
    errors.EmbeddingNotApplied("not there"),
    errors.RenderCanceled("stop"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
def test_error_survives_pickling_with_its_text(error: errors.FarmError) -> None:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - made here

    assert str(again) == str(error)
    assert again.args == error.args


def test_tree_at_the_top_of_errors_names_every_error() -> None:
    drawn = errors.__doc__ or ""
    classes = [
        name for name, item in vars(errors).items() if inspect.isclass(item) and item.__module__ == errors.__name__
    ]

    assert [name for name in classes if name not in drawn] == []


def test_farm_file_fills_in_what_the_environment_leaves_open(tmp_path: Path) -> None:
    FARM.write(tmp_path)

    settings = Settings.load(tmp_path, {})

    assert settings.broker_url == "redis://:p%20w@127.0.0.1:7000/0"
    assert (tmp_path / "farm.json").stat().st_mode & 0o077 == 0


def test_url_of_the_ready_line_takes_the_password_from_the_data_folder(tmp_path: Path) -> None:
    FARM.write(tmp_path)
    environ = {"LATENTFARM_REDIS_URL": FARM.redis_url, "LATENTFARM_DATA": str(tmp_path)}

    assert Settings.load(None, environ).redis_password == "p w"


def test_password_is_quoted_and_the_user_kept(tmp_path: Path) -> None:
    environ = {"LATENTFARM_REDIS_URL": "redis://alice@host:1/2", "LATENTFARM_REDIS_PASSWORD": "p/w#1"}

    assert Settings.load(tmp_path, environ).broker_url == "redis://alice:p%2Fw%231@host:1/2"


def test_local_farms_store_has_its_own_credentials(tmp_path: Path) -> None:
    FARM.write(tmp_path)

    settings = Settings.load(tmp_path, {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "elses"})

    assert (settings.s3_access_key, settings.s3_secret_key) == ("a", "s")


def test_another_farms_url_takes_nothing_from_the_data_folder(tmp_path: Path) -> None:
    FARM.write(tmp_path)

    settings = Settings.load(tmp_path, {"LATENTFARM_REDIS_URL": "redis://other:6379/0"})

    assert (settings.redis_password, settings.s3_endpoint) == (None, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LATENTFARM_REDIS_URL", "http://x"),
        ("LATENTFARM_SLOTS", "many"),
        ("LATENTFARM_SLOTS", "0"),
        ("LATENTFARM_GRACE_S", "-1"),
        ("LATENTFARM_DEVICE", "gpu"),
        ("LATENTFARM_S3_BUCKET", "Not A Bucket"),
        ("LATENTFARM_LOG_LEVEL", "loud"),
        ("LATENTFARM_REDIS_ULR", "redis://x"),
        ("LATENTFARM_REDIS_URL", "redis://host:abc"),
        ("LATENTFARM_REDIS_URL", "redis+socket:///tmp/x"),
        ("LATENTFARM_S3_ENDPOINT", "http://a b"),
    ],
)
def test_malformed_or_misspelt_variable_refuses_to_start(tmp_path: Path, name: str, value: str) -> None:
    FARM.write(tmp_path)

    with pytest.raises(errors.BadSettings, match=name):
        Settings.load(tmp_path, {name: value})


def test_no_farm_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(errors.NoFarm, match="latentfarm up"):
        Settings.load(tmp_path, {})


def test_infotext_has_a1111s_order_and_every_embedding_once() -> None:
    spec = JobSpec(prompt="a, x", negative_prompt="b", steps=20, seed=43, count=2, clip_skip=2)
    lock = Lock(checkpoint=checkpoint(), embeddings=(embedding("x"), embedding("y: z")))

    text = format_infotext(expand(spec, 1), lock)

    assert text == (
        "a, x\nNegative prompt: b\nSteps: 20, Sampler: Euler, Schedule type: Automatic, CFG scale: 7, Seed: 44, "
        "Size: 128x128, Model hash: ffffffffff, Model: demo, Clip skip: 2, RNG: CPU, "
        'TI hashes: "x: 0123456789ab, y z: 0123456789ab", Version: latentfarm 0.1.0'
    )


def test_content_id_follows_what_decides_the_pixels() -> None:
    lock = Lock(checkpoint=checkpoint(), embeddings=(embedding("x"),))
    spec = JobSpec(prompt="a", seed=1, count=3)
    base = content_id(expand(spec, 0), lock)

    assert content_id(expand(spec.model_copy(update={"count": 9, "lane": "batch"}), 0), lock) == base
    assert content_id(expand(spec, 1), lock) != base
    assert content_id(expand(spec.model_copy(update={"prompt": "b"}), 0), lock) != base
    assert content_id(expand(spec, 0), Lock(checkpoint=checkpoint())) != base
    assert image_key("j", 7) == "jobs/j/000007.png"


def test_sampler_aliases_and_automatic_schedules() -> None:
    assert resolve_sampler("k_euler_a") == ("Euler a", None)
    assert effective_schedule("DPM++ 2M", "Automatic") == "Karras"
    assert effective_schedule("Euler", "Automatic") == "Uniform"
    assert effective_schedule("Euler", "Karras") == "Karras"


def test_family_follows_from_the_widths() -> None:
    assert family_of({"clip_l": 768}, "anything") == "sd1"
    assert family_of({"clip_l": 768, "clip_g": 1280}, "anything") == "sdxl"
    assert family_of({"clip_l": 128}, "demo") == "demo"


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "<x>", "x" * 121, "tab\there"])
def test_unusable_name_is_refused(name: str) -> None:
    with pytest.raises(errors.InvalidField):
        check_name(name, "embedding")


@pytest.mark.parametrize("name", ["gasai yuno-15200", "16-token-negative-deliberate-neg", "猫"])
def test_names_people_use_are_taken(name: str) -> None:
    assert check_name(f" {name} ", "embedding") == name
