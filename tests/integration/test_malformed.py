"""What hostile and clumsy users send: each is refused at once, in few words that name the place, and nothing is queued."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from latentfarm.farm import DirectFarm
from latentfarm.jobfiles import InvalidRows
from latentfarm_demo import CHECKPOINT
from latentfarm_shared.errors import UsageError
from latentfarm_shared.specs import JobSpec

LIMIT_S, LIMIT_TEXT, LIMIT_MB, LIMIT_TABLE_MB = 5.0, 2000, 150, 60
pytestmark = pytest.mark.timeout(LIMIT_S, func_only=True)

NAN, INF = float("nan"), float("inf")
HUGE, GIANT = 10**400, 10**5000  # more than a float holds, more than Python writes out
ZERO_WIDTH, RIGHT_TO_LEFT, SURROGATE = "\u200b", "\u202e", "\ud800"
INDEX = "0" * 64
Files = dict[str, str | bytes]
Refuse = Callable[..., None]


def long() -> str:
    """Return ten megabytes, made anew so that no table holds them."""
    return "x" * 10_000_000


@dataclass(frozen=True)
class Bug:
    """A case that the farm does not yet refuse as it should, and what is wrong."""

    reason: str
    given: tuple[Any, ...]


def bug(reason: str, *given: Any) -> Bug:
    return Bug(reason, given)


BESIDE = "what of rows and wildcards cannot be opened or is no UTF-8 is told of the sweep file, and without a line"
COLUMNS = "the place is where the row ends, or a column that is not the field's"
DIGITS = "a default beyond what Python writes out raises ValueError"
FIRST_LINE = "what the YAML reader cannot convert is said to stand in line 1"
IGNORED = "rows among the defaults of a table are passed over"
LETTER = "a wildcard of one letter swallows what stands before the next one"
LONG_WILDCARD = "a wildcard with a name beyond 102 characters is drawn as plain text"
NO_LINE = "what is found behind the reader has no line"
QUOTES = "a quote left open in CSV is told where the file ends, not where it opens"
SECTION = "what is wrong between axes is said to stand in matrix, or in line 1"
TRUTH = "what a sweep file's fields are checked for before they are read (truth values) is said to stand in line 1"


# ---- one wrong field


NO_NUMBER: tuple[Any, ...] = ("many", "", [], [1], {}, NAN, INF, b"\xff")
NO_COUNT = (*NO_NUMBER, 2.5, "1e999", HUGE, GIANT)
NO_TEXT = (5, ["a"], {"a": "b"}, "a\0b", SURROGATE, b"\xff\xfe", long)
HIDDEN = ("a\nb", "a\0b", f"a{ZERO_WIDTH}b", f"{RIGHT_TO_LEFT}ab")
NO_LIST = (5, "red", {"a": 1}, [5], [None], [["a"]])

FIELDS: dict[str, tuple[object, ...]] = {
    "prompt": (*NO_TEXT, None, "x" * 20_001),
    "negative_prompt": (*NO_TEXT, "x" * 20_001),
    "steps": (*NO_COUNT, True, None, 0, -1, 151),
    "cfg_scale": (*NO_NUMBER, True, None, -0.1, 30.5, -INF, HUGE, "1e999"),
    "seed": (*NO_COUNT, True, None, -2, 2**32),
    "variation_seed": (-2, 2**32, NAN),
    "variation_strength": (*NO_NUMBER, True, -0.1, 1.1),
    "ensd": (-1, 2**32, 0.5),
    "width": (*NO_COUNT, 0, 8, 129, -128, 2056, 10**9),
    "height": (0, 129, -128, 2056, "128px"),
    "clip_skip": (0, 13, 1.5, True),
    "count": (*NO_COUNT, True, 0, -1, 1_000_001),
    "priority": (101, -101, 1.5, True),
    "approve_after": (0, -1, "soon", True),
    "variants": (0, -1, 1_000_001),
    "dynamic_seed": (-1, 2**32),
    "expires_in": (*NO_NUMBER, "-5m", "soon", "1e400", 0, -5, 10**12, HUGE, True),
    "max_runtime": ("-5m", NAN, 0),
    "keep": ("forever", INF, -1),
    "sampler": ("Oiler", "", 5, None, "Euler\0", long, ["Euler"]),
    "schedule": ("Sometimes", 5, None, "x" * 100_000, "\0"),
    "rng": ("GPU", 1),
    "lane": ("express", None),
    "emphasis": ("Loud", True),
    "on_missing": ("explode", False),
    "dynamic": ("maybe", True),
    "order": ("backwards", 1),
    "expander": (0, 3, "2"),
    "tiling": ("maybe", 2, None, []),
    "reuse": ("perhaps", -1),
    "model": ("", None, 5, "x" * 201, long, "nope", f"de{ZERO_WIDTH}mo", "demo\0", "../../etc/passwd", "con"),
    "name": (*HIDDEN, "x" * 201, 5, ["a"], long),
    "key": (*HIDDEN, "", "x" * 301, 5, long),
    "tags": (*NO_LIST, *([text] for text in HIDDEN), [""], ["x" * 10_000], ["a"] * 51, [long]),
    "metadata": (["a"], "a=b", {"a": 1}, {"a": None}, {"a": ["b"]}, *({text: "b"} for text in HIDDEN),
                 {"a": "\0"}, {SURROGATE: "b"}, {"a": SURROGATE},
                 {f"{n}": "x" for n in range(51)}, {"a" * 5000: 1}),
    "requires": (*NO_LIST, ["memory:lots"], ["memory:"], ["memory:."], ["memory:-1"], ["memory:16:2"], ["a b"], ["\0"],
                 ["x" * 101], ["a"] * 21, ["a\n"]),
    "embeddings": (*NO_LIST, [{}], [{"name": ""}], [{"name": "a", "side": "up"}], [{"name": "a", "weight": 2}]),
    "seed_resize": (5, "64x64", [64], [7, 64], [64, 64, 64], [-8, 8], [NAN, 8], [4096, 8]),
    "hires": (5, [], {"scale": 0.5}, {"scale": 9}, {"scale": NAN}, {"scale": True}, {"width": 12}, {"height": 4104},
              {"steps": -1}, {"denoising_strength": 0.001}, {"denoising_strength": 2}, {"upscaler": ""}, {"nope": 1},
              {"prompt": "\0"}, {"prompt": long}),
    "options": (5, {"eta": -1}, {"eta": NAN}, {"s_churn": 1e6}, {"rho": INF}, {"uni_pc_order": 0}, {"nope": 1},
                {"sigma_min": 5, "sigma_max": 1}, {"pad_conds": "yes"}, {"uni_pc_order": True}),
    "compat": ("break_as_word", ["new"], [5]),
    "without": (*NO_LIST,),
    "pack": (5, {}, {"name": ""}, {"name": "a", "vectors": 65}, {"name": "a", "steps": 0}, {"name": "a", "vectors": NAN}),
    "axes": (5, "steps", [5], [{"field": "steps"}], [{"values": [1]}], [{"field": "", "values": [1]}],
             [{"field": "steps", "values": []}], [{"field": "steps", "values": 5}], [{"field": "steps", "values": [None]}],
             [{"field": "steps", "values": [[1]]}], [{"field": "steps", "values": [1], "more": 1}],
             [{"field": "steps", "values": {"first": 9, "last": 1}}], [{"field": "steps", "values": {"first": 1}}],
             [{"field": "seed", "values": {"first": 1, "last": 99_999_999_999}}],
             [{"field": "seed", "values": {"first": 1, "last": 9, "step": 0}}],
             [{"field": "seed", "values": {"first": -1, "last": 9}}],
             [{"field": "seed", "values": range(10_001)}], [{"field": "x" * 301, "values": [1]}],
             [{"field": f"replace:{n}", "values": [1]} for n in range(17)]),
    "zipped": (5, [{"field": "steps", "values": []}]),
    "include": (5, [5], [{"steps": None}], [{"steps": [1]}], [{}] * 1001),
    "exclude": (5, [5], [{"steps": None}], [{"steps": 1}] * 65),
    "rows": (5, [], {}, {"total": 0, "chunk": 1, "index": INDEX}, {"total": 2, "chunk": 1, "index": "../../etc/passwd"},
             {"total": 1_000_001, "chunk": 1, "index": INDEX}, {"total": 2, "chunk": 0, "index": INDEX},
             {"total": 2, "chunk": 2, "index": INDEX}),
    "wildcards": (5, "a", [{"name": "a"}], [{"name": "", "sha256": INDEX}], [{"name": "a", "sha256": "../../etc/passwd"}],
                  [{"name": "a", "sha256": INDEX}] * 201),
}  # fmt: skip


# ---- fields that do not go together


def axes(*pairs: tuple[str, object], **values: object) -> dict[str, object]:
    return {"axes": [{"field": field, "values": some} for field, some in pairs]} | values


def zipped(*pairs: tuple[str, object], **values: object) -> dict[str, object]:
    return {"zipped": [{"field": field, "values": some} for field, some in pairs]} | values


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


THOUSAND = list(range(1, 1001))
HIRES = {"scale": 4}
SPECS: dict[str, tuple[Mapping[Any, object], str] | Bug] = {
    "unknown field": ({"promt": "a"}, "promt.*did you mean prompt"),
    "unknown field of 10 MB": ({"p" * 10_000_000: "a"}, "is not a field"),
    "unknown field with a null character": ({"steps\0": 1}, "is not a field"),
    "field hidden by a zero-width space": ({f"st{ZERO_WIDTH}eps": 1}, "is not a field"),
    "seed and count beyond the last seed": ({"seed": 2**32 - 1, "count": 2}, "seed"),
    "variation seed and count beyond the last": ({"variation_strength": 0.5, "variation_seed": 2**32 - 1, "count": 2}, "seed"),
    "more than a million images by variants": ({"variants": 2, "count": 1_000_000, "seed": 1}, "variants"),
    "larger than a job may be, by metadata": ({"metadata": {f"{n}": "x" * 1000 for n in range(50)}, "prompt": "x" * 19_000}, "job: is larger"),
    "larger than a job may be, by axes": (axes(("replace:a", [f"{n:100}" for n in range(1000)])), "job: is larger"),
    "hires pass too large": ({"hires": {"scale": 8}, "width": 1024}, "hires"),
    "hires pass too thin": ({"hires": {"width": 4096}, "width": 2048, "height": 64, "steps": -1}, "steps"),
    "pack of several": ({"pack": {"name": "a-1"}, "count": 2}, "pack"),
    "pack of nothing": ({"pack": {"name": "a-1"}, "prompt": " "}, "pack"),
    "pack of what changes": ({"pack": {"name": "a-1"}, "prompt": "[a:b:0.5]"}, "pack"),
    "axis twice": (axes(("steps", [1]), ("steps", [2])), "'steps' stands twice"),
    "axis in matrix and zip": (axes(("steps", [1])) | zipped(("steps", [2])), "'steps' stands twice"),
    "unknown axis": (axes(("stepz", [1])), "'stepz' is no axis.*steps"),
    "unknown axis of 300": (axes(("z" * 300, [1])), "is no axis"),
    "axis of counts": (axes(("count", [1, 2])), "'count' is no axis"),
    "axis of truth": (axes(("steps", [True])), "steps|values"),
    "axis of nothing": (axes(("steps", [NAN])), "steps"),
    "axis of infinity": (axes(("cfg_scale", [INF])), "cfg_scale"),
    "axis out of range": (axes(("steps", [1, 151])), "steps.*151"),
    "axis of huge numbers": (axes(("seed", [HUGE])), "seed"),
    "axis of unprintable numbers": (axes(("seed", [GIANT])), "seed"),
    "axis of halves": (axes(("steps", [1.5])), "steps"),
    "axis of texts that are no numbers": (axes(("steps", ["many"])), "steps"),
    "axis of seeds that run over": (axes(("seed", [2**32 - 1]), count=2), "seed"),
    "axis of null characters": (axes(("prompt", ["a\0b"])), "prompt|null"),
    "axis of surrogates": (axes(("prompt", [SURROGATE])), "half a character"),
    "axis of long prompts": (axes(("prompt", ["x" * 20_001])), "prompt"),
    "axis of 10 MB": (axes(("prompt", [long])), "prompt"),
    "axis of unknown samplers": (axes(("sampler", ["Euler", "Oiler"])), "Oiler"),
    "axis of long unknown samplers": (axes(("sampler", ["x" * 60_000])), "sampler"),
    "axis of unknown models": (axes(("model", ["demo", "nope"])), "model.*nope"),
    "axis of one model twice": (axes(("model", ["demo", "DEMO"])), "model"),
    "axis of empty models": (axes(("model", [""])), "model"),
    "axis of texts in place of nothing": (axes(("replace:", ["b"])), "replace"),
    "axis in place of what is not there": (axes(("replace:purple", ["b"])), "purple"),
    "axis of null characters in place of a text": (axes(("replace:a", ["\0"])), "replace|null"),
    "axis of strengths of nothing": (axes(("strength:", [1, 2])), "strength"),
    "axis of strengths of what is not there": (axes(("strength:style-9", [1])), "style-9"),
    "axis of strengths in words": (axes(("strength:a", ["big"])), "strength"),
    "axis of strengths beyond all": (axes(("strength:a", [11])), "strength"),
    "axis of strengths that are none": (axes(("strength:a", [NAN])), "strength"),
    "axis of an unknown kind": (axes(("repeat:a", [1])), "'repeat:a' is no axis"),
    "zip of different lengths": (zipped(("steps", [1, 2]), ("cfg_scale", [1, 2, 3])), "one length.*steps' 2, 'cfg_scale' 3"),
    "zipped models apart": (zipped(("model", ["a", "b", "a"]), ("steps", [1, 2, 3])), "models should stand together"),
    "more than a million images": (axes(("seed", {"first": 1, "last": 1_000_001})), "1000001 images"),
    "more than a million images by count": (axes(("seed", [1, 2]), count=600_000), "1200000 images"),
    "more than a million images by variants of a sweep": (axes(("steps", [1, 2]), variants=600_000), "variants"),
    "a trillion images": (axes(("seed", THOUSAND), ("ensd", THOUSAND), ("variation_seed", THOUSAND)), "1000000000 images"),
    "exclude that names nothing": (axes(("steps", [1, 2]), exclude=[{}]), "exclude names nothing"),
    "exclude that names no axis": (axes(("steps", [1, 2]), exclude=[{"seed": 1}]), "exclude names 'seed'"),
    "exclude that is never met": (axes(("steps", [1, 2]), exclude=[{"steps": 3}]), "exclude: steps"),
    "exclude of everything": (axes(("steps", [1]), exclude=[{"steps": 1}]), "0 images"),
    "exclude of everything, bit by bit": (axes(("steps", [1, 2]), exclude=[{"steps": 1}, {"steps": 2}]), "0 images"),
    "exclude without axes": ({"exclude": [{"steps": 1}]}, "exclude"),
    "corners first with excludes": (axes(("steps", [1, 2]), exclude=[{"steps": 2}], order="corners-first"), "corners-first"),
    "corners first with includes": (axes(("steps", [1, 2]), include=[{"steps": 3}], order="corners-first"), "corners-first"),
    "include of a model": (axes(("steps", [1]), include=[{"model": "demo"}]), "include cannot set 'model'"),
    "include of rows": (axes(("steps", [1]), include=[{"rows": 1}]), "include cannot set 'rows'"),
    "include of counts": (axes(("steps", [1]), include=[{"count": 5}]), "include cannot set 'count'"),
    "include out of range": (axes(("steps", [1]), include=[{"steps": 0}]), "steps"),
    "include of truth": (axes(("steps", [1]), include=[{"steps": True}]), "steps"),
    "include of null characters": (axes(("steps", [1]), include=[{"prompt": "\0"}]), "prompt|null|include"),
    "include of a size that does not fit": (axes(("steps", [1]), include=[{"width": 2048}], hires=HIRES), "hires|width"),
    "include beside models": (axes(("model", ["demo", "b"]), include=[{"steps": 1}]), "models goes with neither"),
    "corner too large for its hires pass": (axes(("width", [128, 2048]), ("height", [128, 64]), hires=HIRES), "width 2048"),
    "corner too large by one side": (axes(("height", [128, 1032]), hires=HIRES), "height 1032"),
    "sizes in words": (axes(("width", ["128", "wide"])), "width"),
    "sizes that mix words and numbers": (axes(("width", [128, "wide"])), "width"),
    "rows that nobody wrote": ({"rows": {"total": 2, "chunk": 2, "index": INDEX}}, "rows"),
    "wildcards that nobody wrote": ({"prompt": "__a__", "dynamic": "random", "wildcards": [{"name": "a", "sha256": INDEX}]}, "wildcard"),
    "rows that something else is": ({"rows": {"total": 2, "chunk": 2, "index": "e3b0c44298fc1c149afbf4c8996fb924"
                                                                              "27ae41e4649b934ca495991b7852b855"}}, "rows"),
    "templates of a prompt axis": (axes(("prompt", ["{a|b}"]), dynamic="all"), "dynamic 'all'"),
    "template left open": ({"prompt": "{a|b", "dynamic": "all"}, "prompt: column 1.*never closed"),
    "template left open, deep": ({"prompt": "{" * 20_000, "dynamic": "random"}, "prompt"),
    "template without weights": ({"prompt": "{0::a|0::b}", "dynamic": "all"}, "every weight is 0"),
    "template of more than there are weights": ({"prompt": "{2$$0::a|1::b}", "dynamic": "random"}, "weight"),
    "template of endless weights": ({"prompt": "{" + "9" * 400 + "::a|b}", "dynamic": "random"}, "weight"),
    "template from more to less": ({"prompt": "{3-1$$a|b|c}", "dynamic": "all"}, "column 1"),
    "template of no number": ({"prompt": "{$$a|b}", "dynamic": "all"}, "column 1"),
    "template of too many at once": ({"prompt": "{999$$a|b}", "dynamic": "all"}, "column 1"),
    "template of too many sets": ({"prompt": "{1-8$$" + "|".join("abcdefghijklmnopqrstuvwxyz") + "}", "dynamic": "all"},
                                  "prompt.*too much"),
    "template of too many texts": ({"prompt": "{a|b|c|d}" * 11, "dynamic": "all"}, "dynamic.*4194304 texts"),
    "template of texts beyond counting": ({"prompt": "{a|b|c|d}" * 2000, "dynamic": "all"}, "dynamic"),
    "template and count beyond a million": ({"prompt": "{a|b|c|d}" * 9, "dynamic": "all", "count": 5}, "images"),
    "unknown wildcard": ({"prompt": "a, __animals__", "dynamic": "random"}, "prompt.*wildcard.*animals"),
    "wildcard that climbs": ({"prompt": "__a/../../etc/passwd__", "dynamic": "random"}, "wildcard"),
    "wildcard that climbs at once": ({"prompt": "__../../etc/passwd__", "dynamic": "random"}, "wildcard"),
    "wildcard from the root": ({"prompt": "__/etc/passwd__", "dynamic": "random"}, "wildcard"),
    "wildcard in a negative prompt": ({"negative_prompt": "__a__", "dynamic": "random"}, "negative_prompt.*wildcard"),
    "embedding that is not there": ({"prompt": "a <no-such-thing-9>"}, "no-such-thing-9"),
    "embedding asked for that is not there": ({"embeddings": [{"name": "../../etc/passwd"}]}, "embedding.*passwd"),
    "embedding with a null character": ({"embeddings": [{"name": "a\0b"}]}, "embedding"),
    "embedding of 200 characters": ({"embeddings": [{"name": "x" * 200}]}, "embedding"),
    "embedding of a long name in the prompt": ({"prompt": f"a <{'x' * 10_000}>"}, "embedding"),
    "network": ({"prompt": f"a <lora:{'x' * 10_000}:1>"}, "lora"),
    "parts joined by AND": ({"prompt": " AND ".join("a" * 100)}, "prompt.*AND"),
    "number as a field": ({5: 1}, "5"),
    "lists in lists": ({"prompt": nested(5000)}, "prompt"),
    "exclude of truth": (axes(("steps", [1, 2]), exclude=[{"steps": True}]), "steps"),
    "exclude of 9,000 characters": (axes(("steps", [1, 2]), exclude=[{"z" * 9000: 1}]), "exclude names"),
    "exclude of a value of 9,000 characters": (axes(("steps", [1]), exclude=[{"steps": "z" * 9000}]), "exclude"),
    "include of 9,000 characters": (axes(("steps", [1]), include=[{"z" * 9000: 1}]), "include cannot set"),
    "strength of 9,000 characters": (axes(("strength:a", ["z" * 9000])), "strength:a"),
    "zip of long names": (zipped(*((f"replace:{str(n) * 290}", list(range(n + 1))) for n in range(9))), "one length"),
    "wildcard of 9,000 characters": bug(LONG_WILDCARD, {"prompt": f"__{'a' * 9000}__", "dynamic": "random"}, "prompt.*wildcard"),
    "version of 9,000 characters": ({"prompt": f"<a@{'x' * 9000}>"}, "embedding"),
    "surrogates in place of a text": (axes(("replace:a", [SURROGATE])), "half a character"),
    "pack with a slash in its name": ({"pack": {"name": "a/b"}}, "embedding name"),
    "pack with a null character in its name": ({"pack": {"name": "a\0b"}}, "embedding name"),
    "pack of a long name": ({"pack": {"name": "x" * 121}}, "pack"),
}  # fmt: skip


# ---- files

Place = tuple[int, int | None]
Table = dict[str, tuple[str | bytes | Files | Callable[[], str | bytes], str, Place | None] | Bug]


def bomb(levels: int) -> str:
    """Return YAML of lists of nine lists each, by aliases: 9 ** levels values."""
    lists = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]" for n in range(levels)]
    return "\n".join(lists) + "\n"


YAML: Table = {
    "no bytes": ("", "file|job", None),
    "white space": ("  \n\n", "file|job", None),
    "comments": ("# nothing\n", "file|job", None),
    "null": ("null\n", "mapping", (1, 1)),
    "a text": ("prompt\n", "mapping", (1, 1)),
    "a list": ("- prompt: a\n", "mapping", (1, 1)),
    "two documents": ("prompt: a\n---\nprompt: b\n", "YAML", (2, 1)),
    "a mark of byte order in the middle": ("prompt: a\n\ufeffsteps: 0\n", "YAML|steps", (2, None)),
    "UTF-16": ("prompt: a\n".encode("utf-16"), "UTF-8", None),
    "Latin-1": ("prompt: é\n".encode("latin-1"), "UTF-8", None),
    "a PNG": (b"\x89PNG\r\n\x1a\n" + bytes(100), "UTF-8", None),
    "null characters": bug(FIRST_LINE, "prompt: a\nsteps: \0\n", "YAML", (2, 8)),
    "a tab": ("prompt: a\n\tsteps: 1\n", "YAML", (2, 1)),
    "bad indentation": ("prompt: a\n  steps: 1\n", "YAML", (2, 8)),
    "an open quote": ('prompt: "a\nsteps: 1\n', "YAML", (3, 1)),
    "an open bracket": ("matrix: {steps: [1, 2\n", "YAML", (2, 1)),
    "an unknown tag": ("prompt: a\nsteps: !!python/object/apply:os.system ['true']\n", "steps|YAML", (2, None)),
    "an unknown tag of a scalar": ("prompt: a\nsteps: !run 'true'\n", "YAML", (2, 8)),
    "an unknown tag of 10,000": (f"prompt: !{'x' * 10_000} a\n", "YAML", (1, 9)),
    "an unknown alias": ("prompt: a\nsteps: *nothing\n", "YAML", (2, 8)),
    "an unknown alias of 10,000": (f"prompt: *{'x' * 10_000}\n", "YAML", (1, 9)),
    "a list as a key": ("prompt: a\n? [a, b]\n: 1\n", "YAML", (2, 3)),
    "a mapping as a key": ("prompt: a\n? {a: b}\n: 1\n", "YAML", (2, 3)),
    "null as a key": ("prompt: a\n~: 1\n", "YAML", (2, 1)),
    "a truth as a key": ("prompt: a\ntrue: 1\n", "True", (2, 7)),
    "a number as a key": ("prompt: a\n5: 1\n", "5", (2, 4)),
    "a key of 1 MB": (lambda: f"? {'x' * 1_000_000}\n: 1\n", "is no section", (2, 3)),
    "a key twice": ("prompt: a\nsteps: 1\nprompt: b\n", "prompt.*twice", (3, 1)),
    "a key twice, deep": ("defaults:\n  steps: 1\n  steps: 2\n", "steps.*twice", (3, 3)),
    "a merge": ("a: &a {steps: 1}\ndefaults:\n  <<: *a\n", "YAML|a: is no section", None),
    "lists in lists": ("prompt: " + "[" * 100 + "]" * 100, "YAML.*nested", (1, None)),
    "lists in lists without end": ("prompt: " + "[" * 100_000, "YAML.*nested", (1, None)),
    "mappings in mappings": ("prompt: " + "{a: " * 500 + "1" + "}" * 500, "YAML.*nested", (1, None)),
    "a list in itself": ("prompt: &a [*a]\n", "YAML.*nested", (1, None)),
    "a number of 5,000 digits": (f"prompt: a\nsteps: {'9' * 5000}\n", "steps|YAML", (2, 8)),
    "a number of 5,000 hexadecimal digits": (f"prompt: a\nsteps: 0x{'f' * 5000}\n", "steps", (2, 8)),
    "a number of 5,000 hexadecimal digits in a matrix": (f"matrix:\n  seed: [1, 0x{'f' * 5000}]\n", "seed", (2, 13)),
    "a day that is none": ("prompt: a\nname: 2024-13-45\n", "YAML|name", (2, 7)),
    "a day for steps": ("prompt: a\nsteps: 2024-01-02\n", "steps", (2, 8)),
    "a set": ("defaults: !!set {a, b}\n", "a: is not a field", (1, None)),
    "NaN": ("prompt: a\ncfg_scale: .nan\n", "cfg_scale", (2, 12)),
    "infinity": ("prompt: a\ncfg_scale: -.inf\n", "cfg_scale", (2, 12)),
    "1e999": ("prompt: a\ncfg_scale: 1.0e+999\n", "cfg_scale", (2, 12)),
    "a truth for steps": ("prompt: a\nsteps: yes\n", "steps: should be a number", (2, 8)),
    "a prompt of 10 MB": (lambda: f"steps: 1\nprompt: {long()}\n", "prompt", (2, 9)),
    "a null character, escaped": ('prompt: "a\\0b"\n', "prompt", (1, 9)),
    "a surrogate, escaped": ('prompt: "\\ud800"\n', "prompt", (1, 9)),
    "more than 16 MiB": (lambda: b"#" * (16 * 2**20 + 1), "larger than 16777216 bytes", None),
    "an unknown section": ("prompt: a\nmatrx: {}\n", "matrx.*did you mean matrix", (2, 8)),
    "an unknown section behind a zero-width space": (f"prompt: a\n{ZERO_WIDTH}steps: 1\n", "section", (2, 9)),
    "an unknown field in defaults": ("defaults:\n  promt: a\n", "promt.*did you mean prompt", (2, 10)),
    "defaults as a list": ("prompt: a\ndefaults: [1]\n", "defaults: should be a mapping", (2, 11)),
    "matrix as a list": ("matrix: [steps]\n", "matrix: should be a mapping", (1, 9)),
    "zip as a text": ("zip: steps\n", "zip: should be a mapping", (1, 6)),
    "include as a mapping": ("include: {steps: 1}\n", "include: should be a list", (1, 10)),
    "exclude as a number": ("exclude: 5\n", "exclude: should be a list", (1, 10)),
    "items as a mapping": ("items: {prompt: a}\n", "items: should be a list", (1, 8)),
    "include of numbers": ("matrix: {steps: [1]}\ninclude:\n  - 5\n", "include: should be a mapping", (3, 5)),
    "items of texts": ("items:\n  - prompt: a\n  - a girl\n", "items: should be a mapping", (3, 5)),
    "items of nothing": ("items:\n  -\n  -\n", "items: should be a mapping", (2, 4)),
    "no items": ("prompt: a\nitems: []\n", "items", (2, None)),
    "items and rows": ({"a.yaml": "items: [{prompt: a}]\nrows: r.csv\n", "r.csv": "prompt\nb\n"}, "items|rows", None),
    "a matrix of nothing": ("matrix:\n  steps: []\n", "steps: has no values", (2, 10)),
    "a matrix of null": ("matrix:\n  steps:\n", "steps", (2, 9)),
    "a matrix of lists": ("matrix:\n  steps: [1, [2]]\n", "steps", (2, 14)),
    "a matrix of truths": ("matrix:\n  steps: [1, true]\n", "steps", (2, 14)),
    "a matrix out of range": ("matrix:\n  steps: [1, 20, 900]\n", "steps.*900", (2, 18)),
    "a matrix of NaN": ("matrix:\n  cfg_scale: [.nan]\n", "cfg_scale", (2, 15)),
    "a matrix of unknown samplers": ("matrix:\n  sampler: [Euler, Oiler]\n", "sampler.*Oiler", (2, 20)),
    "a matrix of an unknown field": ("prompt: a\nmatrix:\n  stepz: [1]\n", "stepz", (3, 3)),
    "a matrix of a known field that is no axis": ("prompt: a\nmatrix:\n  count: [1]\n", "count", (3, 3)),
    "a matrix of null characters": ('matrix:\n  prompt: ["a", "a\\0b"]\n', "prompt|null", (2, 17)),
    "a matrix of surrogates": ('matrix:\n  prompt: ["a", "\\ud800"]\n', "prompt", (2, 17)),
    "a span downwards": ("prompt: a\nmatrix:\n  seed: 9..1\n", "seed|axes|count up", (3, None)),
    "a span left open": ("matrix:\n  seed: 1..\n", "seed", (2, 9)),
    "a span from nowhere": ("matrix:\n  seed: ..9\n", "seed", (2, 9)),
    "a span below zero": ("matrix:\n  seed: -5..5\n", "seed", (2, 9)),
    "a span of halves": ("matrix:\n  seed: 0.5..5\n", "seed", (2, 9)),
    "a span beyond seeds": ("prompt: a\nmatrix:\n  seed: 1..99999999999\n", "axes|seed", (3, None)),
    "a span in steps of 0": ("prompt: a\nmatrix:\n  seed: 1..9..0\n", "axes|seed", (3, None)),
    "a span of 5,000 digits": (f"prompt: a\nmatrix:\n  seed: 1..{'9' * 5000}\n", "axes|seed", (3, None)),
    "a span of a million and one": ("prompt: a\nmatrix:\n  seed: 1..1000001\n", "1000001 images", (3, 3)),
    "an axis in matrix and zip": ("matrix: {steps: [1]}\nzip: {steps: [2]}\n", "'steps' stands twice", (1, 9)),
    "a zip of different lengths": bug(SECTION, "prompt: a\nzip: {steps: [1, 2], seed: [1]}\n", "one length", (2, None)),
    "an exclude of nothing": bug(SECTION, "matrix: {steps: [1, 2]}\nexclude: [{}]\n", "names nothing", (2, None)),
    "an exclude of what is no axis": bug(SECTION, "matrix: {steps: [1, 2]}\nexclude:\n  - seed: 5\n", "seed", (3, None)),
    "an exclude of everything": ("matrix: {steps: [1]}\nexclude: [{steps: 1}]\n", "0 images", (1, 9)),
    "corners first with excludes": (
        "order: corners-first\nmatrix: {steps: [1, 2]}\nexclude: [{steps: 1}]\n", "corners-first", (2, 9)),
    "an include of models": bug(SECTION, "matrix: {steps: [1]}\ninclude:\n  - model: demo\n", "include.*model", (3, None)),
    "an include out of range": ("matrix: {steps: [1]}\ninclude:\n  - steps: 900\n", "steps", (3, 12)),
    "a corner that does not fit": ("prompt: a\nhires: {scale: 8}\nmatrix:\n  width: [128, 1024]\n", "width 1024", (4, 3)),
    "a seed out of range": ("prompt: a\nseed: 4294967296\n", "seed", (2, 7)),
    "an approval of nothing": ("prompt: a\napprove_after: 0\n", "approve_after", (2, 16)),
    "a time before now": ("prompt: a\nexpires_in: -5m\n", "expires_in", (2, 13)),
    "a time in words": ("prompt: a\nmax_runtime: soon\n", "max_runtime", (2, 14)),
    "a time without end": ("prompt: a\nkeep: 1e400\n", "keep", (2, 7)),
    "a time of 400 digits": (f"prompt: a\nkeep: {'9' * 400}d\n", "keep", (2, 7)),
    "a time of 5,000 hexadecimal digits": (f"prompt: a\nkeep: 0x{'f' * 5000}\n", "keep", (2, None)),
    "a time that is a list": ("prompt: a\nkeep: [5m]\n", "keep", (2, 7)),
    "a time of truth": ("prompt: a\nkeep: true\n", "keep", (2, 7)),
    "a name that is a mapping": ("prompt: a\nname: {a: b}\n", "name", (2, None)),
    "a name that is nothing": ("prompt: a\nname:\n", "name", (2, None)),
    "a name of two lines": ('prompt: a\nname: "a\\nb"\n', "name", (2, 7)),
    "a key of two lines": ('prompt: a\nkey: "a\\nb"\n', "key", (2, 6)),
    "a tag of 10,000": (f"prompt: a\ntags: [{'x' * 10_000}]\n", "tags", (2, 7)),
    "metadata as a list": ("prompt: a\nmetadata: [a]\n", "metadata", (2, 11)),
    "lots of memory": ("prompt: a\nrequires: ['memory:lots']\n", "requires", (2, 11)),
    "a field in defaults": ("name: a\ndefaults:\n  steps: 20\n  width: 129\n", "width", (4, 10)),
    "an unknown model in its line": bug(NO_LINE, "prompt: a\nmodel: nope\n", "model.*nope", (2, None)),
    "an unknown embedding in its line": bug(NO_LINE, "name: a\nprompt: a <no-such-9>\n", "no-such-9", (2, None)),
    "embeddings as a number": ("prompt: a\nembeddings: 5\n", "embeddings", (2, None)),
    "embeddings as a text": ("prompt: a\nembeddings: style-1\n", "embeddings", (2, None)),
    "embeddings of numbers": ("prompt: a\nembeddings: [5]\n", "embeddings", (2, 13)),
    "embeddings of sides that are none": ("prompt: a\nembeddings: ['a:up']\n", "embeddings", (2, 13)),
    "embeddings as a number beside items": ("embeddings: 5\nitems: [{prompt: a}]\n", "embeddings", (1, None)),
    "embeddings of numbers beside items": ("embeddings: [5]\nitems: [{prompt: a}]\n", "embeddings", (1, None)),
    "embeddings as a text beside items": ("embeddings: style-1\nitems: [{prompt: a}]\n", "embeddings", (1, None)),
    "an unknown field in an item": ("items:\n  - prompt: a\n  - promt: b\n", "promt", (3, None)),
    "a wrong field in an item": ("items:\n  - prompt: a\n  - prompt: b\n    steps: 900\n", "steps", (3, None)),
    "a wrong field in an item, in its line": bug(NO_LINE, "items:\n  - prompt: a\n  - prompt: b\n    steps: 900\n", "steps", (4, 5)),
    "surrogates in items": ('items:\n  - prompt: a\n  - prompt: "\\ud800"\n', "prompt", (3, None)),
    "items that count without end": ("items:\n  - prompt: a\n    count: 1000001\n", "count", (2, None)),
    "items that count truths": ("items:\n  - prompt: a\n    count: true\n", "count", (2, None)),
    "wildcards without lines": ("prompt: __a__\ndynamic: random\nwildcards: {a: []}\n", "wildcard", None),
    "wildcards of blank lines": ("prompt: __a__\ndynamic: random\nwildcards: {a: ['']}\n", "wildcard", None),
    "wildcards as numbers": ("prompt: a\nwildcards: {a: 5}\n", "wildcards", (2, 16)),
    "wildcards of lists": ("prompt: a\nwildcards: {a: [[1]]}\n", "wildcards", (2, None)),
    "wildcards without a name": ("prompt: a\nwildcards: {'': [a]}\n", "wildcards", (2, None)),
    "wildcards of 300 characters": (f"prompt: a\nwildcards: {{{'a' * 300}: [a]}}\n", "wildcards", (2, None)),
    "wildcards of surrogates": ('prompt: a\nwildcards: {a: ["\\ud800"]}\n', "wildcards|prompt", (2, None)),
    "wildcards of null characters": ('prompt: __a__\ndynamic: all\nwildcards: {a: ["\\0"]}\n', "wildcards|null", None),
    "wildcards in no folder": ("prompt: a\nwildcards: nowhere\n", "wildcards.*no folder", (2, 12)),
    "wildcards elsewhere": ("prompt: a\nwildcards: ../nowhere\n", "wildcards.*own folder", (2, 12)),
    "wildcards in a folder with a null character": ('prompt: a\nwildcards: "a\\0b"\n', "wildcards", (2, 12)),
    "wildcards in a folder of 300 characters": (f"prompt: a\nwildcards: {'a' * 300}\n", "wildcards", (2, None)),
    "wildcards in Latin-1": bug(BESIDE, {"a.yaml": "prompt: a\nwildcards: w\n", "w/a.txt": b"\xe9\n"}, "w/a.txt", None),
    "wildcards that go round": (
        "prompt: __a__\ndynamic: random\nwildcards: {a: ['__b__'], b: ['__a__']}\n", "wildcards.*deep", None),
    "wildcards that climb": ("prompt: __a/../../etc/passwd__\ndynamic: random\nwildcards: {a: [b]}\n", "wildcard", None),
    "texts of wildcards beyond counting": (
        lambda: "dynamic: all\nprompt: " + "__aa__" * 3333 + "\nwildcards:\n  aa: [" + ", ".join("abcdefghijklmnop") + "]\n",
        "dynamic", None),
    "wildcards of one letter, side by side": (
        "dynamic: all\nprompt: __a__ __b__\nwildcards: {a: [c, d]}\n", "called 'b'", None),
    "rows that are not there, in their line": ("prompt: a\nrows: nothing.csv\n", "rows", (2, None)),
    "rows elsewhere": ("prompt: a\nrows: ../../../../../../../../etc/passwd\n", "rows", (2, None)),
    "rows from the root": ("prompt: a\nrows: /etc/passwd\n", "rows", (2, None)),
    "rows in a folder": ("prompt: a\nrows: .\n", "rows", (2, None)),
    "rows with a null character": ('prompt: a\nrows: "r\\0.csv"\n', "rows", (2, None)),
    "rows of 300 characters": (f"prompt: a\nrows: {'r' * 300}.csv\n", "rows", (2, None)),
    "rows as a number": ("prompt: a\nrows: 5\n", "rows", (2, None)),
    "rows as a list": ("prompt: a\nrows: [a.csv]\n", "rows", (2, None)),
    "rows in YAML": ({"a.yaml": "prompt: a\nrows: a.yaml\n"}, "rows|row", None),
    "rows that are wrong": ({"a.yaml": "prompt: a\nrows: r.csv\n", "r.csv": "steps\n5\n900\n"}, r"r\.csv.*steps", (3, None)),
    "rows that are wrong together": ({"a.yaml": "prompt: a\nhires: {scale: 8}\nrows: r.csv\n", "r.csv": "width\n128\n1024\n"}, r"r\.csv.*hires", (3, None)),
    "no rows": ({"a.yaml": "prompt: a\nrows: r.csv\n", "r.csv": ""}, r"r\.csv", None),
    "axes beside a matrix": ("prompt: a\naxes: [{field: steps, values: [900]}]\n", "axes", (2, None)),
    "zipped as a number": ("prompt: a\nzipped: 5\n", "zipped", (2, None)),
    "seeds as texts beside items": ('seed: "7"\nitems: [{prompt: a}, {prompt: b, steps: 0}]\n', "steps", (2, None)),
    "surrogates in place of a text": ('prompt: a\nmatrix: {"replace:a": ["\\ud800"]}\n', "half a character", (2, 9)),
    "rows above": ({"in/a.yaml": "prompt: a\nrows: ../r.csv\n", "r.csv": "steps\n5\n"}, "rows", (2, None)),
    "wildcards above": ({"in/a.yaml": "prompt: a\nwildcards: ..\n", "w.txt": "a\n"}, "wildcards", (2, None)),
    "a column too many in rows": (
        {"a.yaml": "prompt: a\nrows: r.csv\n", "r.csv": "steps\n5,6\n"}, r"r\.csv.*more cells", (2, 2)),
}  # fmt: skip

JSON: Table = {
    "no bytes": ("", "file|job", None),
    "an open brace": ('{"prompt": "a"', "YAML|JSON", (1, None)),
    "a list": ("[]", "mapping", (1, 1)),
    "a key twice": ('{"prompt": "a",\n "prompt": "b"}', "prompt.*twice", (2, 2)),
    "NaN": ('{"prompt": "a",\n "cfg_scale": NaN}', "cfg_scale", (2, None)),
    "1e999": ('{"prompt": "a",\n "cfg_scale": 1e999}', "cfg_scale", (2, 15)),
    "a number of 5,000 digits": ('{"prompt": "a",\n "steps": ' + "9" * 5000 + "}", "steps|YAML", (2, None)),
    "steps as a list": ('{"prompt": "a",\n "steps": [20]}', "steps", (2, 11)),
    "lists in lists": ('{"prompt": ' + "[" * 5000 + "]" * 5000 + "}", "nested", (1, None)),
    "a comma too many": ('{"prompt": "a",, "steps": 1}', "YAML|JSON", (1, None)),
    "a surrogate": ('{"prompt": "\\ud800"}', "prompt", (1, 12)),
    "a wrong item": ('{"items": [{"prompt": "a"},\n {"prompt": "b", "steps": 0}]}', "steps", (2, None)),
}  # fmt: skip

GOOD = '{"prompt": "a", "seed": 1}\n'
JSONL: Table = {
    "no bytes": ("", "job", None),
    "blank lines": ("\n\n# nothing\n\n", "job", None),
    "no JSON": (GOOD + "prompt: a\n", "JSON", (2, 1)),
    "half a line": (GOOD + '{"prompt": "a"', "JSON", (2, 15)),
    "two objects": (GOOD + GOOD.strip() + GOOD, "JSON", (2, 27)),
    "single quotes": (GOOD + "{'prompt': 'a'}\n", "JSON", (2, 2)),
    "an indented line": (GOOD + '    {"prompt": a}\n', "JSON", (2, 16)),
    "a list": (GOOD + "[1]\n", "object", (2, 1)),
    "a number": (GOOD + "5\n", "object", (2, 1)),
    "null": (GOOD + "null\n", "object", (2, 1)),
    "a text": (GOOD + '"prompt"\n', "object", (2, 1)),
    "a mark of byte order in the middle": (GOOD + "\ufeff" + GOOD, "JSON", (2, 1)),
    "UTF-16": (GOOD.encode("utf-16"), "UTF-8", None),
    "Latin-1 in a line": bug(NO_LINE, GOOD.encode() + b'{"prompt": "\xe9"}\n', "UTF-8|prompt", (2, None)),
    "null characters": (GOOD + "\0\0\0\n", "JSON", (2, 1)),
    "a null character in a prompt": (GOOD + '{"prompt": "a\\u0000b"}\n', "prompt", (2, 2)),
    "a surrogate in a prompt": (GOOD + '{"prompt": "\\ud800"}\n', "prompt", (2, 2)),
    "a surrogate in a key": (GOOD + '{"\\ud800": 1}\n', "is not a field", (2, None)),
    "an unknown field": (GOOD + '{"promt": "a"}\n', "promt.*did you mean prompt", (2, 2)),
    "an unknown field in Greek": (GOOD + '{"βήματα": 5}\n', "βήματα", (2, 2)),
    "an empty field": (GOOD + '{"": 5}\n', "is not a field", (2, 2)),
    "an unknown field of a megabyte": (lambda: GOOD + '{"' + "x" * 1_000_000 + '": 5}\n', "is not a field", (2, None)),
    "a field twice": (GOOD + '{"prompt": "a", "steps": 5, "steps": 6}\n', "steps", (2, None)),
    "a field whose name stands in a prompt": bug(COLUMNS, GOOD + '{"prompt": "\\"steps\\" steps", "steps": 0}\n', "steps", (2, 33)),
    "a prompt of 10 MB": (lambda: GOOD + json.dumps({"prompt": long()}) + "\n", "longer than|prompt", (2, None)),
    "10 MB without end": (lambda: GOOD + '{"prompt": "' + long(), "longer than|prompt", (2, None)),
    "a prompt of 30,000": (GOOD + json.dumps({"prompt": "x" * 30_000}), "prompt", (2, 2)),
    "steps of 0": (GOOD + '{"prompt": "a", "steps": 0}\n', "steps", (2, 17)),
    "steps of truth": (GOOD + '{"prompt": "a", "steps": true}\n', "steps", (2, 17)),
    "steps in a list": (GOOD + '{"prompt": "a", "steps": [5]}\n', "steps", (2, 17)),
    "steps of null": (GOOD + '{"prompt": "a", "steps": null}\n', "steps", (2, 17)),
    "NaN": (GOOD + '{"cfg_scale": NaN}\n', "NaN", (2, None)),
    "infinity": (GOOD + '{"cfg_scale": -Infinity}\n', "Infinity", (2, None)),
    "1e999": (GOOD + '{"cfg_scale": 1e999}\n', "cfg_scale", (2, 2)),
    "a number of 5,000 digits": (GOOD + f'{{"seed": {"9" * 5000}}}\n', "too large|Exceeds the limit", (2, None)),
    "a seed beyond": (GOOD + '{"seed": 4294967296}\n', "seed", (2, 2)),
    "a seed beyond, by count": (GOOD + '{"seed": 4294967295, "count": 2}\n', "seed", (2, None)),
    "a count of truth": (GOOD + '{"prompt": "a", "count": true}\n', "count", (2, 17)),
    "a count of 0": (GOOD + '{"prompt": "a", "count": 0}\n', "count", (2, 17)),
    "lists in lists": (GOOD + '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "nested", (2, None)),
    "objects in objects": (GOOD + '{"metadata": ' + '{"a": ' * 300 + "1" + "}" * 301 + "\n", "metadata", (2, 2)),
    "a prompt in lists": (GOOD + '{"prompt": ' + "[" * 600 + "]" * 600 + "}\n", "prompt|nested", (2, None)),
    "an unknown sampler": (GOOD + '{"sampler": "Oiler"}\n', "sampler.*Oiler", (2, 2)),
    "an unknown sampler of half a megabyte": (lambda: GOOD + f'{{"sampler": "{"x" * 500_000}"}}\n', "sampler", (2, 2)),
    "an unknown model": (GOOD + '{"prompt": "a", "model": "nope"}\n', "model.*nope", (2, None)),
    "an unknown embedding": (GOOD + '{"prompt": "a", "embeddings": ["no-such-9"]}\n', "no-such-9", (2, None)),
    "an unknown embedding in the prompt": (GOOD + '{"prompt": "a <no-such-9>"}\n', "no-such-9", (2, None)),
    "embeddings of null": (GOOD + '{"prompt": "a", "embeddings": null}\n', "embeddings", (2, 17)),
    "embeddings of numbers": (GOOD + '{"prompt": "a", "embeddings": [5]}\n', "embeddings", (2, 17)),
    "a network": (GOOD + '{"prompt": "a <lora:b:1>"}\n', "lora", (2, None)),
    "a name of two lines": (GOOD + '{"prompt": "a", "name": "a\\nb"}\n', "name", (2, 17)),
    "a tag with a null character": (GOOD + '{"prompt": "a", "tags": ["a\\u0000"]}\n', "tags", (2, 17)),
    "a time before now": (GOOD + '{"prompt": "a", "expires_in": "-5m"}\n', "expires_in", (2, 17)),
    "a hires pass that does not fit": (GOOD + '{"prompt": "a", "width": 1024, "hires": {"scale": 8}}\n', "hires", (2, None)),
    "rows in a row": (GOOD + '{"prompt": "a", "rows": "a.csv"}\n', "rows", (2, 17)),
    "the rows of another": (GOOD + json.dumps({"rows": {"total": 2, "chunk": 2, "index": INDEX}}), "rows", (2, 2)),
    "more than 200 jobs": ("".join(json.dumps({"prompt": "a", "name": f"n{n}"}) + "\n" for n in range(201)), "200", None),
    "more than 200 jobs, in their line": ("".join(json.dumps({"prompt": "a", "name": f"n{n}"}) + "\n" for n in range(201)), "200", (201, None)),
    "150 wrong lines": ('{"steps": 0}\n' * 150, "steps", (1, 2)),
    "a seed as a text": (GOOD + '{"seed": "5"}\n{"seed": "x"}\n', "seed", (3, 2)),
    "a network behind a comment": ("# note\n" + GOOD + '{"prompt": "a <lora:b:1>"}\n', "lora", (3, None)),
}  # fmt: skip

CSV: Table = {
    "no bytes": ("", "header", None),
    "blank lines": ("\n\n\n", "header|job", None),
    "a header alone": ("prompt,steps\n", "job", None),
    "an unknown column": ("promt,steps\na,5\n", "promt.*did you mean prompt", (1, 1)),
    "an unknown column without cells": ("prompt,stepz\na,\n", "stepz", None),
    "a column twice": ("prompt,steps,prompt\na,5,b\n", "prompt", None),
    "a column without a name": ("prompt,\na,5\n", "is no field", (1, 2)),
    "a header in another separator": ("prompt;steps\na;5\n", "prompt;steps", (1, 1)),
    "more cells than the header": ("prompt,steps\na,5\na, girl,5\n", "more cells", (3, 3)),
    "a quote left open": ('prompt,steps\n"a girl,5\nb,6\nc,7\n', "quote|end of data", (2, None)),
    "a quote left open in the last line": ('prompt,steps\nb,6\n"a girl,5\n', "unexpected end", (3, None)),
    "text behind a quote": ('prompt,steps\n"a" girl,5\n', "expected after", (2, None)),
    "a cell of 10 MB": (lambda: f"prompt,steps\na,5\n{long()},5\n", "field larger|prompt", (3, None)),
    "a cell of 30,000": (f"prompt,steps\na,5\n{'x' * 30_000},5\n", "prompt", (3, 1)),
    "a header of 10 MB": (lambda: f"{long()}\na\n", "header", None),
    "null characters": ("prompt,steps\na,5\na\0b,5\n", "prompt|NUL", (3, None)),
    "UTF-16": ("prompt,steps\na,5\n".encode("utf-16"), "UTF-8", None),
    "Latin-1": (b"prompt,steps\n\xe9,5\n", "UTF-8", None),
    "a mark of byte order in the middle": ("prompt,steps\n\ufeffa,\ufeff5\n", "steps", (2, 2)),
    "steps in words": ("prompt,steps\na,5\nb,many\n", "steps", (3, 2)),
    "steps of truth": ("prompt,steps\na,true\n", "steps", (2, 2)),
    "steps of NaN": ("prompt,steps\na,NaN\n", "steps", (2, 2)),
    "steps of 1e999": ("prompt,steps\na,1e999\n", "steps", (2, 2)),
    "steps of 5,000 digits": (f"prompt,steps\na,{'9' * 5000}\n", "steps", (2, 2)),
    "steps in lists": (f"prompt,steps\na,{'[' * 5000}{']' * 5000}\n", "steps", (2, 2)),
    "half a step": ("prompt,steps\na,2.5\n", "steps", (2, 2)),
    "an unknown sampler": ("prompt,sampler\na,Oiler\n", "sampler.*Oiler", (2, 2)),
    "seeds in a decimal comma": ('prompt,cfg_scale\na,"7,5"\n', "cfg_scale", (2, 2)),
    "a width that is none": ("prompt,width\na,128\nb,129\n", "width", (3, 2)),
    "embeddings that are none": ("prompt,embeddings\na,no-such-9;b:up\n", "embeddings", (2, 2)),
    "requires in words": ("prompt,requires\na,gpu\n", "requires", (2, 2)),
    "an unknown model": ("prompt,model\na,demo\nb,nope\n", "model.*nope", (3, None)),
    "line breaks in cells": ('prompt,steps\n"a\nb",5\nc,900\n', "steps", (4, 2)),
    "an error behind line breaks in cells": ('prompt,steps\n"a\nb",900\n', "steps", (2, 2)),
    "Python's None": ("prompt,seed\na,None\n", "seed", (2, 2)),
}  # fmt: skip

TSV: Table = {
    "no bytes": ("", "header", None),
    "commas": ("prompt,steps\na,5\n", "prompt,steps", (1, 1)),
    "more cells than the header": ("prompt\tsteps\na\t5\t6\n", "more cells", (2, 3)),
    "steps in words": ("prompt\tsteps\na\tmany\n", "steps", (2, 2)),
}  # fmt: skip
TABLES: dict[str, Table] = {"yaml": YAML, "json": JSON, "jsonl": JSONL, "csv": CSV, "tsv": TSV}


# ---- paths


def no_file(folder: Path) -> Path:
    return folder / "nothing.yaml"


def a_folder(folder: Path) -> Path:
    (folder / "a.yaml").mkdir()
    return folder / "a.yaml"


def another_ending(folder: Path) -> Path:
    (folder / "a.txt").write_text(GOOD)
    return folder / "a.txt"


def no_ending(folder: Path) -> Path:
    (folder / "con").write_text(GOOD)
    return folder / "con"


def a_link_to_itself(folder: Path) -> Path:
    (folder / "a.jsonl").symlink_to("a.jsonl")
    return folder / "a.jsonl"


def a_link_to_passwords(folder: Path) -> Path:
    (folder / "a.jsonl").symlink_to("/etc/passwd")
    return folder / "a.jsonl"


def a_null_character(folder: Path) -> Path:
    return folder / "a\0.jsonl"


def a_null_character_in_a_sweep(folder: Path) -> Path:
    return folder / "a\0.yaml"


def a_name_of_300_characters(folder: Path) -> Path:
    return folder / f"{'a' * 300}.yaml"


PATHS: dict[Callable[[Path], Path], str | Bug] = {
    no_file: "nothing.yaml",
    a_folder: "a.yaml",
    another_ending: "should end in",
    no_ending: "should end in",
    a_link_to_itself: "a.jsonl",
    a_link_to_passwords: "a.jsonl.*JSON",
    a_null_character: "a.*jsonl",
    a_null_character_in_a_sweep: "a.*yaml",
    a_name_of_300_characters: "aaa",
}


DEFAULTS: dict[str, tuple[dict[str, object], str] | Bug] = {
    "unknown field": ({"promt": "a"}, "promt.*did you mean prompt"),
    "steps of 0": ({"steps": 0}, "steps"),
    "a count of 0": ({"count": 0}, "count"),
    "a prompt of numbers": ({"prompt": 5}, "prompt"),
    "a null character": ({"prompt": "\0"}, "prompt"),
    "a surrogate": ({"prompt": SURROGATE}, "prompt"),
    "a time in words": ({"expires_in": "soon"}, "expires_in"),
    "a long unknown sampler": ({"sampler": "x" * 100_000}, "sampler"),
    "embeddings as a number": ({"embeddings": 5}, "embeddings"),
    "embeddings of numbers": ({"embeddings": [5]}, "embeddings"),
    "a seed in words": ({"seed": "x"}, "seed"),
    "a seed out of range": ({"seed": 2**32}, "seed"),
    "steps of 5,000 digits": ({"steps": GIANT}, "steps"),
    "rows of another": ({"rows": {"total": 2, "chunk": 2, "index": INDEX}}, "rows"),
}


# ---- bombs: small to send, large to read


def a_pipe_that_nobody_fills(folder: Path) -> Path:
    os.mkfifo(folder / "a.jsonl")
    return folder / "a.jsonl"


def a_device_without_end(folder: Path) -> Path:
    (folder / "a.jsonl").symlink_to("/dev/zero")
    return folder / "a.jsonl"


def written(suffix: str, text: Callable[[], str]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / f"a.{suffix}").write_text(text())
        return folder / f"a.{suffix}"

    return write


def wildcards_in_wildcards() -> str:
    levels = "".join(f"  w{n}: ['{f'__w{n + 1}__' * 10}']\n" for n in range(7))
    return f"prompt: __w0__\ndynamic: random\nwildcards:\n{levels}  w7: [a, b]\n"


def excluded(sizes: int) -> dict[str, object]:
    """Return a sweep in which every choice leaves other excludes in force."""
    fields = ("steps", "cfg_scale", "seed", "ensd", "variation_seed", "clip_skip", "replace:a", "replace:b")
    pairs = [(field, list(range(1, sizes + 1))) for field in fields]
    exclude = [{field: value, "variation_strength": 1} for field in fields for value in range(1, sizes)]
    return axes(*pairs, ("variation_strength", [0, 1]), exclude=exclude, prompt="a b")


TWO_MILLION = '{"count": 1000000}\n' * 2
FILE_BOMBS: dict[str, Callable[[Path], Path] | Bug] = {
    "aliases of aliases": written("yaml", lambda: bomb(7) + "prompt: a\n"),
    "aliases of aliases of aliases": written("yaml", lambda: bomb(30) + "prompt: a\n"),
    "a million values in 2 MB of YAML": written("yaml", lambda: f"items: [{'1,' * 1_000_000}1]\n"),
    "wildcards in wildcards": written("yaml", wildcards_in_wildcards),
    "a long line, many times": written(
        "yaml", lambda: f"dynamic: random\nprompt: {'__aa__' * 3000}\nwildcards: {{aa: [{'x' * 200_000}]}}\n"),
    "two million images in two lines": bug("a million rows are written before the next is refused", written("jsonl", lambda: TWO_MILLION)),
    "a pipe that nobody fills": a_pipe_that_nobody_fills,
    "a device without end": a_device_without_end,
}  # fmt: skip
AT_ONCE = pytest.mark.timeout(1, func_only=True)
MANY = 300_000
SPEC_BOMBS: dict[str, Callable[[], dict[str, object]] | Bug] = {
    "sets of sets": lambda: {
        "prompt": ("{1-8$$" + "|".join("abcdefghijklmnopq") + "}") * 500, "dynamic": "random"},
    "texts in place of letters": lambda: axes(
        ("replace:a", ["x" * 20_000]), prompt="a" * 10_000),
    "excludes that go on": lambda: excluded(9),
    "wrong embeddings": lambda: {"embeddings": [5] * MANY},
    "wrong tags": lambda: {"tags": [5] * MANY},
    "wrong values of an axis": lambda: axes(("steps", [None] * (MANY // 5))),
}  # fmt: skip


# ---- what is done with them


def cases(table: Mapping[str, Any], *marks: pytest.MarkDecorator) -> list[Any]:
    """Return a table as pytest's parameters; what is a bug has to fail, and has other `marks` as well."""
    found = []
    for name, given in table.items():
        if isinstance(given, Bug):
            expected = pytest.mark.xfail(strict=True, reason=given.reason)
            found.append(pytest.param(*given.given, id=name, marks=[expected, *marks]))
        else:
            found.append(pytest.param(*(given if isinstance(given, tuple) else (given,)), id=name))
    return found


def brief(value: object) -> str:
    if callable(value):
        return "10 MB"
    return "5,000 digits" if isinstance(value, int) and value == GIANT else ascii(value)[:70]


def one_field() -> Iterator[Any]:
    for field, values in FIELDS.items():
        for value in values:
            plain = value.given[0] if isinstance(value, Bug) else value
            given = Bug(value.reason, (field, plain)) if isinstance(value, Bug) else (field, plain)
            yield from cases({f"{field}={brief(plain)}": given})


def every_file() -> Iterator[Any]:
    for suffix, table in TABLES.items():
        for name, entry in table.items():
            given = (suffix, *(entry.given if isinstance(entry, Bug) else entry))
            yield from cases({f"{suffix}: {name}": Bug(entry.reason, given) if isinstance(entry, Bug) else given})


def path_cases() -> Iterator[Any]:
    for make, entry in PATHS.items():
        given = (make, *(entry.given if isinstance(entry, Bug) else (entry,)))
        yield from cases({make.__name__: Bug(entry.reason, given) if isinstance(entry, Bug) else given})


def made(value: Any) -> Any:
    """Return a value with what is long in place of what makes it."""
    if isinstance(value, list):
        return (
            [made(item) for item in value] if any(callable(item) or isinstance(item, dict) for item in value) else value
        )
    if isinstance(value, dict):
        return {name: made(item) for name, item in value.items()}
    return value() if callable(value) else value


class Memory:
    """How far the process's memory rises above where it was, in MB."""

    def __init__(self) -> None:
        self._at, self.held, self.most = 0, 0.0, 0.0

    def begin(self) -> None:
        clear = Path("/proc/self/clear_refs")
        if clear.exists():
            clear.write_text("5")  # forgets the peak so far
        self._at = psutil.Process().memory_info().rss

    @property
    def rise(self) -> float:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return (peak - self._at) / 2**20

    def add(self, test: Memory) -> None:
        """Count a test: what it rose to above what those before it kept, and what it kept."""
        self.most = max(self.most, self.held + test.rise)
        self.held += (psutil.Process().memory_info().rss - test._at) / 2**20


@pytest.fixture(scope="module")
def farm(servers: DirectFarm) -> DirectFarm:
    servers.models.add(CHECKPOINT, "demo")
    servers.freeze(JobSpec(prompt="a", seed=1))
    return servers


@pytest.fixture(scope="module")
def whole(farm: DirectFarm) -> Memory:
    return Memory()


@pytest.fixture(autouse=True)
def memory(request: pytest.FixtureRequest, farm: DirectFarm, whole: Memory) -> Iterator[Memory]:
    """Measure a test, and remove what it should not have queued."""
    is_bug = request.node.get_closest_marker("xfail") is not None
    before = {status.id for status in farm.ledger.jobs(1000)} if is_bug else set()
    here = Memory()
    here.begin()
    yield here
    if not is_bug:
        whole.add(here)
        return
    for status in farm.ledger.jobs(1000):
        if status.id not in before:
            farm.ledger.cancel(status.id)
            farm.ledger.delete(status.id)


def queued(farm: DirectFarm) -> object:
    return [status.id for status in farm.ledger.jobs()], farm.ledger.usage(farm.owner)


def check_refusal(farm: DirectFarm, send: Callable[[], object], says: str, place: Place | None = None) -> None:
    """Make sure that a submission is refused as all should be."""
    before, began = queued(farm), time.monotonic()
    with pytest.raises(UsageError) as caught:
        send()
    assert time.monotonic() - began < LIMIT_S
    assert queued(farm) == before
    errors = caught.value.errors if isinstance(caught.value, InvalidRows) else (caught.value,)
    assert max(len(str(error)) for error in errors) <= LIMIT_TEXT
    assert len(str(caught.value)) <= 20 * LIMIT_TEXT + LIMIT_TEXT
    meant = [error for error in errors if re.search(says, str(error), re.DOTALL)]
    assert meant, str(caught.value)
    if place is not None:
        found = [(getattr(error, "line", None), getattr(error, "column", None)) for error in meant]
        assert any(line == place[0] and place[1] in (None, column) for line, column in found), str(caught.value)


@pytest.fixture
def refuse(request: pytest.FixtureRequest, farm: DirectFarm) -> Refuse:
    """Return the check; of a bug that is known, nobody needs the traceback, which takes long to make."""

    def check(*given: Any) -> None:
        try:
            check_refusal(farm, *given)
        except (Exception, pytest.fail.Exception) as error:
            if request.node.get_closest_marker("xfail") is None:
                raise
            pytest.fail(f"{type(error).__name__}: {error}"[:500], pytrace=False)

    return check


@pytest.mark.parametrize(("field", "value"), list(one_field()))
def test_value_that_a_field_does_not_take_is_refused(
    farm: DirectFarm, refuse: Refuse, field: str, value: object
) -> None:
    given = {"prompt": "a"} | {field: made(value)}

    refuse(lambda: farm.submit(JobSpec.check(given)), field)


@pytest.mark.parametrize(("values", "says"), cases(SPECS))
def test_fields_that_do_not_go_together_are_refused(
    farm: DirectFarm, refuse: Refuse, values: dict[str, object], says: str
) -> None:
    given = {"prompt": "a"} | made(values)

    refuse(lambda: farm.submit(JobSpec.check(given)), says)


@pytest.mark.parametrize(("suffix", "given", "says", "place"), list(every_file()))
def test_file_is_refused_with_the_place(
    farm: DirectFarm, refuse: Refuse, tmp_path: Path, suffix: str, given: Any, says: str, place: Place | None
) -> None:
    text = given() if callable(given) else given
    files: Files = text if isinstance(text, dict) else {f"a.{suffix}": text}
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    del text, given
    main = tmp_path / next(iter(files))
    files.clear()

    refuse(lambda: farm.submit_file(main), says, place)


@pytest.mark.parametrize(("make", "says"), list(path_cases()))
def test_path_that_leads_to_no_jobs_is_refused(
    farm: DirectFarm, refuse: Refuse, tmp_path: Path, make: Callable[[Path], Path], says: str
) -> None:
    path = make(tmp_path)

    refuse(lambda: farm.submit_file(path), says)


@pytest.mark.parametrize(("values", "says"), cases(DEFAULTS))
def test_defaults_of_a_file_are_refused(
    farm: DirectFarm, refuse: Refuse, tmp_path: Path, values: dict[str, object], says: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"clip_skip": 1}\n{"clip_skip": 2}\n' if "prompt" in values else '{"prompt": "a"}\n{"prompt": "b"}\n'
    )
    given = made(values)

    refuse(lambda: farm.submit_file(path, defaults=given), says)


def test_standard_input_is_refused_like_a_file(
    farm: DirectFarm, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(GOOD + "nope\n"))

    refuse(lambda: farm.submit_file("-"), "JSON", (2, 1))


def test_memory_stays_flat_over_all_of_it(whole: Memory) -> None:
    assert whole.most < LIMIT_MB


@pytest.mark.timeout(60, func_only=True)
def test_last_of_200_000_rows_is_wrong(farm: DirectFarm, tmp_path: Path, memory: Memory) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"prompt": "a girl, number {n}", "seed": {n}}}\n' for n in range(199_999))
        file.write('{"prompt": "a girl", "seed": -2}\n')
    before = queued(farm)
    memory.begin()

    with pytest.raises(InvalidRows) as caught:
        farm.submit_file(path)

    assert memory.rise < LIMIT_TABLE_MB
    assert [(error.line, error.column, error.field) for error in caught.value.errors] == [(200_000, 22, "seed")]
    assert queued(farm) == before


@pytest.mark.parametrize("make", cases(FILE_BOMBS, AT_ONCE))
def test_file_that_is_a_bomb_is_refused_in_time(
    farm: DirectFarm, refuse: Refuse, tmp_path: Path, memory: Memory, make: Callable[[Path], Path]
) -> None:
    path = make(tmp_path)

    refuse(lambda: farm.submit_file(path), ".")

    assert memory.rise < LIMIT_MB


@pytest.mark.parametrize("make", cases(SPEC_BOMBS, AT_ONCE))
def test_spec_that_is_a_bomb_is_refused_in_time(
    farm: DirectFarm, refuse: Refuse, memory: Memory, make: Callable[[], dict[str, object]]
) -> None:
    refuse(lambda: farm.submit(JobSpec.check({"prompt": "a"} | make())), ".")

    assert memory.rise < LIMIT_MB
